"""What keys, clicks and a change of size do; and what becomes of an epoch meanwhile."""

from __future__ import annotations

import pytest

from shmepoch.cli.watch.app import WatchApp
from shmepoch.cli.watch.reading import Place
from shmepoch.cli.watch.widgets import EpochTable, Lines
from shmepoch.epoch.operations import OperationProgressUpdate
from shmepoch.errors import SegmentCorrupted
from shmepoch.memory.participants import Role
from shmepoch.monitoring.epochs import EpochState
from tests.cli.watch.samples import (
    SPACE,
    Sources,
    Watched,
    batch,
    entry,
    operation,
    participant,
    seen,
    session,
    summary,
    watching,
)

#: Text that a terminal obeys, that markup changes, that is wide or combines, or runs to the left.
HOSTILE = "[red]b[/] \x1b[31mx\x07 日本 e\u0301 \u202ea \u05d0\u05d1 a\nb\tc\ud800"


def three() -> Sources:
    return Sources(
        summary(1, watermark=10, cursors=(9, 10, 10), age_s=30),
        summary(2, watermark=30, running=2, age_s=10),
        summary(3, watermark=20, state=EpochState.ABANDONED, participants={}, age_s=20),
    )


def test_keys_sort() -> None:
    async def act(screen: Watched) -> None:
        assert screen.rows == ["01", "02", "03"]
        await screen.press("r")
        assert screen.rows == ["03", "02", "01"]
        await screen.press("s")
        assert "state▲" in screen.lines[2]
        await screen.press("S", "S")
        assert "▲age" in screen.lines[2]  # from the first column round to the last
        assert screen.rows == ["02", "03", "01"]

    watching(three(), act)


def test_a_click_on_a_heading_sorts() -> None:
    async def act(screen: Watched) -> None:
        at = screen.lines[2].index("watermark")
        await screen.pilot.click("#heading", offset=(at, 0))
        await screen.pilot.pause()
        assert "▼watermark" in screen.lines[2]
        assert screen.rows == ["02", "03", "01"]
        await screen.pilot.click("#heading", offset=(at, 0))
        await screen.pilot.pause()
        assert screen.rows == ["01", "03", "02"]

    watching(three(), act)


@pytest.mark.parametrize("key", ["r", "s", "S"])
def test_damaged_epochs_are_first(key: str) -> None:
    async def act(screen: Watched) -> None:
        for _ in range(8):
            assert screen.rows[0] == "09"
            assert "its magic is 0, not 1" in screen.lines[3]
            await screen.press(key)

    sources = three()
    assert isinstance(sources.listed, list)
    sources.listed.append(summary(9, state=EpochState.DAMAGED))
    watching(sources, act)


def test_a_filter_is_typed() -> None:
    async def act(screen: Watched) -> None:
        await screen.press("slash", *"aband")
        assert screen.rows == ["03", "nd"]  # below the table is what was typed
        await screen.press("enter")
        assert screen.rows == ["03"]
        assert "/aband: 1 of 3" in screen.lines[0]
        await screen.press("r")  # this is a key of the table again
        await screen.press("slash", "q")  # and this is typed
        assert "/q: 0 of 3" in screen.lines[0]
        await screen.press("escape")
        assert screen.rows == ["03", "02", "01"]
        await screen.press("slash", *"OPEN runtime", "enter")
        assert screen.rows == ["02", "01"]

    watching(three(), act)


def test_the_row_that_is_chosen_stays_chosen() -> None:
    async def act(screen: Watched) -> None:
        table = screen.app.screen.query_one(EpochTable)
        await screen.press("end")
        assert table.chosen == (SPACE, session(3))
        await screen.press("r")
        assert table.chosen == (SPACE, session(3))
        screen.sources.listed = [summary(number) for number in range(6)]
        await screen.look()
        assert table.chosen == (SPACE, session(3))
        screen.sources.listed = [summary(1), summary(2), summary(5)]
        await screen.look()
        assert table.chosen == (SPACE, session(1))  # the one in its place
        screen.sources.listed = []
        await screen.look()
        assert table.chosen is None
        await screen.press("down", "up", "end", "enter")
        assert screen.sources.opened == []

    watching(three(), act)


