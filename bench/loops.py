"""Loops around one call, and what the call costs without the loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from time import perf_counter

from bench.harness import Sample


def calls(call: Callable[[], object], count: int) -> Sample:
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


def rising(call: Callable[[int], object], count: int) -> Sample:
    """Seconds for one call with a value above all before it, net of the loop."""
    reached = 10**6  # beyond the small integers that CPython keeps

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
