"""(f) The same with many live epochs on the machine, and with a long history."""

from __future__ import annotations

import os
import resource
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from itertools import count as counting
from time import perf_counter
from typing import Final

from bench.contestants import living
from bench.harness import Contestant, Measure, Sample
from bench.loops import calls, rising
from bench.measures import wakes
from bench.processes import APART
from bench.work import LITTLE, epoch, operate
from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings
from shmepoch.memory.namespaces import list_sessions
from shmepoch.memory.segment import SharedSegment

_SIZES: Final = (1, 100, 1_000, 10_000)
#: The samples of each figure for each size of the population.
_SAMPLES: Final = 5
_AGES: Final = (1_000, 10_000, 100_000, 1_000_000)
_CONTENT: Final = "x" * 100

#: Measure and unit, by the name of the figure.
_FIGURES: Final = {
    "attach": ("attach and leave a segment, among others", "s"),
    "list": ("list the sessions, for each", "s"),
    "advance": ("advance, among others", "s"),
    "operation": ("operation, among others", "s"),
    "wake": ("wake round trip, separate cores, among others", "s"),
}


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, with at most `count` live epochs."""
    sizes = [size for size in _SIZES if size <= count]
    passes = _Passes(sizes)
    for figure, (name, unit) in _FIGURES.items():
        yield Measure(
            name,
            [Contestant(living(size), passes.sample(figure, size)) for size in sizes],
            unit,
        )


def ages(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The same in epochs with a history of at most `count` completions, most of them dropped."""
    reached = [age for age in _AGES if age <= count]

    @cache
    def aged(age: int) -> SessionRuntimeBindings:
        bindings = epoch(stack)
        for _ in range(age):
            operate(bindings, _CONTENT)
        return bindings

    for name, sample in (
        ("operation, by the epoch's age", _operating),
        ("list_since of 100 entries, by the epoch's age", _listing),
    ):
        yield Measure(
            name, [Contestant(f"after {age:,} completions", sample(aged(age))) for age in reached]
        )


class _Passes:
    """Takes all samples while the population grows, since growing it takes longest.

    The n-th sample of each contestant is from the n-th pass.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._passes: list[dict[tuple[str, int], float]] = []

    def sample(self, figure: str, size: int) -> Sample:
        """The sample of one figure in one size of population."""
        turns = counting()

        def sample() -> float:
            turn = next(turns)
            while turn >= len(self._passes):
                self._passes.append(_grow(self._sizes))
            return self._passes[turn][figure, size]

        return sample


def _grow(sizes: list[int]) -> dict[tuple[str, int], float]:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found: dict[tuple[str, int], float] = {}
    namespace = f"bench-{os.getpid()}-many"
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=LITTLE) as adapter:
        epochs: list[SessionRuntimeBindings] = []
        try:
            for size in sizes:
                while len(epochs) < size:
                    epochs.append(adapter.prepare_bindings(SessionId.new()))
                for figure, seconds in _poll(namespace, epochs):
                    found[figure, size] = seconds
        finally:
            for one in epochs:
                adapter.unregister_session(one.session_id)
    return found


def _poll(namespace: str, epochs: list[SessionRuntimeBindings]) -> Iterator[tuple[str, float]]:
    first = epochs[0]
    advance = first.cursor_state.agent_applied_cursor.advance
    begun = first.cursor_state.agent_applied_cursor.load()
    yield "advance", _median(rising(advance, 50_000, first=begun + 10**6))
    yield (
        "attach",
        _median(calls(lambda: SharedSegment.attach(namespace, first.session_id).close(), 100)),
    )
    yield "operation", _median(calls(partial(operate, first, _CONTENT), 100))
    yield "wake", statistics.median(wakes.round_trips(wakes.shmepoch, APART, 2_000))
    began = perf_counter()
    found = sum(1 for _ in list_sessions(namespace))
    yield "list", (perf_counter() - began) / found


def _median(sample: Callable[[], float]) -> float:
    return statistics.median(sample() for _ in range(_SAMPLES))


def _operating(bindings: SessionRuntimeBindings) -> Sample:
    return calls(partial(operate, bindings, _CONTENT), 300)


def _listing(bindings: SessionRuntimeBindings) -> Sample:
    feed = bindings.ops_lifecycle.completion_feed()
    return calls(partial(feed.list_since, feed.watermark() - 100), 300)
