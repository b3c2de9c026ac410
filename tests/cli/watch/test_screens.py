"""What is on the screens, at several sizes; each is held against what was looked at once.

To write them anew after a change of what is shown: SHMEPOCH_WRITE_SCREENS=1, and look at the
difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shmepoch.cli.watch.reading import Place
from shmepoch.epoch.operations import OperationProgressUpdate, OperationStatus
from shmepoch.memory.participants import Role
from shmepoch.monitoring.epochs import EpochState
from tests.cli.watch.samples import (
    Sources,
    Watched,
    batch,
    entry,
    operation,
    participant,
    seen,
    summary,
    watching,
)

_SCREENS = Path(__file__).parent / "screens"
SIZES = [(60, 15), (80, 24), (120, 30), (200, 60)]


@pytest.fixture(autouse=True)
def zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shmepoch.cli.watch.page._clock", lambda at_ms: "12:34:56")


def compare(name: str, size: tuple[int, int], screen: Watched) -> None:
    """The screen is what it was."""
    assert all(len(line) <= size[0] for line in screen.lines)
    path = _SCREENS / f"{name}-{size[0]}x{size[1]}.txt"
    shown = screen.text.rstrip("\n") + "\n"
    if os.environ.get("SHMEPOCH_WRITE_SCREENS"):
        path.write_text(shown)
    assert shown == path.read_text()


EVERYONE = {
    Role.RUNTIME: 1,
    Role.AGENT: 1,
    Role.WORKER: 12,
    Role.PERSISTENCE: 1,
    Role.OBSERVER: 2,
}
EPOCHS = (
    summary(1, watermark=12_345, cursors=(12_300, 12_345, 12_344), running=3, dead=1),
    summary(2, watermark=7, participants=EVERYONE, running=128, age_s=90_000),
    summary(3, state=EpochState.ABANDONED, watermark=3, participants={}),
    summary(4, state=EpochState.SEALED, participants={}),
    summary(5, state=EpochState.DAMAGED, problem="corrupted: magic is 0, not " + "9" * 150),
)


async def busy(screen: Watched) -> None:
    """A while in which the first epoch does something, and falls behind in the end."""
    for step in range(1, 20):
        done = 12_345 + step * step
        screen.sources.listed = [
            summary(1, watermark=done, cursors=(12_345 + step, done, done), running=3, dead=1),
            *EPOCHS[1:],
        ]
        await screen.look(2.0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_epochs(size: tuple[int, int]) -> None:
    async def act(screen: Watched) -> None:
        await busy(screen)
        compare("epochs", size, screen)

    watching(Sources(*EPOCHS), act, size=size)


def test_the_epochs_of_every_namespace() -> None:
    async def act(screen: Watched) -> None:
        compare("namespaces", (120, 30), screen)

    sources = Sources(summary(1, namespace="one"), summary(2, namespace="n" * 64))
    watching(sources, act, size=(120, 30), namespace=None)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_epoch(size: tuple[int, int]) -> None:
    of = summary(1, watermark=1200, cursors=(1100, 1200, 1199), running=3, dead=1)
    page = seen(
        of,
        participants=[
            participant(1, Role.RUNTIME),
            participant(2, Role.WORKER),
            participant(3, Role.WORKER, alive=False),
        ],
        operations=[
            operation(1, "index the repository", age_s=3700),
            operation(
                2, "download", age_s=200, progress=OperationProgressUpdate("3 of 4 files", 75)
            ),
            operation(3, "wait", age_s=1, status=OperationStatus.PROVISIONING),
        ],
        completions=batch(
            [
                entry(seq, f"tool {seq}", error="no room" if seq == 1199 else None)
                for seq in range(1150, 1201)
            ],
            dropped=1149,
        ),
    )

    async def act(screen: Watched) -> None:
        await screen.open(page)
        screen.sources.page = seen(
            summary(1, watermark=1201, cursors=(1100, 1201, 1201), running=3),
            participants=[participant(1, Role.RUNTIME), participant(4, Role.AGENT)],
            operations=page.operations,
            completions=batch([entry(1201, "the last tool")], dropped=1149),
        )
        await screen.look(3.0)
        compare("epoch", size, screen)

    watching(Sources(of), act, size=size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_keys(size: tuple[int, int]) -> None:
    async def act(screen: Watched) -> None:
        await screen.press("question_mark")
        compare("keys", size, screen)
        await screen.press("escape")
        assert "shmepoch watch" in screen.text

    watching(Sources(*EPOCHS), act, size=size)


@pytest.mark.parametrize(
    ("place", "state", "said"),
    [
        (Place.NAMED, EpochState.OPEN, None),
        (Place.NAMED, EpochState.SEALED, "Its runtime has ended it"),
        (Place.NAMED, EpochState.ABANDONED, "No process is at work in it"),
        (Place.REMOVED, EpochState.SEALED, "Its name is gone from shared memory"),
        (Place.REPLACED, EpochState.SEALED, "The session has a later epoch"),
    ],
)
def test_what_became_of_an_epoch(place: Place, state: EpochState, said: str | None) -> None:
    async def act(screen: Watched) -> None:
        completions = batch([entry(1, "a tool")])
        await screen.open(seen(summary(1, watermark=1), completions=completions))
        screen.sources.page = seen(summary(1, watermark=1, state=state), place=place)
        await screen.look()
        assert screen.lines[1].startswith(said or "Cursors")
        assert "a tool" in screen.text

    watching(Sources(summary(1)), act)
