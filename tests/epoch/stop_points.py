"""The instructions after which the crash test stops a process, and the contents of memory."""

from __future__ import annotations

import argparse
import os
import secrets
from typing import Final

from tests.epoch.stepping import steps
from tests.epoch.test_crash import CASES, ENDS, Survivor

_CASES: Final = {**CASES, **{name: end.case for name, end in ENDS.items()}}


def stop_points(name: str) -> tuple[int, int]:
    """The number of instructions of a case, and of different contents of memory."""
    survivor = Survivor(f"points-{secrets.token_hex(8)}", _CASES[name])
    try:
        points, contents = 0, set()
        for _ in steps(survivor.start()):
            points += 1
            contents.add(os.pread(survivor.segment.fd, survivor.segment.layout.size, 0))
        return points, len(contents)
    finally:
        survivor.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/stop_points", description=__doc__)
    parser.parse_args()
    print("| transition | instructions | contents of memory |")
    print("| --- | ---: | ---: |")
    total = 0
    for name in _CASES:
        points, contents = stop_points(name)
        total += points
        print(f"| {name} | {points:,} | {contents:,} |")
    print(f"| all of them | {total:,} | |")


if __name__ == "__main__":
    main()
