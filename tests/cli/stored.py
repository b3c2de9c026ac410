"""The contents of a run's store, and how often its commands ran."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from shmepoch.cli.run.plan import RUNS
from shmepoch.epoch.operations import OperationStatus, status_of
from shmepoch.ids import SessionId
from shmepoch.stores import HistoryEntry, SqliteRuntimeStore
from tests.support import eventually


def sessions(path: Path) -> list[SessionId]:
    """The sessions of the runs in a store."""
    with SqliteRuntimeStore(path) as store:
        return [session for session in store.sessions() if session != RUNS]


def history(path: Path) -> list[HistoryEntry]:
    """Every completion of every session of the runs in a store."""
    with SqliteRuntimeStore(path) as store:
        return [item for session in sessions(path) for item in store.history(session)]


def with_status(path: Path, *statuses: OperationStatus) -> list[str]:
    """The commands that ended with one of these statuses in the store, once for each end."""
    return [
        item.entry.display_name
        for item in history(path)
        if status_of(item.entry.terminal_outcome) in statuses
    ]


def applied(path: Path) -> list[int]:
    """The stored cursor of each session's agent."""
    with SqliteRuntimeStore(path) as store:
        loaded = [store.load(session) for session in sessions(path)]
        return [one.cursors.agent_applied_cursor for one in loaded if one is not None]


def commands(folder: Path, count: int, body: str = "sleep 0.1") -> list[str]:
    """Commands that first write to `folder` that they run."""
    return [f"echo {number} >>{folder}/ran; {body}" for number in range(count)]


def ran(folder: Path, commands: list[str]) -> Counter[str]:
    """How often each command has begun."""
    said = folder / "ran"
    numbers = said.read_text().split() if said.exists() else []
    return Counter(commands[int(number)] for number in numbers)


def until_ran(folder: Path, commands: list[str], count: int) -> None:
    """Wait until commands have begun `count` times."""
    eventually(lambda: ran(folder, commands).total() >= count, within=60)
