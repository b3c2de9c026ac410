"""The checks that end every test: each of them can fail."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from shmepoch.memory.files import SHM_DIR
from tests.conftest import leftovers, shm_descriptors


def test_a_segment_is_found(namespace: str) -> None:
    path = SHM_DIR / f"shmepoch.{namespace}.left"
    path.touch()
    assert leftovers(namespace, set(threading.enumerate())) == [str(path)]
    path.unlink()


def test_a_process_is_found(namespace: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = leftovers(namespace, set(threading.enumerate()))
    assert [f"process {child.pid} " in line for line in found] == [True]
    child.communicate()


def test_a_thread_is_found(namespace: str) -> None:
    before, go_on = set(threading.enumerate()), threading.Event()
    thread = threading.Thread(target=go_on.wait, name="left")
    thread.start()
    assert leftovers(namespace, before) == ["thread left"]
    go_on.set()
    thread.join()


def test_a_descriptor_is_found() -> None:
    before = shm_descriptors()
    fd = os.open(SHM_DIR, os.O_TMPFILE | os.O_RDWR)
    assert len(shm_descriptors()) == len(before) + 1
    os.close(fd)
