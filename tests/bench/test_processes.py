"""Jobs in separate processes: their answers, their failures, and that none is left."""

from __future__ import annotations

import multiprocessing
import os
import signal

import psutil
import pytest

from bench.processes import CPUS, meeting, together
from tests.bench.leftovers import children
from tests.support import eventually


def is_running(pid: int) -> bool:
    """Whether the process has not ended, reaped or not."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def fail() -> None:
    """A job that fails; its traceback goes to the tests' output."""
    raise ValueError("on purpose")


def test_answers_come_in_the_order_of_the_jobs() -> None:
    answered = multiprocessing.Value("i", 0)

    def late() -> str:
        # Its own process has ended, so the other's answer is there already.
        eventually(lambda: answered.value and not is_running(answered.value))
        return "late"

    def early() -> str:
        answered.value = os.getpid()
        return "early"

    assert together([late, early]) == ["late", "early"]


def test_each_job_is_pinned_to_a_processor_in_turn() -> None:
    jobs = [lambda: os.sched_getaffinity(0)] * (len(CPUS) + 1)

    assert together(jobs) == [{cpu} for cpu in [*CPUS, CPUS[0]]]


@pytest.mark.parametrize("ending", [fail, lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_a_job_that_fails_is_told_at_once_and_ends_the_others(ending: object) -> None:
    def patient() -> None:
        signal.pause()

    before = children()

    with pytest.raises(RuntimeError, match="died over its job"):
        together([patient, ending])  # type: ignore[list-item]

    assert children() <= before


def test_those_who_meet_wait_for_each_other() -> None:
    came = multiprocessing.Value("i", 0)
    meet = meeting(2)

    def come() -> int:
        with came:
            came.value += 1
        meet()
        return int(came.value)

    assert together([come, come]) == [2, 2]


def test_no_process_is_left() -> None:
    before = children()

    pids = together([os.getpid, os.getpid])

    assert len({*pids, os.getpid()}) == 3
    assert children() <= before
