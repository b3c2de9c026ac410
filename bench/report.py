"""What a run of the benchmarks found: a table, a plot and the figures themselves."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
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
    return "0 ns"


def markdown(results: Sequence[Result]) -> str:
    """Every contestant of every measure, and the goals."""
    lines = [
        f"{machine()}. Medians; the spread is that between the quartiles.",
        "",
        "| measure | contestant | one takes | spread | times shmepoch | caveat |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {result.name} | {name} | {duration(result.median(name))} "
        f"| {result.spread(name):.0%} | {result.ratio(name, 'shmepoch'):.2f} "
        f"| {result.caveats[name]} |"
        for result in results
        for name in result.seconds
    ]
    return "\n".join([*lines, "", table(by_name(results)), ""])


def by_name(results: Sequence[Result]) -> Mapping[str, Result]:
    """The results by their measures' names."""
    return {result.name: result for result in results}


def write(results: Sequence[Result], folder: Path) -> None:
    """The table, the plot and the figures, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(markdown(results))
    figures = {result.name: result.seconds for result in results}
    (folder / "results.json").write_text(
        json.dumps({"machine": machine(), "seconds": figures}, indent=1) + "\n"
    )
    _plot(results, folder / "results.svg")


def _plot(results: Sequence[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    compared = [result for result in results if len(result.seconds) > 1]
    rows = -(-len(compared) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 1.9 * rows), layout="constrained")
    for axis, result in zip(axes.flat, compared, strict=False):
        names = list(result.seconds)[::-1]
        medians = [result.median(name) for name in names]
        colours = ["#1f5fa8" if name == "shmepoch" else "#b8bec6" for name in names]
        bars = axis.barh(names, medians, color=colours)
        axis.bar_label(bars, [duration(median) for median in medians], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(min(medians) / 2, max(medians) * 6)
        axis.set_title(result.name, fontsize=10, loc="left")
        axis.tick_params(labelsize=8, labelbottom=False, bottom=False, which="both")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    for axis in axes.flat[len(compared) :]:
        axis.set_visible(False)
    figure.suptitle("Time for one, logarithmic: shorter is faster", fontsize=11)
    figure.savefig(path)
