"""(a) One position in one process: load, advance, compare-and-swap, snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import repeat
from time import perf_counter

from bench import cells
from bench.contestants import ATOMICSHM, SHMEPOCH
from bench.harness import Contestant, Measure, Sample
from bench.loops import FIRST, calls, rising, swaps
from bench.work import epoch

#: Above every value that is tried.
_LAST = 2**48


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for `count` calls in each sample."""

    def each(sample: Callable[[cells.Cell, int], Sample], begin: int) -> list[Contestant]:
        contestants = []
        for name, make, caveat, fewer in cells.ALL:
            cell = make(stack)
            cell.advance(begin)
            contestants.append(Contestant(name, sample(cell, max(1, count // fewer)), caveat))
        return contestants

    yield Measure("load", each(lambda cell, n: calls(cell.load, n), FIRST))
    yield Measure("advance", each(lambda cell, n: rising(cell.advance, n), FIRST - 1))
    yield Measure("advance, value not above", each(lambda cell, n: rising(cell.advance, n), _LAST))
    yield Measure(
        "compare and swap, successful",
        each(lambda cell, n: swaps(cell.swap, n, behind=1), FIRST - 1),
    )
    yield Measure(
        "compare and swap, refused", each(lambda cell, n: swaps(cell.swap, n, behind=0), FIRST - 1)
    )
    state = epoch(stack).cursor_state
    three = [cells.of_atomicshm(stack, offset) for offset in (0, 64, 128)]
    cursors = (
        state.agent_applied_cursor,
        state.runtime_observed_seq,
        state.runtime_last_injected_seq,
    )
    for advance in (*(one.advance for one in cursors), *(cell.advance for cell in three)):
        advance(FIRST)
    loads = [cell.load for cell in three]
    yield Measure(
        "snapshot of three cursors",
        [
            Contestant(SHMEPOCH, calls(state.snapshot, count), "none has moved since the last"),
            Contestant(ATOMICSHM, _tuples(*loads, count=count), "not of one instant"),
        ],
    )
    # The opposite case for both: each snapshot finds a cursor moved.
    yield Measure(
        "advance one of three cursors and snapshot them",
        [
            Contestant(SHMEPOCH, rising(_both(cursors[0].advance, state.snapshot), count)),
            Contestant(
                ATOMICSHM,
                rising(_both(three[0].advance, _three(*loads)), count),
                "not of one instant",
            ),
        ],
    )


def _both(advance: Callable[[int], object], look: Callable[[], object]) -> Callable[[int], object]:
    def both(value: int) -> None:
        advance(value)
        look()

    return both


def _tuples(
    one: Callable[[], int], two: Callable[[], int], three: Callable[[], int], *, count: int
) -> Sample:
    """Seconds for a tuple of three loads, net of the loop; written out, since a call costs too."""

    def sample() -> float:
        began = perf_counter()
        for _ in repeat(None, count):
            pass
        bare = perf_counter() - began
        began = perf_counter()
        for _ in repeat(None, count):
            (one(), two(), three())
        return (perf_counter() - began - bare) / count

    return sample


def _three(
    one: Callable[[], int], two: Callable[[], int], three: Callable[[], int]
) -> Callable[[], object]:
    return lambda: (one(), two(), three())
