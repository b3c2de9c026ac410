"""Leaks of a test: segments, processes, threads, descriptors of shared memory."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil

_SHM = Path("/dev/shm")
#: multiprocessing keeps these open for its own Values and Arrays, for the life of the process.
_ARENA = f"{_SHM}/pym-"
#: Processes from before the tests do not belong to them. To check them takes longer than most
#: tests.
_OTHERS = frozenset(psutil.pids()) - {os.getpid()}


@dataclass(frozen=True)
class Held:
    """The resources of each kind that this process holds at one moment."""

    segments: frozenset[Path]
    processes: frozenset[psutil.Process]
    threads: frozenset[threading.Thread]
    descriptors: frozenset[tuple[int, str]]

    @classmethod
    def now(cls, namespace: str) -> Held:
        """List everything; `namespace` says which segments and which orphans are ours."""
        return cls(
            segments=frozenset(_SHM.glob(f"shmepoch.{namespace}*")),
            processes=_processes(namespace),
            threads=frozenset(threading.enumerate()),
            descriptors=_descriptors(),
        )

    def beyond(self, before: Held) -> Held:
        """The resources that are new since `before`."""
        return Held(
            segments=self.segments - before.segments,
            processes=self.processes - before.processes,
            threads=self.threads - before.threads,
            descriptors=self.descriptors - before.descriptors,
        )

    def __bool__(self) -> bool:
        return any((self.segments, self.processes, self.threads, self.descriptors))

    def __str__(self) -> str:
        return "\n".join(
            [f"segment {path}" for path in sorted(self.segments)]
            + [f"process {_describe(process)}" for process in self.processes]
            + [f"thread {thread.name}" for thread in self.threads]
            + [f"descriptor {fd} of {target}" for fd, target in sorted(self.descriptors)]
        )

    def clean_up(self) -> None:
        """End and remove as much as possible, so that one test's leak does not affect the next
        ones."""
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes, timeout=10)
        for path in self.segments:
            path.unlink(missing_ok=True)


def left_behind(before: Held, namespace: str, *, patience: float) -> Held:
    """The resources that are new since `before`; waits up to `patience` seconds until there are
    none.

    Threads and processes may take a moment to end. Objects that are reachable only through
    reference cycles do not count.
    """
    deadline = time.monotonic() + patience
    left = Held.now(namespace).beyond(before)
    if left:
        gc.collect()
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = Held.now(namespace).beyond(before)
    return left


def _processes(namespace: str) -> frozenset[psutil.Process]:
    """This process's descendants, zombies included, and orphans started in `namespace`.

    An orphan is no longer a descendant, but its program inherited the test's environment. An orphan
    that was forked without an exec is not found.
    """
    mark = f"SHMEPOCH_NAMESPACE={namespace}\0".encode()
    helpers, parents, found = _helper_pids(), dict[int, int](), set[int]()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or (pid := int(entry)) in _OTHERS:
            continue
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            # The name, in parentheses, may hold anything.
            parents[pid] = int(_read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[1])
            if mark in _read(f"/proc/{pid}/environ"):
                found.add(pid)
    found |= {pid for pid in parents if _descends(pid, parents)}
    processes = set()
    for pid in found - helpers - {os.getpid()}:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.add(psutil.Process(pid))
    return frozenset(processes)


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


def _helper_pids() -> set[int]:
    """The helper processes of multiprocessing, which has no public way to get their ids."""
    server = getattr(forkserver, "_forkserver")._forkserver_pid  # noqa: B009 # not in the stubs
    tracker = getattr(resource_tracker, "_resource_tracker")._pid  # noqa: B009
    return {pid for pid in (server, tracker) if pid is not None}


def _descriptors() -> frozenset[tuple[int, str]]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own, or closed meanwhile
            target = str(entry.readlink())
            if target.startswith(f"{_SHM}/") and not target.startswith(_ARENA):
                found.add((int(entry.name), target))
    return frozenset(found)


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({process.status()}): {' '.join(process.cmdline())}"
    except psutil.ZombieProcess:
        return f"{process.pid} (zombie): {process.name()}"
    except psutil.NoSuchProcess:
        return f"{process.pid} (gone by now)"
