"""The columns of the first screen: their cells, the choice of columns for a width, and sorting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from shmepoch.cli.watch import text
from shmepoch.cli.watch.history import STEPS, History
from shmepoch.cli.watch.text import Line, Piece, Tone
from shmepoch.ids import SessionId
from shmepoch.memory.namespaces import segment_name
from shmepoch.memory.participants import Role
from shmepoch.monitoring.epochs import EpochState, EpochSummary

#: The name of a row: the namespace and the session, as in its segment's name.
Key: TypeAlias = tuple[str, SessionId]

STATES: Final = {
    EpochState.OPEN: ("● open", Tone.GOOD),
    EpochState.ABANDONED: ("○ abandoned", Tone.WARN),
    EpochState.SEALED: ("■ sealed", Tone.DIM),
    EpochState.DAMAGED: ("✗ damaged", Tone.BAD),
}
_LETTERS: Final = {
    Role.RUNTIME: "R",
    Role.AGENT: "A",
    Role.WORKER: "W",
    Role.PERSISTENCE: "P",
    Role.OBSERVER: "O",
}
_GAP: Final = "  "
#: The beginning of an id tells when it was made; its end tells it from others of that time.
_SHORT_SESSION: Final = 8, 6


class Row(NamedTuple):
    """One epoch, as of the last poll."""

    summary: EpochSummary
    history: History
    now_ms: int

    @property
    def key(self) -> Key:
        return self.summary.namespace, self.summary.session_id

    @property
    def operations(self) -> int:
        """The number of operations that have not ended."""
        return sum(self.summary.operations.values())

    @property
    def damaged(self) -> bool:
        return self.summary.state is EpochState.DAMAGED

    @property
    def problem(self) -> str:
        """The damage of a damaged one, without the segment's name, which the row shows."""
        name = segment_name(*self.key)
        return (self.summary.problem or "").removeprefix(f"segment {name!r} is ")

    @property
    def age_ms(self) -> int:
        """The time since the epoch was made; 0 if that is not known."""
        created_at_ms = self.summary.created_at_ms
        return max(0, self.now_ms - created_at_ms) if created_at_ms else 0


class Column(NamedTuple):
    """A column: its cell for a row, and its sort order. Columns of a low rank get room first."""

    name: str
    rank: int
    width: int
    cell: Callable[[Row, int], Piece]
    order: Callable[[Row], Any]
    most: int = 0
    """The largest width, where there is room; 0: it does not grow."""
    right: bool = False
    largest_first: bool = False


def _plain(show: Callable[[Row], str]) -> Callable[[Row, int], Piece]:
    return lambda row, _: (show(row), Tone.PLAIN)


def _figure(
    name: str,
    *,
    rank: int,
    width: int,
    of: Callable[[Row], float],
    show: Callable[[float], str] = text.number,
) -> Column:
    return Column(
        name=name,
        rank=rank,
        width=width,
        cell=_plain(lambda row: show(of(row))),
        order=of,
        right=True,
        largest_first=True,
    )


def _lag(name: str, cursor: str, *, rank: int, width: int) -> Column:
    def cell(row: Row, _: int) -> Piece:
        lag = row.summary.lags[cursor]
        return text.number(lag), Tone.WARN if lag else Tone.DIM

    column = _figure(name, rank=rank, width=width, of=lambda row: row.summary.lags[cursor])
    return column._replace(cell=cell)


def _minute(name: str, *, rank: int, of: Callable[[Row], list[float | None]]) -> Column:
    return Column(
        name=name,
        rank=rank,
        width=8,
        most=STEPS,
        cell=lambda row, width: (text.sparkline(of(row), width), Tone.FIGURE),
        order=lambda row: max((value or 0 for value in of(row)), default=0),
        right=True,
        largest_first=True,
    )


def _session(row: Row, width: int) -> Piece:
    id = str(row.summary.session_id)
    if width < len(id):
        begin, end = _SHORT_SESSION
        id = f"{id[:begin]}…{id[-end:]}"
    return id, Tone.PLAIN


def _processes(row: Row, _: int) -> Piece:
    dead = row.summary.dead
    return _letters(row.summary.participants, dead), Tone.BAD if dead else Tone.PLAIN


def _letters(participants: dict[Role, int], dead: int) -> str:
    """Live participants by the first letter of their role, and the dead: `R A 3W 1 dead`."""
    found = [
        f"{participants[role] if participants[role] > 1 else ''}{letter}"
        for role, letter in _LETTERS.items()
        if participants.get(role)
    ]
    return " ".join([*found, *([f"{dead} dead"] if dead else [])])


