"""The cost of a cursor's `advance`, compared with an empty method of the same native type.

    .venv/bin/python -m bench.advance

The empty method exists only in a build made for this measurement (-DSHMEPOCH_BENCH), so that both
methods are in one binary. They are timed in turn, round by round, and the time of the bare loop is
subtracted from both.
"""

from __future__ import annotations

import importlib.util
import platform
import statistics
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

from bench.loops import FIRST

SOURCES: Final = sorted((Path(__file__).parent.parent / "shmepoch" / "native").glob("*.c"))
ROUNDS: Final = 51
CALLS: Final = 100_000


def build(folder: Path) -> Any:
    """The native module with the empty method, compiled as the interpreter compiles."""
    target = folder / "_native.abi3.so"
    compiler = sysconfig.get_config_var("CC").split()
    optimisation = sysconfig.get_config_var("OPT").split()
    options = ["-std=c11", "-fPIC", "-shared", "-fvisibility=hidden", "-DSHMEPOCH_BENCH"]
    limited = ["-DPy_LIMITED_API=0x030B0000", f"-I{sysconfig.get_path('include')}"]
    files = [*map(str, SOURCES), "-o", str(target)]
    subprocess.run([*compiler, *optimisation, *options, *limited, *files], check=True)
    spec = importlib.util.spec_from_file_location("shmepoch._native", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bare(values: range) -> int:
    """Nanoseconds of the loop alone."""
    began = perf_counter_ns()
    for _ in values:
        pass
    return perf_counter_ns() - began


def calling(method: Callable[[int], object], values: range) -> int:
    """Nanoseconds of the loop with a call in it."""
    began = perf_counter_ns()
    for value in values:
        method(value)
    return perf_counter_ns() - began


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        native = build(Path(folder))
    values = range(FIRST, FIRST + CALLS)
    samples: dict[str, list[float]] = {
        "empty": [],
        "advance, moving": [],
        "advance, not moving": [],
    }
    for _ in range(ROUNDS):
        cell = native.Cell(native.Memory.private(4096), 128, 0, RuntimeError)
        loop = bare(values)
        samples["empty"].append((calling(cell.empty, values) - loop) / CALLS)
        samples["advance, moving"].append((calling(cell.advance, values) - loop) / CALLS)
        assert cell.load() == values[-1]
        samples["advance, not moving"].append((calling(cell.advance, values) - loop) / CALLS)
    print(f"CPython {platform.python_version()}, {platform.machine()}, median of {ROUNDS} rounds")
    for name, figures in samples.items():
        ratio = statistics.median(
            figure / empty for figure, empty in zip(figures, samples["empty"], strict=True)
        )
        print(f"{name:20} {statistics.median(figures):5.1f} ns   {ratio:.2f} x empty")


if __name__ == "__main__":
    main()
