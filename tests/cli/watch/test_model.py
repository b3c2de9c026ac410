"""What the screens are made of, without a screen: figures, lines, and what is remembered."""

from __future__ import annotations

import pytest

from shmepoch.cli.watch import text
from shmepoch.cli.watch.columns import COLUMNS, Fitted, Sort
from shmepoch.cli.watch.epochs import Epochs
from shmepoch.cli.watch.history import STEP_S, STEPS, History
from shmepoch.cli.watch.page import FEED_LINES, Page
from shmepoch.cli.watch.text import Tone, plain
from shmepoch.memory.participants import Role
from shmepoch.monitoring.epochs import EpochState
from tests.cli.watch.samples import (
    NOW_MS,
    SPACE,
    batch,
    entry,
    participant,
    seen,
    session,
    summary,
)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.number(0), "0"),
        (text.number(9_999_999), "9,999,999"),
        (text.number(10_000_000), "10.0M"),
        (text.number(2**64 - 1), "18.4E"),
        (text.rate(0), "0"),
        (text.rate(0.04), "<0.1/s"),
        (text.rate(0.25), "0.2/s"),
        (text.rate(1234.5), "1,234/s"),
        (text.size(0), "0 B"),
        (text.size(999), "999 B"),
        (text.size(1000), "1.0 KB"),
        (text.size(28 * 1024), "28 KB"),
        (text.size(2**40), "1.0 TB"),
        (text.duration(-5), "0s"),
        (text.duration(59_999), "59s"),
        (text.duration(185_000), "3m05s"),
        (text.duration(90_000_000), "1d01h"),
        (text.took(812), "812 ms"),
        (text.took(20_477), "20.5 s"),
        (text.took(3_600_000), "1h00m"),
    ],
)
def test_figures(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("given", "width", "expected"),
    [
        ("abc", 5, "abc  "),
        ("abcdef", 5, "abcd…"),
        ("日本日本", 5, "日本…"),
        ("日本日本", 4, "日 …"),
        ("abc", 1, "…"),
        ("abc", 0, ""),
    ],
)
def test_a_text_in_so_many_cells(given: str, width: int, expected: str) -> None:
    assert text.fitted(given, width) == expected


def test_a_bar_shows_that_there_is_something() -> None:
    assert plain(text.bar(0, 10, 4)) == "────"
    assert plain(text.bar(1, 10_000, 4)) == "╸───"
    assert plain(text.bar(5, 10, 4)) == "━━──"
    assert plain(text.bar(10, 10, 4)) == plain(text.bar(11, 10, 4)) == "━━━━"
    assert plain(text.bar(-1, 10, 4)) == plain(text.bar(1, 0, 4)) == "────"
    assert plain(text.bar(1, 2, 0)) == ""


def test_a_sparkline_tells_nothing_from_a_little_and_from_what_is_unknown() -> None:
    assert text.sparkline([0, 1, 100, None, 50], 6) == " ▁▂█ ▅"
    assert text.sparkline([0, 0], 2) == "▁▁"
    assert text.sparkline([3, 2, 1], 2) == "█▅"
    assert text.sparkline([], 3) == "   "
    assert text.sparkline([1], 0) == ""


def test_a_history_is_of_the_last_minute() -> None:
    history = History()
    for second in range(200):
        history.add(float(second), watermark=second * 10, lag=second)
    assert len(history.lags) == STEPS
    assert history.lags[-1] == 199
    assert history.rates[:-1] == [10.0] * (STEPS - 1)
    assert history.rate == 10.0


def test_a_history_has_gaps_where_nobody_looked() -> None:
    history = History()
    history.add(0.0, 0, 1)
    history.add(STEP_S * 3, 30, 2)
    assert history.lags == [1, None, None, 2]
    history.add(STEP_S * 1000, 30, 3)
    assert history.lags == [None] * (STEPS - 1) + [3]


