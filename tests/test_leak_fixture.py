"""The leak fixture finds leaks, names them and fails the test that made them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.leaks import Held, left_behind

pytest_plugins = ["pytester"]

_ROOT = Path(__file__).parents[1]

_LEAKING = """
import os
import subprocess
import threading
from pathlib import Path

import pytest

children = []
segments = []


def test_segment(namespace):
    segments.append(Path(f"/dev/shm/shmepoch.{namespace}.{'0' * 32}"))
    segments[0].touch()


def test_segment_of_a_derived_namespace(namespace):
    segments.append(Path(f"/dev/shm/shmepoch.{namespace}-b.{'0' * 32}"))
    segments[1].touch()


def test_child():
    children.append(subprocess.Popen(["sleep", "600"]))


def test_zombie():
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", ": defunct"], os.environ)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_orphan():
    subprocess.run(["sh", "-c", "sleep 601 >/dev/null 2>&1 &"], check=True)


def test_thread():
    threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()


def test_descriptor():
    os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)


def test_that_comes_after():
    assert not any(segment.exists() for segment in segments)
    assert all(child.poll() is not None for child in children)


def test_that_failed():
    os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    pytest.fail("for another reason")
"""

_CLEAN = """
import multiprocessing
import os
import subprocess
from pathlib import Path


class Cycle:
    def __init__(self):
        self.me = self
        self.fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)

    def __del__(self):
        os.close(self.fd)


def test_garbage():
    Cycle()


def test_helper_processes_and_arenas_of_multiprocessing():
    context = multiprocessing.get_context("forkserver")
    context.Value("i")
    child = context.Process(target=os.getpid)
    child.start()
    child.join()


def test_segment_removed(namespace):
    path = Path(f"/dev/shm/shmepoch.{namespace}.{'0' * 32}")
    path.touch()
    path.unlink()


def test_child_waited_for():
    subprocess.run(["true"], check=True)
"""


@pytest.fixture
def guarded(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A place for tests that run under this suite's conftest."""
    monkeypatch.setenv("PYTHONPATH", str(_ROOT))
    pytester.makeconftest(
        """
        from tests import conftest

        conftest.PATIENCE_S = 0.5
        """
    )
    return pytester


def _run(guarded: pytest.Pytester, tests: str) -> pytest.RunResult:
    guarded.makepyfile(tests)
    return guarded.runpytest_subprocess("-p", "tests.conftest")


def test_each_leak_is_an_error_that_names_it(guarded: pytest.Pytester) -> None:
    result = _run(guarded, _LEAKING)
    result.assert_outcomes(passed=8, errors=7, failed=1)
    for test, leak in (
        ("test_segment", "segment /dev/shm/shmepoch.t-????????????????.0*0"),
        (
            "test_segment_of_a_derived_namespace",
            "segment /dev/shm/shmepoch.t-????????????????-b.0*0",
        ),
        ("test_child", "process * (sleeping): sleep 600"),
        ("test_zombie", "process * (zombie): sh"),
        ("test_orphan", "process * (sleeping): sleep 601"),
        ("test_thread", "thread forgotten"),
        ("test_descriptor", "descriptor * of /dev/shm/#* (deleted)"),
    ):
        result.stdout.fnmatch_lines([f"*ERROR at teardown of {test} *", "left behind:", leak])


def test_what_is_nobodys_leak_passes(guarded: pytest.Pytester) -> None:
    _run(guarded, _CLEAN).assert_outcomes(passed=4)


def test_what_is_about_to_end_is_waited_for(namespace: str) -> None:
    before = Held.now(namespace)
    ending = threading.Thread(target=time.sleep, args=(0.1,))
    ending.start()
    assert not left_behind(before, namespace, patience=60)
    assert not ending.is_alive()


def test_what_was_there_before_is_not_left_behind(namespace: str) -> None:
    segment = Path(f"/dev/shm/shmepoch.{namespace}.{'0' * 32}")
    segment.touch()
    before = Held.now(namespace)
    assert segment in before.segments
    assert not left_behind(before, namespace, patience=0)
    segment.unlink()
