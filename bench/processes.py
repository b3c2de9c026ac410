"""Jobs in processes of their own, each pinned to a processor."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, Final

Job = Callable[[], Any]

#: The processors that this process may use.
CPUS: Final = sorted(os.sched_getaffinity(0))
#: Two of them, the same one twice where there is only one.
APART: Final = (CPUS[0], CPUS[-1])
TOGETHER: Final = (CPUS[0], CPUS[0])

_LIMIT_S: Final = 120.0
_PR_SET_PDEATHSIG: Final = 1
_fork = multiprocessing.get_context("fork")


def together(jobs: Sequence[Job], cpus: Sequence[int] = CPUS) -> list[Any]:
    """What each job returned; all ran at the same time, the n-th on `cpus[n % len(cpus)]`.

    They are forked: what this process has, they have. RuntimeError if one fails or hangs.
    """
    with ExitStack() as stack:
        answers: list[Connection] = []
        for index, job in enumerate(jobs):
            answer, told = _fork.Pipe(duplex=False)
            child = _fork.Process(
                target=_work, args=(job, cpus[index % len(cpus)], told), daemon=True
            )
            child.start()
            stack.callback(child.join)
            stack.callback(child.kill)
            told.close()
            answers.append(answer)
        return [_answer(answer) for answer in answers]


def _work(job: Job, cpu: int, told: Connection) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setaffinity(0, {cpu})
    told.send(job())


def _answer(connection: Connection) -> Any:
    with connection:
        if not connection.poll(_LIMIT_S):
            raise RuntimeError(f"a process did not end its job within {_LIMIT_S:.0f} s")
        try:
            return connection.recv()
        except EOFError:
            raise RuntimeError("a process died over its job; see its traceback above") from None
