"""(g) What importing costs a process that starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from time import perf_counter

from bench.harness import Contestant, Measure, Sample


def _starting(statement: str) -> Sample:
    def sample() -> float:
        began = perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return perf_counter() - began

    return sample


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group."""
    statements = {"shmepoch": "import shmepoch", "numpy": "import numpy", "nothing": "pass"}
    yield Measure(
        "start a process that imports",
        [Contestant(name, _starting(statement)) for name, statement in statements.items()],
    )