def test_more_epochs_than_lines() -> None:
    async def act(screen: Watched) -> None:
        table = screen.app.screen.query_one(EpochTable)
        assert screen.rows[0] == "00"
        await screen.press("end")
        assert "000063" in screen.text
        assert table.chosen == (SPACE, session(99))
        await screen.pilot.resize_terminal(60, 15)
        await screen.pilot.pause()
        assert "000063" in screen.text  # still in sight
        await screen.press("pageup", "pageup")
        assert "000063" not in screen.text
        await screen.press("home")
        assert table.chosen == (SPACE, session(0))
        assert max(map(len, screen.lines)) <= 60

    watching(Sources(*(summary(number) for number in range(100))), act)


def test_enter_opens_a_page_and_escape_leaves_it() -> None:
    async def act(screen: Watched) -> None:
        await screen.press("down")
        await screen.open(seen(summary(2, watermark=3), completions=batch([entry(3, "a tool")])))
        assert screen.sources.opened == [(SPACE, session(2))]
        assert screen.lines[0].startswith(f"session {session(2)}")
        assert "a tool" in screen.text
        await screen.press("escape")
        assert screen.rows == ["01", "02", "03"]
        assert screen.sources.closed == 1

    watching(three(), act, size=(100, 40))


def test_a_click_opens_a_page() -> None:
    async def act(screen: Watched) -> None:
        screen.sources.page = seen(summary(3))
        await screen.pilot.click("#epochs", offset=(2, 2))
        await screen.look()
        assert screen.sources.opened == [(SPACE, session(3))]

    watching(three(), act)


def test_the_feed_is_read_on_from_where_it_was() -> None:
    async def act(screen: Watched) -> None:
        first = batch([entry(2, "second")], dropped=1)
        await screen.open(seen(summary(1, watermark=2), completions=first))
        screen.sources.page = seen(summary(1, watermark=2))
        await screen.look()
        screen.sources.page = seen(
            summary(1, watermark=9), completions=batch([entry(9, "ninth")], dropped=8)
        )
        await screen.look()
        assert screen.sources.asked[-1] == 2
        below = screen.text.split("Completions\n")[1].splitlines()
        assert "gap: 1 completion (1) dropped" in below[0]
        assert "second" in below[1]
        assert "gap: 6 completions (3 to 8) dropped before they were read" in below[2]
        assert "ninth" in below[3]

    watching(three(), act, size=(100, 50))


def test_an_epoch_that_vanishes_stays_readable() -> None:
    async def act(screen: Watched) -> None:
        page = seen(
            summary(1, watermark=1),
            participants=[participant(1, Role.RUNTIME)],
            completions=batch([entry(1, "a tool")]),
        )
        await screen.open(page)
        sealed = summary(1, watermark=1, state=EpochState.SEALED)
        screen.sources.listed = []
        screen.sources.page = seen(sealed, place=Place.REMOVED)
        await screen.look()
        assert "Its name is gone from shared memory" in screen.text
        assert "- runtime" in screen.text
        assert "a tool" in screen.text
        await screen.press("escape")
        assert screen.lines[1].startswith("0 epochs")

    watching(three(), act, size=(100, 40))


def test_a_page_of_an_epoch_that_has_gone_already() -> None:
    async def act(screen: Watched) -> None:
        await screen.open(None)
        assert "The session has no epoch in shared memory." in screen.text
        await screen.press("escape")
        assert screen.rows == ["01", "02", "03"]

    watching(three(), act)


