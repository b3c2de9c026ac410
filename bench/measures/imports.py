"""(g) The cost of importing for a process that starts."""

from __future__ import annotations

import compileall
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

import shmepoch
from bench.contestants import SHMEPOCH
from bench.harness import Contestant, Measure


def _starting(statement: str) -> Callable[[], float]:
    def sample() -> float:
        began = perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return perf_counter() - began

    return sample


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group."""
    # Like an installation: a checkout's modules may never have been imported before.
    compileall.compile_dir(Path(shmepoch.__file__).parent, quiet=1)
    yield Measure(
        "start a process that imports",
        [
            Contestant(SHMEPOCH, _starting("import shmepoch")),
            Contestant("numpy", _starting("import numpy")),
            Contestant("numpy, and 25 ms", lambda: _starting("import numpy")() + 0.025),
            Contestant("nothing", _starting("pass")),
        ],
    )
