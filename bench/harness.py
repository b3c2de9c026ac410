"""Measurements of several contestants, taken in turn so that other load affects all alike."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

#: One sample: the figure for one unit of the measure, or the figures of many single ones.
Sample = Callable[[], float | Sequence[float]]


@dataclass(frozen=True)
class Contestant:
    """A program that can do the job. `caveat` names a feature of shmepoch that it does not have."""

    name: str
    sample: Sample
    caveat: str = ""


def goal(name: str, figure: float) -> Contestant:
    """A goal as a contestant, with which others are compared as if it had been measured."""
    return Contestant(name, lambda: figure, "what is wanted")


@dataclass(frozen=True)
class Skipped:
    """A program that could do the job, and why it is not measured."""

    name: str
    why: str


@dataclass(frozen=True)
class Measure:
    """One job, and all its contestants. `unit` is that of its figures: s, B, or % of a
    processor."""

    name: str
    contestants: Sequence[Contestant | Skipped]
    unit: str = "s"


@dataclass
class Result:
    """The figures of one measure, by contestant; the n-th of each were taken in the same round."""

    name: str
    unit: str = "s"
    caveats: dict[str, str] = field(default_factory=dict)
    figures: dict[str, list[float]] = field(default_factory=dict)
    #: The 99th and 99.9th percentiles in each round, of samples with many figures.
    tails: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def median(self, contestant: str) -> float:
        """The median of the rounds."""
        return statistics.median(self.figures[contestant])

    def spread(self, contestant: str) -> float:
        """The distance between the quartiles, relative to the median."""
        low, middle, high = statistics.quantiles(self.figures[contestant], n=4)
        return (high - low) / middle if middle else 0.0

    def tail(self, contestant: str) -> tuple[float, float] | None:
        """The median 99th and 99.9th percentile, where there are any."""
        if contestant not in self.tails:
            return None
        p99, p999 = zip(*self.tails[contestant], strict=True)
        return statistics.median(p99), statistics.median(p999)

    def ratio(self, contestant: str, other: str) -> float:
        """The median over the rounds of `other`'s figure divided by `contestant`'s."""
        pairs = zip(self.figures[contestant], self.figures[other], strict=True)
        return statistics.median(one / another for one, another in pairs)

    def add(self, contestant: str, sample: float | Sequence[float]) -> None:
        """One more round of this contestant."""
        if isinstance(sample, float):
            self.figures[contestant].append(sample)
            return
        cuts = statistics.quantiles(sample, n=1000)
        self.figures[contestant].append(cuts[499])
        self.tails.setdefault(contestant, []).append((cuts[989], cuts[998]))


#: Below this many rounds there are no quartiles.
LEAST_ROUNDS: Final = 3


def run(measures: Iterable[Measure], rounds: int, said: Callable[[str], None]) -> list[Result]:
    """Take a sample of every contestant of a measure in each round, each time in another order."""
    return [_run(measure, max(rounds, LEAST_ROUNDS), said) for measure in measures]


def _run(measure: Measure, rounds: int, said: Callable[[str], None]) -> Result:
    said(measure.name)
    present = [one for one in measure.contestants if isinstance(one, Contestant)]
    result = Result(measure.name, measure.unit)
    for one in measure.contestants:
        if isinstance(one, Skipped):
            result.skipped[one.name] = one.why
    for one in present:
        result.caveats[one.name] = one.caveat
        result.figures[one.name] = []
        one.sample()  # warms up
    for turn in range(rounds):
        first = turn % len(present)
        for one in present[first:] + present[:first]:
            result.add(one.name, _quietly(one.sample))
    return result


def _quietly(sample: Sample) -> float | Sequence[float]:
    gc.collect()
    gc.disable()
    try:
        return sample()
    finally:
        gc.enable()
