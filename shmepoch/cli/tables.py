"""Tables, as the commands print them for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shmepoch.cli.entries import how, local_time
from shmepoch.cli.streams import visible
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.operations import status_of

#: The width of a table without a terminal: a name has at most 200 bytes.
_UNBOUNDED_WIDTH: Final = 400
#: The least width of a table: a narrower terminal breaks its lines, and no column is left out.
_LEAST_WIDTH: Final = 72

_UNITS: Final = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000))


def print_table(table: Table, *, least: int = _LEAST_WIDTH) -> None:
    """Print a table whose texts may be long. A narrow terminal folds them, but the table keeps at
    least `least` columns in all."""
    console = Console()
    console.width = max(console.width, least) if console.is_terminal else _UNBOUNDED_WIDTH
    with console.capture() as captured:  # rich itself would end the process if the reader left
        console.print(table)
    print(captured.get(), end="")


def table_of_entries(title: str, entries: Iterable[CompletionEntry]) -> Table:
    """A table of ended operations, one per row."""
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("seq", justify="right", no_wrap=True)
    table.add_column("ended", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for heading in ("name", "how"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        table.add_row(
            str(entry.seq),
            local_time(entry.completed_at_ms),
            status_of(entry.terminal_outcome),
            Text(visible(entry.display_name)),  # a command may look like markup
            Text(visible(how(entry.terminal_outcome))),
        )
    return table


def print_columns(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()
) -> None:
    """Print a table of short texts in ASCII, with one row per line, however narrow the terminal. It
    may have thousands of rows. The columns named in `right` are aligned to the right."""
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_the_right = set(right)
    form = "  ".join(
        f"{{:{'>' if heading in to_the_right else ''}{width}}}"
        for heading, width in zip(headings, widths, strict=True)
    )
    for line in lines:
        print(form.format(*line).rstrip())


def span(ms: int) -> str:
    """A duration in its two largest units: `3h20m`."""
    for (unit, size), (smaller, rest) in pairwise(_UNITS):
        if ms >= size:
            return f"{ms // size}{unit}{ms % size // rest}{smaller}"
    return f"{max(0, ms) // 1000}s"
