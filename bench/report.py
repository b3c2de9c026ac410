"""The report of a run of the benchmarks: tables, plots and the figures themselves."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench.contestants import OURS, SHMEPOCH
from bench.goals import table
from bench.harness import Result

_UNITS: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_RATES: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))

#: The measures that matter for a choice, with their labels in the plot.
MAIN: Final = {
    "advance": "advance a cursor",
    "advance, 4 processes on one cursor": "advance one cursor, 4 processes",
    "wake round trip, separate cores": "wake round trip, separate cores",
    "operation, 100 B": "register, start and complete an operation",
    "completion stream, 200 B, 1 to 1 reader": "stream 200 B to a reader, one record",
    "attach and leave a segment": "attach and leave a segment",
}
_OURS: Final = "#1f5fa8"
_THEIRS: Final = "#b8bec6"
_FLOOR: Final = "#e3e6ea"


def machine() -> str:
    """The machine and the versions that the figures depend on."""
    return (
        f"CPython {platform.python_version()}, {platform.system()} {platform.release()}, "
        f"{platform.machine()}, {os.cpu_count()} CPUs"
    )


def duration(seconds: float) -> str:
    """A duration with three digits, in a suitable unit."""
    for unit, name in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.2g} ns"


def quantity(value: float, unit: str) -> str:
    """A figure of a measure with its unit."""
    if unit == "s":
        return duration(value)
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:.2g} {unit}"


def rate(value: float, unit: str) -> str:
    """The rate per second of something that takes this time; empty for other units."""
    if unit != "s" or value <= 0:
        return ""
    size, prefix = next((rate for rate in _RATES if 1 / value >= rate[0]), _RATES[-1])
    return f"{1 / value / size:.3g} {prefix}".strip()


def by_name(results: Sequence[Result]) -> Mapping[str, Result]:
    """The results by their measures' names."""
    return {result.name: result for result in results}


def markdown(results: Sequence[Result]) -> str:
    """Every contestant of every measure, and the goals."""
    lines = [
        f"{machine()}. Medians; the spread is that between the quartiles.",
        "",
        "| measure | contestant | one takes | a second | spread | p99 | p99.9 "
        "| times the first's | caveat |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lines += _rows(result)
    return "\n".join([*lines, "", table(by_name(results)), ""])


def _rows(result: Result) -> Iterator[str]:
    for name in result.figures:
        tail = result.tail(name)
        p99, p999 = (quantity(one, result.unit) for one in tail) if tail else ("", "")
        median = result.median(name)
        yield (
            f"| {result.name} | {name} | {quantity(median, result.unit)} "
            f"| {rate(median, result.unit)} | {result.spread(name):.0%} | {p99} | {p999} "
            f"| {result.ratio(name, next(iter(result.figures))):.2f} | {result.caveats[name]} |"
        )
    for name, why in result.skipped.items():
        yield f"| {result.name} | {name} | skipped | | | | | | {why} |"


def main_table(results: Sequence[Result]) -> str:
    """The measures of the main plot, as in the project's README."""
    lines = ["| what | contestant | one takes | times shmepoch's |", "| --- | --- | --- | --- |"]
    for result, label in _main(results):
        for name in _from_fast_to_slow(result):
            who = f"**{name}**" if name in OURS else name
            caveat = f" ({result.caveats[name]})" if result.caveats[name] else ""
            lines.append(
                f"| {label} | {who}{caveat} | {duration(result.median(name))} "
                f"| {_times(result.ratio(name, SHMEPOCH))} |"
            )
    return "\n".join([*lines, ""])


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}"


def _main(results: Sequence[Result]) -> list[tuple[Result, str]]:
    found = by_name(results)
    return [(found[name], label) for name, label in MAIN.items() if name in found]


def _as_given(result: Result) -> list[str]:
    return list(result.figures)


def _from_fast_to_slow(result: Result) -> list[str]:
    return sorted(result.figures, key=result.median)


def write(results: Sequence[Result], folder: Path) -> None:
    """The tables, the plots and the figures, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(markdown(results))
    measures = {result.name: asdict(result) for result in results}
    (folder / "results.json").write_text(
        json.dumps({"machine": machine(), "measures": measures}, indent=1) + "\n"
    )
    compared = [result for result in results if len(result.figures) > 1]
    _plot([(result, result.name) for result in compared], _as_given, folder / "results.svg")
    main = _main(results)
    if main:
        (folder / "main.md").write_text(main_table(results))
        _plot(main, _from_fast_to_slow, folder / "main.svg")


def _plot(
    results: Sequence[tuple[Result, str]],
    ordered: Callable[[Result], Sequence[str]],
    path: Path,
) -> None:
    """A panel for each result under its label, its contestants from top to bottom as `ordered`."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Panels of a row are as high as the one with the most contestants.
    pairs = [results[first : first + 2] for first in range(0, len(results), 2)]
    heights = [max(len(result.figures) for result, _ in pair) + 2 for pair in pairs]
    figure, axes = pyplot.subplots(
        len(pairs),
        2,
        figsize=(11, 0.24 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for row, pair, height in zip(axes, pairs, heights, strict=True):
        for axis in row[len(pair) :]:
            axis.set_visible(False)
        for axis, (result, label) in zip(row, pair, strict=False):
            _panel(axis, result, ordered(result))
            axis.set_title(label, fontsize=9, loc="left", fontweight="bold")
            axis.set_ylim(height - 2.4, -0.6)  # bars are as thick in every panel
    figure.suptitle("Time for one, logarithmic: shorter is faster", fontsize=11)
    figure.savefig(path)
    pyplot.close(figure)


def _panel(axis: Any, result: Result, names: Sequence[str]) -> None:
    medians = [result.median(name) for name in names]
    bars = axis.barh(names, medians, color=[_colour(name, result) for name in names], height=0.75)
    labels = [quantity(median, result.unit) for median in medians]
    axis.bar_label(bars, labels, padding=3, fontsize=8)
    axis.set_xscale("log")
    low, high = min(medians), max(medians)
    # Room for the labels: a fixed share of the panel for any range of magnitudes.
    axis.set_xlim(low / 2, high * max(2.0, (high / low) ** 0.25))
    axis.tick_params(labelsize=8, labelbottom=False, bottom=False, which="both")
    axis.tick_params(axis="y", left=False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    for text in axis.get_yticklabels():
        if text.get_text() in OURS:
            text.set_fontweight("bold")


def _colour(name: str, result: Result) -> str:
    if name in OURS:
        return _OURS
    return _FLOOR if result.caveats[name] == "the floor" else _THEIRS
