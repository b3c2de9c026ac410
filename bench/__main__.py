"""The command behind tools/bench."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import report
from bench.harness import Measure, Result, run
from bench.measures import (
    contention,
    cursors,
    growth,
    idle,
    imports,
    memory,
    operations,
    operators,
    peers,
    segments,
    streams,
    wakes,
)


@dataclass(frozen=True)
class Effort:
    """The number of rounds, and the size of a sample."""

    rounds: int
    count: int


@dataclass(frozen=True)
class Group:
    """Measures that belong together, and the effort of a full run and of a quick run."""

    measures: Callable[[ExitStack, int], Iterator[Measure]]
    full: Effort
    quick: Effort


GROUPS: Final = {
    "cursors": Group(cursors.measures, Effort(25, 100_000), Effort(7, 50_000)),
    "contention": Group(contention.measures, Effort(15, 4_000_000), Effort(3, 2_000_000)),
    "wakes": Group(wakes.measures, Effort(15, 5_000), Effort(3, 1_000)),
    # A sample spans several checkpoints of SQLite's log, one every thousand pages. With fewer
    # operations most samples had no checkpoint, and the median left its cost out.
    "operations": Group(operations.measures, Effort(11, 2_000), Effort(3, 1_000)),
    "peers": Group(peers.measures, Effort(11, 1_000), Effort(3, 500)),
    "streams": Group(streams.measures, Effort(11, 4_000), Effort(3, 2_000)),
    "segments": Group(segments.measures, Effort(25, 300), Effort(7, 100)),
    "growth": Group(growth.measures, Effort(5, 10_000), Effort(3, 10_000)),
    "ages": Group(growth.ages, Effort(11, 1_000_000), Effort(3, 10_000)),
    "memory": Group(memory.measures, Effort(3, 1), Effort(3, 1)),
    "imports": Group(imports.measures, Effort(15, 1), Effort(5, 1)),
    "idle": Group(idle.measures, Effort(5, 20), Effort(3, 5)),
    "operators": Group(operators.measures, Effort(7, 10_000), Effort(3, 10_000)),
}


def main() -> None:
    """Measure everything, write the results and print them."""
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds of fewer calls")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="a folder")
    parser.add_argument(
        "--only", choices=list(GROUPS), nargs="+", default=list(GROUPS), help="these groups"
    )
    options = parser.parse_args()
    results: list[Result] = []
    for name in options.only:
        group = GROUPS[name]
        effort = group.quick if options.quick else group.full
        with ExitStack() as stack:
            results += run(group.measures(stack, effort.count), effort.rounds, _say)
    report.write(results, options.results)
    print(report.markdown(results))


def _say(measure: str) -> None:
    print(measure, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
