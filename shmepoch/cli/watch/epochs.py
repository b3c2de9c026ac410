"""The first screen, apart from its widgets: the known facts of the epochs, and their totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from shmepoch.cli.streams import counted
from shmepoch.cli.watch import text
from shmepoch.cli.watch.columns import STATES, Key, Row, Sort
from shmepoch.cli.watch.history import History
from shmepoch.cli.watch.text import Piece, Tone
from shmepoch.monitoring.epochs import EpochState, EpochSummary


class Epochs:
    """The known facts of the epochs: the last poll of each, and its history of the last minute."""

    def __init__(self) -> None:
        self.rows: dict[Key, Row] = {}

    def update(self, summaries: Iterable[EpochSummary], now: float, now_ms: int) -> None:
        """Take the result of a poll at `now`, a time of a clock that does not go backwards."""
        rows: dict[Key, Row] = {}
        for summary in summaries:
            key = summary.namespace, summary.session_id
            before = self.rows.get(key)
            if before is None or before.summary.epoch_id not in (None, summary.epoch_id):
                history = History()
            else:
                history = before.history
            if summary.state is not EpochState.DAMAGED:
                history.add(now, summary.watermark, max(summary.lags.values()))
            rows[key] = Row(summary, history, now_ms)
        self.rows = rows

    def chosen(self, filter: str, sort: Sort) -> list[Row]:
        """The rows that match every word of the filter, in order."""
        words = filter.lower().split()
        return sort.apply(row for row in self.rows.values() if _matches(row, words))


def _matches(row: Row, words: Sequence[str]) -> bool:
    if not words:
        return True
    summary = row.summary
    roles = " ".join(role for role, count in summary.participants.items() if count)
    dead = "dead" if summary.dead else ""
    of = (summary.session_id, summary.epoch_id, summary.namespace, summary.state, roles, dead)
    said = " ".join(map(str, (*of, summary.problem or ""))).lower()
    return all(word in said for word in words)


def totals(rows: Sequence[Row]) -> list[Piece]:
    """The totals of all epochs; problems are first."""
    states = Counter(row.summary.state for row in rows)
    dead = sum(row.summary.dead for row in rows)
    live = sum(sum(row.summary.participants.values()) for row in rows)
    operations = sum(row.operations for row in rows)
    lag = max((max(row.summary.lags.values()) for row in rows), default=0)
    pieces = [(counted(len(rows), "epoch"), Tone.TITLE)]
    for state in (
        EpochState.DAMAGED,
        EpochState.ABANDONED,
        EpochState.OPEN,
        EpochState.SEALED,
    ):
        if states[state]:
            symbol, _, word = STATES[state][0].partition(" ")
            pieces.append((f"{symbol} {states[state]} {word}", STATES[state][1]))
    if dead:
        pieces.append((f"{dead} dead", Tone.BAD))
    pieces += [
        (f"lag {text.number(lag)}", Tone.WARN if lag else Tone.PLAIN),
        (text.rate(sum(row.history.rate for row in rows)), Tone.PLAIN),
        (f"{text.number(operations)} ops", Tone.PLAIN),
        (f"{text.number(live)} live", Tone.PLAIN),
        (text.size(sum(row.summary.bytes for row in rows)), Tone.PLAIN),
    ]
    return pieces
