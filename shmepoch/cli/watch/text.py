"""Lines of text with a tone, apart from the widgets; figures as people read them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Final, TypeAlias

from rich.cells import cell_len, set_cell_size

from shmepoch.cli.streams import visible


class Tone(StrEnum):
    """The role of a piece of text, which decides its style. A tone never carries a meaning alone:
    a word says it too."""

    PLAIN = "plain"
    DIM = "dim"
    TITLE = "title"
    HEADING = "heading"
    GOOD = "good"
    WARN = "warn"
    BAD = "bad"
    FIGURE = "figure"


Piece: TypeAlias = tuple[str, Tone]
Line: TypeAlias = tuple[Piece, ...]

_LEVELS: Final = "▁▂▃▄▅▆▇█"
_UNITS: Final = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def plain(line: Line) -> str:
    """The text of a line."""
    return "".join(text for text, _ in line)


def one_line(text: object) -> str:
    """Foreign text as a part of one line: nothing in it controls a terminal."""
    return visible(text).replace("\n", "\\n")


def fitted(text: str, width: int, *, right: bool = False) -> str:
    """A text in exactly `width` cells: padded, or cut with an ellipsis."""
    missing = width - cell_len(text)
    if missing < 0:
        return set_cell_size(text, width - 1) + "…" if width > 0 else ""
    return " " * missing + text if right else text + " " * missing


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most `width` characters."""
    return textwrap.wrap(text, max(10, width))


def joined(pieces: Iterable[Piece], width: int, separator: str = "  ") -> Line:
    """The first pieces, as many as fit the width, with separators. If the first does not fit, it is
    cut."""
    line: list[Piece] = []
    for text, tone in pieces:
        if not line:
            text = fitted(text, min(width, cell_len(text)))
        elif cell_len(separator) + cell_len(text) <= width:
            line.append((separator, Tone.PLAIN))
            width -= cell_len(separator)
        else:
            break
        line.append((text, tone))
        width -= cell_len(text)
    return tuple(line)


def bar(part: float, whole: float, width: int) -> Line:
    """A bar of `width` cells, filled by the ratio of `part` to `whole`. A ratio above 0 is seen."""
    share = min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0
    halves = max(1, round(share * width * 2)) if share > 0 and width > 0 else 0
    full, rest = divmod(halves, 2)
    drawn = "━" * full + "╸" * rest
    return ((drawn, Tone.FIGURE), ("─" * (width - len(drawn)), Tone.DIM))


def sparkline(values: Sequence[float | None], width: int) -> str:
    """The last values as columns, each as high as its share of the largest. An unknown value is
    blank, and only 0 has the height of 0."""
    shown = values[-width:] if width > 0 else ()
    most = max((value for value in shown if value is not None), default=0)
    return "".join(" " if value is None else _level(value, most) for value in shown).rjust(width)


def _level(value: float, most: float) -> str:
    if value <= 0:
        return _LEVELS[0]
    return _LEVELS[max(1, round(value / most * (len(_LEVELS) - 1)))]


def number(value: float) -> str:
    """A number of at most nine characters: `12,345`, `7.5M`."""
    if value < 10_000_000:
        return f"{value:,.0f}"
    for unit in "MGTPE":
        value /= 1_000_000 if unit == "M" else 1_000
        if value < 1_000:
            break
    return f"{value:,.1f}{unit}"


def rate(per_second: float) -> str:
    """A rate: `0`, `0.3/s`, `1,234/s`."""
    if per_second <= 0:
        return "0"
    if per_second < 0.1:
        return "<0.1/s"
    return f"{per_second:.1f}/s" if per_second < 10 else f"{number(per_second)}/s"


def size(octets: float) -> str:
    """A size of memory: `28 KB`, `0.5 MB`, where a KB is 1,024 bytes."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if octets < 1000 or unit == "TB":
            break
        octets /= 1024
    digits = 0 if unit == "B" or octets >= 10 else 1
    return f"{octets:,.{digits}f} {unit}"


def duration(milliseconds: float) -> str:
    """A time in at most two units: `12s`, `3m05s`, `2h10m`, `4d03h`."""
    seconds = max(0, int(milliseconds // 1000))
    for (unit, length), (next_unit, next_length) in pairwise(_UNITS):
        if seconds >= length:
            return f"{seconds // length}{unit}{seconds % length // next_length:02}{next_unit}"
    return f"{seconds}s"


def took(milliseconds: float) -> str:
    """A duration: `812 ms`, `20.5 s`, `3m05s`."""
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1000:.1f} s" if milliseconds < 60_000 else duration(milliseconds)