#: The columns from left to right.
COLUMNS: Final = (
    Column(
        name="session",
        rank=0,
        width=sum(_SHORT_SESSION) + 1,
        most=36,
        cell=_session,
        order=lambda row: row.summary.session_id,
    ),
    Column(
        name="state",
        rank=1,
        width=11,
        cell=lambda row, _: STATES[row.summary.state],
        order=lambda row: row.summary.state,
    ),
    Column(
        name="namespace",
        rank=2,
        width=10,
        most=16,
        cell=_plain(lambda row: row.summary.namespace),
        order=lambda row: row.summary.namespace,
    ),
    Column(
        name="processes",
        rank=9,
        width=14,
        most=22,
        cell=_processes,
        order=lambda row: sum(row.summary.participants.values()),
        largest_first=True,
    ),
    _figure("ops", rank=5, width=6, of=lambda row: row.operations),
    _figure("ended", rank=14, width=9, of=lambda row: row.summary.ended),
    _figure("watermark", rank=7, width=10, of=lambda row: row.summary.watermark),
    _lag("lag applied", "agent_applied_cursor", rank=4, width=12),
    _lag("observed", "runtime_observed_seq", rank=11, width=9),
    _lag("injected", "runtime_last_injected_seq", rank=12, width=9),
    _minute("lag 1m", rank=8, of=lambda row: row.history.lags),
    _figure("rate", rank=3, width=8, of=lambda row: row.history.rate, show=text.rate),
    _minute("rate 1m", rank=10, of=lambda row: row.history.rates),
    _figure("memory", rank=13, width=7, of=lambda row: row.summary.bytes, show=text.size),
    _figure("age", rank=6, width=6, of=lambda row: row.age_ms, show=text.duration)._replace(
        largest_first=False
    ),
)
_BY_NAME: Final = {column.name: column for column in COLUMNS}


class Fitted(NamedTuple):
    """The columns that fit a width, and their widths."""

    columns: tuple[tuple[Column, int], ...]

    @classmethod
    def to(cls, width: int, *, namespaces: bool) -> Fitted:
        """The columns for a terminal. Several namespaces have a column of their own."""
        widths: dict[str, int] = {}
        room = width + len(_GAP)
        columns = sorted(COLUMNS, key=lambda column: column.rank)
        for column in columns:
            if column.name == "namespace" and not namespaces:
                continue
            if room < column.width + len(_GAP):
                break  # no column of a higher rank either: the width alone decides on the columns
            widths[column.name] = column.width
            room -= column.width + len(_GAP)
        for column in columns:
            if column.name in widths and column.most:
                more = min(room, column.most - column.width)
                if column.name == "session" and more < column.most - column.width:
                    continue  # an id is whole, or short with the same width in each row
                widths[column.name] += more
                room -= more
        return cls(tuple((each, widths[each.name]) for each in COLUMNS if each.name in widths))

    def heading(self, sort: Sort) -> Line:
        """The names of the columns; the sort column has an arrow."""
        pieces = [(self._name(column, width, sort), Tone.HEADING) for column, width in self.columns]
        return tuple(_apart(pieces))

    def _name(self, column: Column, width: int, sort: Sort) -> str:
        if column.name != sort.column:
            return text.fitted(column.name, width, right=column.right)
        arrow = "▼" if sort.descending else "▲"
        name = f"{arrow}{column.name}" if column.right else f"{column.name}{arrow}"
        return text.fitted(name, width, right=column.right)

    def row(self, row: Row, width: int) -> Line:
        """The cells of a row; a damaged one has its problem in place of its figures."""
        columns = self.columns
        if row.damaged:
            columns = tuple(each for each in columns if each[0].rank <= _BY_NAME["namespace"].rank)
        pieces = []
        for column, room in columns:
            shown, tone = column.cell(row, room)
            pieces.append((text.fitted(shown, room, right=column.right), tone))
            width -= room + len(_GAP)
        if row.damaged and width > 0:
            pieces.append((text.fitted(text.one_line(row.problem), width).rstrip(), Tone.BAD))
        return tuple(_apart(pieces))

    def column_at(self, x: int) -> str | None:
        """The name of the column at `x` cells from the left."""
        for column, width in self.columns:
            if x < width + len(_GAP):
                return column.name
            x -= width + len(_GAP)
        return None


def _apart(pieces: Iterable[Piece]) -> Iterable[Piece]:
    for index, piece in enumerate(pieces):
        if index:
            yield _GAP, Tone.PLAIN
        yield piece


@dataclass(frozen=True)
class Sort:
    """The order of the rows. Damaged epochs are always first."""

    column: str = "session"
    descending: bool = False

    @classmethod
    def by(cls, column: str) -> Sort:
        """The order by a column, in its usual direction."""
        return cls(column, _BY_NAME[column].largest_first)

    def clicked(self, column: str) -> Sort:
        """The order by the chosen column; reversed if it was the order already."""
        return self.reversed() if column == self.column else Sort.by(column)

    def reversed(self) -> Sort:
        return Sort(self.column, not self.descending)

    def next(self, columns: Sequence[str], step: int) -> Sort:
        """The order by the next shown column, at `step` columns to the right."""
        if self.column not in columns:
            return Sort.by(columns[0])
        return Sort.by(columns[(columns.index(self.column) + step) % len(columns)])

    def apply(self, rows: Iterable[Row]) -> list[Row]:
        order = _BY_NAME[self.column].order
        ordered = sorted(rows, key=lambda row: row.key)
        ordered.sort(key=order, reverse=self.descending)
        ordered.sort(key=lambda row: not row.damaged)
        return ordered
