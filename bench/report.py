"""What a run of the benchmarks found: a table, a plot and the figures themselves."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bench.goals import table
from bench.harness import Result

_UNITS: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def machine() -> str:
    """What the figures depend on."""
    return (
        f"CPython {platform.python_version()}, {platform.system()} {platform.release()}, "
        f"{platform.machine()}, {os.cpu_count()} CPUs"
    )


def duration(seconds: float) -> str:
    """To three digits, in the unit that suits."""
    for unit, name in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.2g} ns"


def quantity(value: float, unit: str) -> str:
    """A figure of a measure with its unit."""
    if unit == "s":
        return duration(value)
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:.2g} {unit}"


def markdown(results: Sequence[Result]) -> str:
    """Every contestant of every measure, and the goals."""
    lines = [
        f"{machine()}. Medians; the spread is that between the quartiles.",
        "",
        "| measure | contestant | one takes | spread | p99 | p99.9 | times the first's | caveat |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lines += _rows(result)
    return "\n".join([*lines, "", table(by_name(results)), ""])


def _rows(result: Result) -> Iterator[str]:
    first = next(iter(result.figures))
    for name in result.figures:
        tail = result.tail(name)
        p99, p999 = (quantity(one, result.unit) for one in tail) if tail else ("", "")
        yield (
            f"| {result.name} | {name} | {quantity(result.median(name), result.unit)} "
            f"| {result.spread(name):.0%} | {p99} | {p999} | {result.ratio(name, first):.2f} "
            f"| {result.caveats[name]} |"
        )
    for name, why in result.skipped.items():
        yield f"| {result.name} | {name} | skipped | | | | | {why} |"


def by_name(results: Sequence[Result]) -> Mapping[str, Result]:
    """The results by their measures' names."""
    return {result.name: result for result in results}


def write(results: Sequence[Result], folder: Path) -> None:
    """The table, the plot and the figures, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(markdown(results))
    measures = {result.name: asdict(result) for result in results}
    (folder / "results.json").write_text(
        json.dumps({"machine": machine(), "measures": measures}, indent=1) + "\n"
    )
    _plot(results, folder / "results.svg")


def _plot(results: Sequence[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    compared = [result for result in results if len(result.figures) > 1]
    rows = -(-len(compared) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 1.9 * rows), layout="constrained")
    for axis, result in zip(axes.flat, compared, strict=False):
        first = next(iter(result.figures))
        names = list(result.figures)[::-1]
        medians = [result.median(name) for name in names]
        colours = ["#1f5fa8" if name == first else "#b8bec6" for name in names]
        bars = axis.barh(names, medians, color=colours)
        axis.bar_label(
            bars, [quantity(median, result.unit) for median in medians], padding=3, fontsize=8
        )
        axis.set_xscale("log")
        axis.set_xlim(min(medians) / 2, max(medians) * 6)
        axis.set_title(result.name, fontsize=10, loc="left")
        axis.tick_params(labelsize=8, labelbottom=False, bottom=False, which="both")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    for axis in axes.flat[len(compared) :]:
        axis.set_visible(False)
    figure.suptitle("Time for one, logarithmic: shorter is faster", fontsize=11)
    figure.savefig(path)
