"""Measurements of several contestants, taken in turn so that the machine's moods hit all alike."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

#: One sample: seconds for one of what the measure counts.
Sample = Callable[[], float]


@dataclass(frozen=True)
class Contestant:
    """Somebody who can do the job. `caveat` says what it does not do that shmepoch does."""

    name: str
    sample: Sample
    caveat: str = ""


@dataclass(frozen=True)
class Measure:
    """One job, and everybody who does it."""

    name: str
    contestants: Sequence[Contestant]


@dataclass
class Result:
    """The samples of one measure, by contestant; the n-th of each were taken in the same round."""

    name: str
    caveats: dict[str, str]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, contestant: str) -> float:
        """The median sample."""
        return statistics.median(self.seconds[contestant])

    def spread(self, contestant: str) -> float:
        """The distance between the quartiles, relative to the median."""
        low, middle, high = statistics.quantiles(self.seconds[contestant], n=4)
        return (high - low) / middle

    def ratio(self, contestant: str, other: str) -> float:
        """The median of how many times as long `contestant` took as `other` in the same round."""
        pairs = zip(self.seconds[contestant], self.seconds[other], strict=True)
        return statistics.median(one / another for one, another in pairs)


#: Below this many rounds there are no quartiles.
LEAST_ROUNDS: Final = 3


def run(measures: Iterable[Measure], rounds: int, said: Callable[[str], None]) -> list[Result]:
    """Take a sample of every contestant of a measure in each round, each time another one first."""
    results = []
    for measure in measures:
        said(measure.name)
        contestants = list(measure.contestants)
        result = Result(measure.name, {one.name: one.caveat for one in contestants})
        result.seconds = {one.name: [] for one in contestants}
        for one in contestants:
            one.sample()  # warms up
        for turn in range(max(rounds, LEAST_ROUNDS)):
            first = turn % len(contestants)
            for one in contestants[first:] + contestants[:first]:
                result.seconds[one.name].append(_quietly(one.sample))
        results.append(result)
    return results


def _quietly(sample: Sample) -> float:
    gc.collect()
    gc.disable()
    try:
        return sample()
    finally:
        gc.enable()
