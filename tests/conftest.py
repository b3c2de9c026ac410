"""Every test has its own namespace and leaves nothing behind: no segment, process or thread."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from importlib.metadata import version

import psutil
import pytest

from shmepoch.memory.files import SHM_DIR
from tests.support import eventually

#: multiprocessing keeps these for its own life; they are not of any one test.
_KEPT_PROCESSES = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")


def pytest_report_header() -> str:
    return f"shmepoch {version('shmepoch')}, {os.cpu_count()} processors"


def shm_descriptors() -> list[str]:
    """What this process has open in /dev/shm."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        if target.startswith(str(SHM_DIR)):
            found.append(target)
    return found


def leftovers(namespace: str, threads: set[threading.Thread]) -> list[str]:
    """What a test left behind, in words."""
    segments = [str(path) for path in SHM_DIR.glob(f"shmepoch.{namespace}.*")]
    processes = []
    for child in psutil.Process().children(recursive=True):
        try:
            command = " ".join(child.cmdline())
            if not any(kept in command for kept in _KEPT_PROCESSES):
                processes.append(f"process {child.pid} ({child.status()}): {command}")
        except psutil.NoSuchProcess:
            continue
    new = [f"thread {thread.name}" for thread in threading.enumerate() if thread not in threads]
    return segments + processes + new


@pytest.fixture(autouse=True)
def namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A namespace of the test's own, in the environment too; afterwards nothing is left of it."""
    name = f"t-{uuid.uuid4().hex[:16]}"
    monkeypatch.setenv("SHMEPOCH_NAMESPACE", name)
    threads = set(threading.enumerate())
    open_before = sorted(shm_descriptors())
    yield name
    left: list[str] = []

    def clean() -> bool:
        left[:] = leftovers(name, threads)
        return not left

    try:
        eventually(clean, within=5.0)
    except AssertionError:
        for path in SHM_DIR.glob(f"shmepoch.{name}.*"):
            path.unlink()
        pytest.fail(f"left behind: {', '.join(left)}")
    assert sorted(shm_descriptors()) == open_before, "descriptors in /dev/shm left open"
