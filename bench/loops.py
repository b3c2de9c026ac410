"""Loops around one call, and the cost of the call without the loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from time import perf_counter
from typing import Final

#: A sample of one figure.
Timed = Callable[[], float]

#: Above the small integers that CPython caches, like real positions.
FIRST: Final = 10**6


def calls(call: Callable[[], object], count: int) -> Timed:
    """Seconds for one call without arguments, net of the loop."""

    def sample() -> float:
        began = perf_counter()
        for _ in repeat(None, count):
            pass
        bare = perf_counter() - began
        began = perf_counter()
        for _ in repeat(None, count):
            call()
        return (perf_counter() - began - bare) / count

    return sample


def rising(call: Callable[[int], object], count: int, first: int = FIRST) -> Timed:
    """Seconds for one call with a value above all before it, net of the loop."""
    reached = first

    def sample() -> float:
        nonlocal reached
        values = range(reached, reached + count)
        reached += count
        began = perf_counter()
        for _ in values:
            pass
        bare = perf_counter() - began
        began = perf_counter()
        for value in values:
            call(value)
        return (perf_counter() - began - bare) / count

    return sample


def swaps(call: Callable[[int, int], object], count: int, *, behind: int) -> Timed:
    """Seconds for one exchange of `value - behind` by `value`, net of the loop; values rise."""
    reached = FIRST

    def sample() -> float:
        nonlocal reached
        values = range(reached, reached + count)
        reached += count
        began = perf_counter()
        for value in values:
            value - behind
        bare = perf_counter() - began
        began = perf_counter()
        for value in values:
            call(value - behind, value)
        return (perf_counter() - began - bare) / count

    return sample