def test_an_epoch_that_becomes_damaged() -> None:
    """What was seen of it stays, beside what is wrong with it."""

    async def act(screen: Watched) -> None:
        await screen.open(seen(summary(1, watermark=1), completions=batch([entry(1, "a tool")])))
        screen.sources.page = SegmentCorrupted("the name", "watermark", "at most 3", 2**63)
        await screen.look()
        assert "watermark" in screen.lines[1]
        assert "a tool" in screen.text
        damaged = summary(1, state=EpochState.DAMAGED, problem="its magic is wrong")
        screen.sources.page = seen(damaged)
        await screen.look()
        assert "its magic is wrong" in screen.text

    watching(three(), act, size=(100, 40))


def test_shared_memory_that_cannot_be_listed() -> None:
    async def act(screen: Watched) -> None:
        screen.sources.listed = PermissionError(13, "Permission denied", "/dev/shm")
        await screen.look()
        assert screen.lines[1] == "The epochs cannot be listed: /dev/shm: Permission denied"
        assert screen.rows == ["01", "02", "03"]
        screen.sources.listed = [summary(1)]
        await screen.look()
        assert screen.rows == ["01"]

    watching(three(), act)


def test_hostile_names() -> None:
    async def act(screen: Watched) -> None:
        await screen.open(
            seen(
                summary(1, watermark=2),
                operations=[
                    operation(1, HOSTILE, progress=OperationProgressUpdate(HOSTILE)),
                    operation(2, "日本" * 40),
                ],
                completions=batch([entry(1, HOSTILE), entry(2, "tool", error=HOSTILE)]),
            )
        )
        assert screen.text.count("[red]b[/] \\x1b[31mx\\x07 日") >= 3
        for line in screen.lines:
            assert line.isprintable()
        await screen.press("escape")
        problem = summary(1, state=EpochState.DAMAGED, problem=HOSTILE)
        screen.sources.listed = [problem]
        await screen.look()
        assert "[red]b[/] \\x1b[31mx\\x07 日本" in screen.lines[3]
        assert all(line.isprintable() for line in screen.lines)

    watching(three(), act, size=(200, 50))


def test_any_size() -> None:
    """From nothing fits to more than there is."""

    async def act(screen: Watched) -> None:
        page = seen(
            summary(1, watermark=500),
            participants=[participant(number, Role.WORKER) for number in range(1, 65)],
            operations=[operation(number, f"tool {number}") for number in range(1, 129)],
            completions=batch([entry(seq, f"tool {seq}") for seq in range(1, 501)]),
        )
        for opened in (False, True):
            if opened:
                await screen.open(page)
            for size in ((1, 1), (5, 2), (20, 5), (60, 15), (300, 100), (80, 24)):
                await screen.pilot.resize_terminal(*size)
                await screen.look()
                assert len(screen.lines) == size[1]
                assert max(map(len, screen.lines)) <= size[0]

    watching(three(), act)


def test_only_what_changed_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, int]] = []
    for widget in (Lines, EpochTable):

        def render_line(
            self: Lines | EpochTable, y: int, was: object = widget.render_line
        ) -> object:
            drawn.append((str(self.id), y))
            return was(self, y)  # type: ignore[operator]

        monkeypatch.setattr(widget, "render_line", render_line)

    async def act(screen: Watched) -> None:
        drawn.clear()
        await screen.look(0.0)
        assert drawn == []
        assert isinstance(screen.sources.listed, list)
        screen.sources.listed[1] = summary(2, watermark=30, running=3, age_s=10)
        await screen.look(0.0)
        assert set(drawn) == {("totals", 0), ("epochs", 1)}

    watching(three(), act)


def test_q_ends_it() -> None:
    ended: list[WatchApp] = []

    async def act(screen: Watched) -> None:
        ended.append(screen.app)
        await screen.open(seen(summary(1)))
        await screen.press("q")

    watching(three(), act)
    assert ended[0].return_code == 0


def test_ctrl_c_ends_it_from_the_filter_too() -> None:
    ended: list[WatchApp] = []

    async def act(screen: Watched) -> None:
        ended.append(screen.app)
        await screen.press("slash", "x", "ctrl+c")

    watching(three(), act)
    assert ended[0].return_code == 130
