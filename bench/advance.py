"""What a cursor's `advance` costs beside an empty method of the same native type.

The empty method exists only in a build made for this measurement (-DSHMEPOCH_BENCH), in a
temporary folder; so both methods are in one binary and are timed in turn, in one process.

    .venv/bin/python bench/advance.py
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent.parent / "shmepoch" / "memory" / "_native.c"
ROUNDS = 41
CALLS = 200_000


def build(folder: Path) -> Any:
    """The native module with the empty method, built like the installed one."""
    target = folder / "_native.abi3.so"
    subprocess.run(
        [
            *("gcc", "-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
            *("-DSHMEPOCH_BENCH", "-DPy_LIMITED_API=0x030B0000"),
            f"-I{sysconfig.get_path('include')}",
            *(str(SOURCE), "-o", str(target)),
        ],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("shmepoch.memory._native", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def per_call(call: Callable[[int], object], argument: Callable[[int], int]) -> float:
    """Nanoseconds of one call, net of nothing: the loop is part of both sides."""
    values = [argument(i) for i in range(1000)]
    timer = timeit.Timer(
        "for value in values: call(value)", globals={"values": values, "call": call}
    )
    return timer.timeit(CALLS // 1000) / CALLS * 1e9


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        native = build(Path(folder))
    memory = native.Memory.private(4096)
    cell = native.Cell(memory, 128, 0, RuntimeError)
    grown = 0

    def next_value(_: int) -> int:
        nonlocal grown
        grown += 1
        return grown

    samples: dict[str, list[float]] = {"empty": [], "advance, moving": [], "advance, not": []}
    for _ in range(ROUNDS):
        samples["empty"].append(per_call(cell.empty, next_value))
        fresh = native.Cell(native.Memory.private(4096), 128, 0, RuntimeError)
        # Only the first pass over the values moves the cell, so each pass gets a cell of its own.
        moving = [
            timeit.Timer(
                "for value in values: call(value)",
                globals={
                    "values": list(range(10**9, 10**9 + CALLS)),
                    "call": fresh.advance,
                },
            ).timeit(1)
            / CALLS
            * 1e9
        ]
        samples["advance, moving"] += moving
        samples["advance, not"].append(per_call(fresh.advance, lambda i: i))
    print(f"{sys.implementation.name} {sys.version.split()[0]}, {ROUNDS} rounds, ns a call")
    for name, values in samples.items():
        ratios = [a / b for a, b in zip(values, samples["empty"], strict=True)]
        print(
            f"{name:16} median {statistics.median(values):6.1f}   "
            f"x empty {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