def test_one_completion_in_a_moment_is_no_high_rate() -> None:
    history = History()
    history.add(0.0, 0, 0)
    history.add(0.01, 1, 0)
    assert history.rate == 1.0


def test_another_epoch_of_a_session_has_a_history_of_its_own() -> None:
    epochs = Epochs()
    epochs.update([summary(1, watermark=100, cursors=(0, 0, 0))], 0.0, NOW_MS)
    epochs.update([summary(1, watermark=0, epoch=2)], 1.0, NOW_MS)
    (row,) = epochs.rows.values()
    assert row.history.lags == [0]


@pytest.mark.parametrize("column", [column.name for column in COLUMNS])
def test_every_column_sorts(column: str) -> None:
    """Those that are damaged are first, one way round and the other."""
    epochs = Epochs()
    known = [
        summary(number, namespace=f"n{number % 2}", watermark=number * 7 % 5, age_s=number)
        for number in range(1, 8)
    ]
    epochs.update([*known, summary(9, state=EpochState.DAMAGED)], 0.0, NOW_MS)
    for sort in (Sort.by(column), Sort.by(column).reversed()):
        first, *others = epochs.chosen("", sort)
        assert first.damaged
        assert len(others) == 7
        assert sort.clicked(column) == sort.reversed()


@pytest.mark.parametrize(
    ("filter", "found"),
    [
        ("", {1, 2, 3}),
        ("OPEN", {1, 2}),
        (str(session(2))[:8], {2}),
        ("worker open", {2}),
        ("dead", {1}),
        ("magic", {3}),
        ("nothing", set()),
    ],
)
def test_filters(filter: str, found: set[int]) -> None:
    epochs = Epochs()
    epochs.update(
        [
            summary(1, dead=1),
            summary(2, participants={Role.WORKER: 2}),
            summary(3, state=EpochState.DAMAGED),
        ],
        0.0,
        NOW_MS,
    )
    rows = epochs.chosen(filter, Sort())
    assert {row.summary.session_id for row in rows} == {session(number) for number in found}


@pytest.mark.parametrize("namespaces", [False, True])
def test_columns_fit_every_width(namespaces: bool) -> None:
    """A wider terminal never shows fewer of them."""
    epochs = Epochs()
    epochs.update([summary(1), summary(2, state=EpochState.DAMAGED)], 0.0, NOW_MS)
    before: set[str] = set()
    for width in range(250):
        fitted = Fitted.to(width, namespaces=namespaces)
        names = {column.name for column, _ in fitted.columns}
        assert before <= names
        before = names
        for column in COLUMNS:
            assert len(plain(fitted.heading(Sort(column.name)))) <= width
        for row in epochs.rows.values():
            assert len(plain(fitted.row(row, width))) <= width
    assert before == {column.name for column in COLUMNS} - (set() if namespaces else {"namespace"})


def test_a_click_finds_the_column_that_is_there() -> None:
    fitted = Fitted.to(100, namespaces=False)
    heading = plain(fitted.heading(Sort("age")))
    assert fitted.column_at(0) == "session"
    assert fitted.column_at(heading.index("watermark")) == "watermark"
    assert fitted.column_at(len(heading) - 1) == "age"
    assert fitted.column_at(500) is None


def page_of() -> Page:
    return Page((SPACE, session(1)))


def feed(page: Page, most: int = 10) -> list[str]:
    return [plain(line) for line in page.feed(100, most)]


def test_a_gap_is_told_as_a_gap() -> None:
    page = page_of()
    page.update(seen(summary(1), completions=batch([entry(5, "five")], dropped=4)), 0.0, NOW_MS)
    assert "gap: 4 completions (1 to 4) dropped" in feed(page)[0]
    page.update(seen(summary(1), completions=batch([entry(9, "nine")], dropped=7)), 1.0, NOW_MS)
    assert "gap: 2 completions (6 to 7) dropped before they were read" in feed(page)[2]
    assert "gap: 1 completion (8) not shown: too many at once" in feed(page)[3]
    assert "nine" in feed(page)[4]
    nothing = batch([], dropped=20, watermark=20)
    page.update(seen(summary(1), completions=nothing), 2.0, NOW_MS)
    assert "gap: 11 completions (10 to 20) dropped" in feed(page)[5]
    assert page.read_through == 20


