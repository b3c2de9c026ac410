"""(a) One position in one process: load, advance, compare-and-swap, snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

from bench import cells
from bench.harness import Contestant, Measure, Sample
from bench.loops import FIRST, calls, rising, swaps


def _each(
    stack: ExitStack, sample: Callable[[cells.Cell, int], Sample], count: int
) -> list[Contestant]:
    return [
        Contestant(name, sample(make(stack), max(1, count // fewer)), caveat)
        for name, make, caveat, fewer in cells.ALL
    ]


def _swapping(cell: cells.Cell, count: int) -> Sample:
    cell.advance(FIRST - 1)
    return swaps(cell.swap, count, behind=1)


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for so many calls a sample."""
    yield Measure("load", _each(stack, lambda cell, n: calls(cell.load, n), count))
    yield Measure("advance", _each(stack, lambda cell, n: rising(cell.advance, n), count))
    yield Measure(
        "compare and swap, successful",
        _each(stack, _swapping, count),
    )
    yield Measure(
        "compare and swap, refused",
        _each(stack, lambda cell, n: swaps(cell.swap, n, behind=0), count),
    )
    yield Measure("snapshot of three cursors", list(_snapshots(stack, count)))


def _snapshots(stack: ExitStack, count: int) -> Iterator[Contestant]:
    yield Contestant("shmepoch", calls(cells.epoch(stack).cursor_state.snapshot, count))
    one, two, three = (cells.of_atomicshm(stack, at).load for at in (0, 64, 128))
    yield Contestant(
        "atomicshm", calls(lambda: (one(), two(), three()), count), "not of one instant"
    )
