"""The `shmepoch` command with a child that is killed at a chosen point, once.

Runs as `python -m tests.cli.faulty`. The environment has FAULT, and FAULT_MARKER, a file that says
that it has happened. A spawned child imports its parent's main module: there it is installed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shmepoch.cli import main
from shmepoch.cli.run.transcript import Transcript
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.ids import RuntimeEpochId
from shmepoch.runtime.boundary import AgentBoundary, Drain, Notice


def die() -> None:
    """Write the marker, and be killed."""
    Path(os.environ["FAULT_MARKER"]).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: type, name: str) -> None:
    """Die when the method is called."""
    method = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        die()
        return method(*args, **kwargs)

    setattr(owner, name, dying)


def after(owner: type, name: str) -> None:
    """Die when the method has done its work."""
    method = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        die()
        return result

    setattr(owner, name, dying)


def agent_in_its_second_turn() -> None:
    """The first turn needs no message; the second one comes from a continuation."""
    drain, turns = AgentBoundary.drain, [0]

    def dying(self: AgentBoundary) -> Drain:
        turns[0] += 1
        if turns[0] == 2:
            die()
        return drain(self)

    AgentBoundary.drain = dying  # type: ignore[method-assign]


def agent_with_notices() -> None:
    """Its notices are on the disk, and not committed."""
    append = Transcript.append

    def dying(self: Transcript, epoch_id: RuntimeEpochId, notices: Iterable[Notice]) -> None:
        kept = list(notices)
        append(self, epoch_id, kept)
        if kept:
            die()

    Transcript.append = dying  # type: ignore[method-assign]


def agent_in_the_middle_of_a_line() -> None:
    """Half of the notices are on the disk, and the last line is incomplete."""
    append = Transcript.append

    def dying(self: Transcript, epoch_id: RuntimeEpochId, notices: Iterable[Notice]) -> None:
        kept = list(notices)
        begin = self._file.tell()
        append(self, epoch_id, kept)
        if kept:
            self._file.truncate(self._file.tell() - (self._file.tell() - begin) // 2)
            die()

    Transcript.append = dying  # type: ignore[method-assign]


def agent_that_forgets() -> None:
    """Its first notices do not reach its transcript, and it commits all the same."""
    append = Transcript.append

    def forgetting(self: Transcript, epoch_id: RuntimeEpochId, notices: Iterable[Notice]) -> None:
        kept = list(notices)
        if kept and not Path(os.environ["FAULT_MARKER"]).exists():
            Path(os.environ["FAULT_MARKER"]).touch()
            kept = []
        append(self, epoch_id, kept)

    Transcript.append = forgetting  # type: ignore[method-assign]


def commit() -> None:
    """The cursor has moved, and the runtime was not told."""
    after(Drain, "commit")


_registry = RuntimeOpsLifecycleRegistry
FAULTS: dict[str, Callable[[], None]] = {
    "agent-told-to-take-a-turn": agent_in_its_second_turn,
    "agent-wrote-half-a-line": agent_in_the_middle_of_a_line,
    "agent-wrote": agent_with_notices,
    "agent-committed": commit,
    "worker-assigned": lambda: before(_registry, "register_operation"),
    "worker-registered": lambda: after(_registry, "register_operation"),
    "worker-started": lambda: after(_registry, "provisioning_succeeded"),
    "worker-ran": lambda: before(_registry, "complete_operation"),
    "worker-completed": lambda: after(_registry, "complete_operation"),
}

#: Faults that lose a notice.
LOSSES: dict[str, Callable[[], None]] = {"agent-forgets": agent_that_forgets}

if __name__ == "__mp_main__" and not Path(os.environ["FAULT_MARKER"]).exists():
    (FAULTS | LOSSES)[os.environ["FAULT"]]()
elif __name__ == "__main__":
    main()
