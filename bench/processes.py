"""Jobs in separate processes, each pinned to a processor."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any, Final

Job = Callable[[], Any]

#: The processors that this process may use.
CPUS: Final = sorted(os.sched_getaffinity(0))
#: Two of them, or the same one twice if there is only one.
APART: Final = (CPUS[0], CPUS[-1])
TOGETHER: Final = (CPUS[0], CPUS[0])

_LIMIT_S: Final = 120.0
_PR_SET_PDEATHSIG: Final = 1
_fork = multiprocessing.get_context("fork")


def together(jobs: Sequence[Job], cpus: Sequence[int] = CPUS) -> list[Any]:
    """Run the jobs at the same time, the n-th on `cpus[n % len(cpus)]`; returns their results.

    They are forked from this process, and have its state. Raises RuntimeError as soon as one fails
    or hangs; no process is left behind.
    """
    with ExitStack() as stack:
        asked: dict[Connection, int] = {}
        for index, job in enumerate(jobs):
            answer, told = _fork.Pipe(duplex=False)
            stack.enter_context(answer)
            child = _fork.Process(
                target=_work, args=(job, cpus[index % len(cpus)], told), daemon=True
            )
            child.start()
            stack.callback(child.join)
            stack.callback(child.kill)
            told.close()
            asked[answer] = index
        answers = _answers(asked)
        return [answers[index] for index in range(len(jobs))]


def meeting(processes: int) -> Callable[[], None]:
    """A function that each of this number of processes calls to wait for the others."""
    barrier = _fork.Barrier(processes)

    def meet() -> None:
        barrier.wait(_LIMIT_S)

    return meet


def _work(job: Job, cpu: int, told: Connection) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setaffinity(0, {cpu})
    told.send(job())


def _answers(asked: dict[Connection, int]) -> dict[int, Any]:
    answers: dict[int, Any] = {}
    deadline = monotonic() + _LIMIT_S
    while len(answers) < len(asked):
        pending = [one for one, index in asked.items() if index not in answers]
        ready = wait(pending, deadline - monotonic())
        if not ready:
            raise RuntimeError(f"a process did not end its job within {_LIMIT_S:.0f} s")
        for one in pending:
            if one in ready:
                try:
                    answers[asked[one]] = one.recv()
                except EOFError:
                    raise RuntimeError(
                        "a process died over its job; see its traceback above"
                    ) from None
    return answers
