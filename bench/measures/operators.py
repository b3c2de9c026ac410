"""(k) What the commands for operators take where there are many epochs."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Final

import shmepoch
from bench.contestants import SHMEPOCH
from bench.harness import Contestant, Measure, Sample, Skipped, goal
from bench.work import LITTLE, operate, specified
from shmepoch import (
    OperationId,
    OpsLifecycleConfig,
    RuntimeEpochId,
    SessionId,
    SessionRuntimeBindings,
    SharedMemoryExhausted,
)
from shmepoch.memory.namespaces import list_sessions, segment_path
from shmepoch.memory.segment import SharedSegment

DEFAULT_SIZE: Final = f"{SHMEPOCH}, epochs of the default size"


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, among so many epochs."""
    # As an installation does: a checkout's modules may never have been imported before.
    compileall.compile_dir(Path(shmepoch.__file__).parent, quiet=1)
    little = populated(stack, count, LITTLE)
    yield Measure(
        f"list {count:,} epochs",
        [
            Contestant(SHMEPOCH, command("ls", "--json", "--namespace", little)),
            _of_default_size(stack, count),
            goal("2 s", 2.0),
        ],
    )
    yield Measure(
        f"judge {count:,} epochs for removal",
        [
            Contestant(SHMEPOCH, command("gc", "--dry-run", "--json", "--namespace", little)),
            goal("2 s", 2.0),
        ],
    )


def _of_default_size(stack: ExitStack, count: int) -> Contestant | Skipped:
    try:
        namespace = populated(stack, count, OpsLifecycleConfig())
    except SharedMemoryExhausted as error:
        return Skipped(DEFAULT_SIZE, str(error))
    return Contestant(DEFAULT_SIZE, command("ls", "--json", "--namespace", namespace))


def populated(stack: ExitStack, count: int, config: OpsLifecycleConfig) -> str:
    """A namespace with so many abandoned epochs, removed with `stack`. In each, one operation has
    ended and one runs."""
    namespace = f"bench-{os.getpid()}-{config.max_operations}"
    stack.callback(_remove, namespace)
    for _ in range(count):
        segment = SharedSegment.allocate(
            namespace, config, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
        )
        segment.publish()
        bindings = SessionRuntimeBindings.of_segment(segment)
        operate(bindings, "done")
        id = OperationId.new()
        bindings.ops_lifecycle.register_operation(specified(id, bindings))
        bindings.ops_lifecycle.provisioning_succeeded(id)
        bindings.close()
    return namespace


def _remove(namespace: str) -> None:
    for session_id in list_sessions(namespace):
        segment_path(namespace, session_id).unlink()


def command(*arguments: str) -> Sample:
    """The whole process of a command, which has to succeed."""

    def sample() -> float:
        began = perf_counter()
        subprocess.run(
            [sys.executable, "-m", "shmepoch", *arguments], stdout=subprocess.DEVNULL, check=True
        )
        return perf_counter() - began

    return sample
