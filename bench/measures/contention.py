"""(b) Several processes that advance one cursor, or different cursors of one epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from time import perf_counter, process_time, sleep
from typing import Final, NamedTuple

from bench import cells
from bench.contestants import MANAGER, SHMEPOCH
from bench.harness import Contestant, Measure, Sample
from bench.loops import FIRST
from bench.processes import CPUS, together
from bench.work import epoch

#: All begin at one moment, when the last of them has been forked.
_HEAD_START_S = 0.05

Advance = Callable[[int], object]


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for `count` advances of all processes together."""
    for processes in (2, 4, 8):
        crowd = f"{processes / len(CPUS):g} a CPU" if processes > len(CPUS) else ""
        yield Measure(
            f"advance, {processes} processes on one cursor",
            [
                Contestant(
                    name,
                    _contended([make(stack).advance] * processes, max(100, count // fewer)),
                    "; ".join(filter(None, (caveat, crowd))),
                )
                for name, make, caveat, fewer in cells.ALL
                if name != MANAGER
            ],
        )
    cursors, apart = epoch(stack).cursor_state, epoch(stack).cursor_state
    one, other = cursors.runtime_observed_seq.advance, cursors.agent_applied_cursor.advance
    elsewhere = apart.agent_applied_cursor.advance
    yield Measure(
        "advance, one process a cursor of one epoch",
        [
            Contestant(SHMEPOCH, _alongside([one, other], count)),
            Contestant("one process alone", _alongside([one], count)),
            Contestant("cursors of two epochs", _alongside([one, elsewhere], count), "the floor"),
        ],
    )


def _contended(advances: Sequence[Advance], count: int) -> Sample:
    """Seconds for one of `count` advances, of all processes together."""
    values = _Values(len(advances), count)

    def sample() -> float:
        times = _race(advances, values)
        return (max(one.ended for one in times) - min(one.began for one in times)) / values.count

    return sample


def _alongside(advances: Sequence[Advance], count: int) -> Sample:
    """Seconds of processor for one advance, when each process makes `count` of them.

    Processor time, so that preemption by other processes does not count.
    """
    values = _Values(len(advances), count * len(advances))

    def sample() -> float:
        return sum(one.used for one in _race(advances, values)) / values.count

    return sample


class _Values:
    """Rising values that several processes take in turn."""

    def __init__(self, processes: int, count: int) -> None:
        self._processes = processes
        self.count: Final = count // processes * processes
        self._reached = FIRST

    def next(self) -> list[range]:
        """The next values of each process, all above the earlier ones."""
        begin, self._reached = self._reached, self._reached + self.count
        return [
            range(begin + index, self._reached, self._processes) for index in range(self._processes)
        ]


class _Times(NamedTuple):
    """The begin and the end of a process, and the processor seconds in between."""

    began: float
    ended: float
    used: float


def _race(advances: Sequence[Advance], values: _Values) -> list[_Times]:
    start = perf_counter() + _HEAD_START_S
    return together(
        [
            _advancing(advance, own, start)
            for advance, own in zip(advances, values.next(), strict=True)
        ]
    )


def _advancing(advance: Advance, values: range, start: float) -> Callable[[], _Times]:
    def job() -> _Times:
        sleep(max(0.0, start - perf_counter()))
        began, used = perf_counter(), process_time()
        for value in values:
            advance(value)
        return _Times(began, perf_counter(), process_time() - used)

    return job
