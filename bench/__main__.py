"""The command behind tools/bench."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench import report
from bench.harness import Result, run
from bench.measures import cursors, imports, operations, segments

#: Each group, and how many calls a sample of it has in a full run.
_GROUPS: Final = (
    (cursors, 100_000),
    (operations, 300),
    (segments, 300),
    (imports, 1),
)
_ROUNDS: Final = 25
_QUICK_ROUNDS: Final = 7
_QUICK_FEWER: Final = 5


def main() -> None:
    """Measure everything, write the results and print them."""
    parser = argparse.ArgumentParser(description=sys.modules[__name__].__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds of fewer calls")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="a folder")
    options = parser.parse_args()
    results: list[Result] = []
    for group, count in _GROUPS:
        if options.quick:
            count = max(1, count // _QUICK_FEWER)
        with ExitStack() as stack:
            rounds = _QUICK_ROUNDS if options.quick else _ROUNDS
            results += run(
                group.measures(stack, count), rounds, lambda name: print(name, file=sys.stderr)
            )
    report.write(results, options.results)
    print(report.markdown(results))


if __name__ == "__main__":
    main()
