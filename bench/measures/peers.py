"""(i) An operation while another process works in the same epoch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from threading import Event, Thread
from time import perf_counter, sleep
from typing import Final

from bench.contestants import SHMEPOCH
from bench.harness import Contestant, Measure, Sample
from bench.processes import meeting, together
from bench.work import epoch, operate
from shmepoch import SessionRuntimeBindings

_CONTENT: Final = "x" * 100
#: The pause before each timed operation, so that it comes at a random moment of the peer's work.
#: Without it, most operations would come while the peer does something else, and few would wait.
_PACE_S: Final = 1e-3


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for `count` operations in each sample."""
    bindings = epoch(stack)
    write = partial(operate, bindings, _CONTENT)
    yield Measure(
        "operation, p90, beside a writer whose process has a busy thread",
        [
            Contestant(SHMEPOCH, _beside(bindings, [write, _calculate], count)),
            Contestant("beside a writer alone", _beside(bindings, [write], count)),
            Contestant("beside nobody", _beside(bindings, [], count)),
        ],
    )


def _calculate() -> None:
    """Calculate: it releases the interpreter lock only after another thread has waited for the
    switch interval."""
    for _ in range(10_000):
        pass


def _beside(
    bindings: SessionRuntimeBindings, threads: list[Callable[[], object]], count: int
) -> Sample:
    """The 90th percentile of the seconds for an operation, beside one process with these
    threads."""

    def sample() -> float:
        meet = meeting(2)

        def measuring() -> list[float]:
            times = []
            meet()
            for _ in range(count):
                sleep(_PACE_S)
                began = perf_counter()
                operate(bindings, _CONTENT)
                times.append(perf_counter() - began)
            meet()
            return times

        def working() -> None:
            over = Event()
            running = [Thread(target=_repeat, args=(thread, over)) for thread in threads]
            for thread in running:
                thread.start()
            meet()
            meet()
            over.set()
            for thread in running:
                thread.join()

        times: list[float] = together([measuring, working])[0]
        return statistics.quantiles(times, n=10)[-1]

    return sample


def _repeat(call: Callable[[], object], over: Event) -> None:
    while not over.is_set():
        call()