def test_the_feed_keeps_its_last_lines() -> None:
    page = page_of()
    entries = [entry(seq, str(seq)) for seq in range(1, 2 * FEED_LINES)]
    page.update(seen(summary(1), completions=batch(entries)), 0.0, NOW_MS)
    assert len(feed(page, 10 * FEED_LINES)) == FEED_LINES
    assert feed(page, 1)[0].split()[0] == str(2 * FEED_LINES - 1)
    assert feed(page, 0) == [plain(line) for line in page.feed(100, 0)]


def test_participants_that_come_and_go() -> None:
    page = page_of()
    worker = participant(2, Role.WORKER)

    def shown(now: float, *found: object) -> list[str]:
        page.update(
            seen(summary(1), participants=found),  # type: ignore[arg-type]
            now,
            NOW_MS,
        )
        return [plain(line).split()[0] for line in page.participants(100, 10)]

    assert shown(0.0, participant(1, Role.RUNTIME)) == ["●"]
    assert shown(1.0, participant(1, Role.RUNTIME), worker) == ["●", "+"]
    assert shown(10.0, participant(1, Role.RUNTIME), worker) == ["●", "+"]
    assert shown(30.0, participant(1, Role.RUNTIME), worker) == ["●", "●"]
    dead = participant(2, Role.WORKER, alive=False)
    assert shown(31.0, participant(1, Role.RUNTIME), dead) == ["●", "✗"]
    assert shown(90.0, participant(1, Role.RUNTIME), dead) == ["●", "✗"]  # as long as it is there
    assert shown(91.0, participant(1, Role.RUNTIME)) == ["●", "-"]
    assert shown(120.0, participant(1, Role.RUNTIME)) == ["●"]
    again = participant(3, Role.WORKER, slot=2)
    assert shown(121.0, participant(1, Role.RUNTIME), again) == ["●", "+"]


def test_a_participant_that_was_dead_when_it_was_seen_first() -> None:
    page = page_of()
    dead = participant(2, Role.WORKER, alive=False)
    page.update(seen(summary(1), participants=[dead]), 0.0, NOW_MS)
    assert plain(page.participants(100, 10)[0]).startswith("✗ worker")


def test_a_cursor_that_is_ahead_of_the_feed() -> None:
    page = page_of()
    page.update(seen(summary(1, watermark=5, cursors=(2**64 - 1, 5, 4))), 0.0, NOW_MS)
    applied, observed, injected = page.cursors(100)[1:]
    assert "18.4E ahead" in plain(applied)
    assert (plain(observed)[-10:], applied[-1][1]) == ("up to date", Tone.BAD)
    assert plain(injected).endswith("1 behind")


@pytest.mark.parametrize(
    ("held", "broken_off", "said"),
    [
        (False, False, "writer lock free"),
        (True, False, "writer lock held for 9s: stopped?"),
        (False, True, "a writer died in a transition"),
    ],
)
def test_what_the_writer_does(held: bool, broken_off: bool, said: str) -> None:
    page = page_of()
    for now in (0.0, 9.0):
        one = seen(summary(1), writer_held=held, broken_off=broken_off)
        page.update(one, now, NOW_MS)
    assert said in plain(page.room(100)[-1])


def test_more_than_there_is_room_for() -> None:
    page = page_of()
    found = [participant(number, Role.WORKER) for number in range(1, 31)]
    page.update(seen(summary(1), participants=found), 0.0, NOW_MS)
    lines = page.participants(100, 5)
    assert len(lines) == 5
    assert plain(lines[-1]) == "and 26 more"
