"""One epoch's page, apart from its widgets: the known facts, and the lines of each part."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from shmepoch.cli.streams import counted
from shmepoch.cli.watch import text
from shmepoch.cli.watch.columns import STATES, Key
from shmepoch.cli.watch.history import STEPS, History
from shmepoch.cli.watch.reading import Place, Seen
from shmepoch.cli.watch.text import Line, Piece, Tone
from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.operations import (
    Completed,
    OperationStatus,
    OperationTerminalOutcome,
    status_of,
)
from shmepoch.epoch.table import OperationView
from shmepoch.memory.participants import Participant
from shmepoch.monitoring.epochs import EpochState

#: The number of lines of the feed that are kept, and of completions that are read at once.
FEED_LINES: Final = 500
#: The time for which a participant is marked that has joined or left.
MARKED_S: Final = 15.0
#: The time after which a writer is marked as stopped, if each poll found one at work. It may also
#: wait for something that is stopped.
_LONG_S: Final = 5.0

_CURSORS: Final = (
    ("agent applied", "agent_applied_cursor"),
    ("runtime observed", "runtime_observed_seq"),
    ("runtime injected", "runtime_last_injected_seq"),
)
_NAME_WIDTH: Final = 16
_STATUS_TONES: Final = {
    OperationStatus.COMPLETED: Tone.GOOD,
    OperationStatus.FAILED: Tone.BAD,
    OperationStatus.ABORTED: Tone.WARN,
    OperationStatus.CANCELLED: Tone.WARN,
    OperationStatus.TERMINATED: Tone.BAD,
}


class _Known(NamedTuple):
    """A participant as of the last poll, and the time since which it has its mark."""

    participant: Participant
    mark: str
    since: float


class Page:
    """The known facts of one epoch: its last poll, and the changes before that."""

    def __init__(self, key: Key) -> None:
        self.key: Final = key
        self.seen: Seen | None = None
        self.problem: str | None = None
        self.history = History()
        self._now = 0.0
        self._now_ms = 0
        self._feed: deque[CompletionEntry | str] = deque(maxlen=FEED_LINES)
        self._read_through: CompletionSeq = 0
        self._participants: dict[int, _Known] = {}
        self._held_since: float | None = None
        self._gone = False

    @property
    def read_through(self) -> CompletionSeq:
        """The sequence up to which the feed was read."""
        return self._read_through

    # --- the known facts ----------------------------------------------------------------------

    def update(self, seen: Seen | None, now: float, now_ms: int) -> None:
        """Take the result of a poll at `now`, a time of a clock that does not go backwards; None if
        there was no epoch."""
        self._now, self._now_ms = now, now_ms
        self._gone = seen is None
        self.problem = None if seen is None else seen.problem or seen.summary.problem
        if seen is None:
            return
        first = self.seen is None or self.seen.summary.epoch_id is None
        self.seen = seen
        if seen.summary.state is EpochState.DAMAGED:
            return
        self.history.add(now, seen.summary.watermark, max(seen.summary.lags.values()))
        self._update_participants(seen.participants, first)
        self._update_feed(seen, first)
        if not seen.writer_held:
            self._held_since = None
        elif self._held_since is None:
            self._held_since = now

    def fail(self, problem: str, now: float, now_ms: int) -> None:
        """Note that the epoch could not be read. The facts of the last poll stay."""
        self._now, self._now_ms = now, now_ms
        self.problem = problem

    def _update_participants(self, found: Sequence[Participant], first: bool) -> None:
        known = self._participants
        present = {one.number: one for one in found}
        for number, one in present.items():
            before = known.get(number)
            if not one.alive:
                mark = "died"
            elif before is None:
                mark = "" if first else "joined"
            else:
                mark = before.mark if self._now - before.since < MARKED_S else ""
            since = before.since if before is not None and before.mark == mark else self._now
            known[number] = _Known(one, mark, since)
        for number in known.keys() - present:
            before = known[number]
            if before.mark != "left":
                known[number] = before._replace(mark="left", since=self._now)
            elif self._now - before.since >= MARKED_S:
                del known[number]

    def _update_feed(self, seen: Seen, first: bool) -> None:
        batch = seen.batch
        if batch is None:
            return
        reached = self._read_through
        begins = batch.entries[0].seq if batch.entries else batch.watermark + 1
        dropped = min(batch.dropped_through, begins - 1)
        if dropped > reached:
            gone = _sequences(reached + 1, dropped)
            when = "" if first else " before they were read"
            self._feed.append(f"{gone} dropped{when}")
            reached = dropped
        if begins - 1 > reached and not first:
            self._feed.append(f"{_sequences(reached + 1, begins - 1)} not shown: too many at once")
        self._feed.extend(batch.entries)
        self._read_through = batch.watermark

    # --- the lines of each part ---------------------------------------------------------------

    def title(self, width: int) -> list[Line]:
        """The epoch's ids, and its state."""
        namespace, session_id = self.key
        pieces: list[Piece] = [(f"session {session_id}", Tone.TITLE)]
        if self.seen is not None:
            summary = self.seen.summary
            pieces += [STATES[summary.state], (f"in {namespace}", Tone.PLAIN)]
            if summary.created_at_ms:
                age = text.duration(self._now_ms - summary.created_at_ms)
                pieces.append((f"age {age}", Tone.PLAIN))
            pieces.append((text.size(summary.bytes), Tone.PLAIN))
            if summary.epoch_id is not None:
                pieces.append((f"epoch {summary.epoch_id}", Tone.DIM))
        return [text.joined(pieces, width)]

    def banner(self, width: int) -> list[Line]:
        """The message about an epoch that does not go on as usual."""
        said: list[Piece] = []
        seen = self.seen
        if seen is None:
            if self._gone:
                said.append(("The session has no epoch in shared memory.", Tone.WARN))
        elif seen.place is Place.REPLACED:
            said.append(
                ("The session has a later epoch; this is what this one held last.", Tone.WARN)
            )
        elif seen.place is Place.REMOVED or self._gone:
            said.append(
                ("Its name is gone from shared memory; this is what it held last.", Tone.WARN)
            )
        elif seen.summary.state is EpochState.SEALED:
            said.append(("Its runtime has ended it: it takes no more changes.", Tone.WARN))
        elif seen.summary.state is EpochState.ABANDONED:
            said.append(("No process is at work in it; a runtime may continue it.", Tone.WARN))
        if self.problem is not None:
            said.append((text.one_line(self.problem), Tone.BAD))
        return [((line, tone),) for words, tone in said for line in text.wrapped(words, width)]

    def cursors(self, width: int) -> list[Line]:
        """The cursors against the watermark."""
        if self.seen is None or self.seen.summary.state is EpochState.DAMAGED:
            return []
        summary = self.seen.summary
        rate = text.rate(self.history.rate)
        room = max(0, width - _NAME_WIDTH - len(rate) - 16)
        lines: list[Line] = [
            (
                (text.fitted("watermark", _NAME_WIDTH), Tone.PLAIN),
                (text.fitted(text.number(summary.watermark), 11, right=True), Tone.PLAIN),
                (f"  {rate}  ", Tone.PLAIN),
                (text.sparkline(self.history.rates, min(STEPS, room)), Tone.FIGURE),
            )
        ]
        positions: list[tuple[str, int]] = [
            (name, getattr(summary.cursors, cursor)) for name, cursor in _CURSORS
        ]
        if summary.durable_through:
            positions.append(("durable", summary.durable_through))
        # Bars begin where the retained feed does: in a long feed, cursors are near the watermark.
        least = min([summary.dropped_through, *(at for _, at in positions)])
        span = max(1, summary.watermark - least)
        for name, position in positions:
            behind = summary.watermark - position
            if behind > 0:
                said, tone = f"{text.number(behind)} behind", Tone.WARN
            elif behind == 0:
                said, tone = "up to date", Tone.GOOD
            else:
                said, tone = f"{text.number(-behind)} ahead", Tone.BAD
            room = max(0, width - _NAME_WIDTH - 13 - 18)
            lines.append(
                (
                    (text.fitted(name, _NAME_WIDTH), Tone.PLAIN),
                    (text.fitted(text.number(position), 11, right=True), Tone.PLAIN),
                    ("  ", Tone.PLAIN),
                    *text.bar(position - least, span, room),
                    (f"  {said}", tone),
                )
            )
        return lines

    def room(self, width: int) -> list[Line]:
        """The use of its tables, and the state of its writer."""
        seen = self.seen
        if seen is None or seen.config is None:
            return []
        config, summary = seen.config, seen.summary
        most_active = config.max_concurrent or config.max_operations
        holders = sum(summary.participants.values()) + summary.dead
        kept = max(0, summary.watermark - summary.dropped_through)
        lines = [
            _fill("operations", len(seen.operations), most_active, str, width),
            _fill("participants", holders, config.max_participants, str, width),
            _fill("feed", seen.feed_bytes, config.feed_bytes, text.size, width, full_is_well=True),
        ]
        writer, tone = self._writer(seen)
        kept_text = f"feed keeps the last {text.number(kept)}"
        return [*lines, text.joined([(writer, tone), (kept_text, Tone.DIM)], width)]

    def _writer(self, seen: Seen) -> Piece:
        if seen.writer_held:
            held = self._now - (self._now if self._held_since is None else self._held_since)
            if held >= _LONG_S:
                return f"writer lock held for {text.duration(held * 1000)}: stopped?", Tone.BAD
            return "writer at work", Tone.PLAIN
        if seen.broken_off:
            return "a writer died in a transition; the next one repairs it", Tone.WARN
        return "writer lock free", Tone.DIM

    def participants(self, width: int, most: int) -> list[Line]:
        """The processes that have it attached, and those that have left or died recently."""
        known = sorted(
            self._participants.values(),
            key=lambda one: (one.participant.role.number, one.participant.number),
        )
        if not known:
            return [(("none", Tone.DIM),)] if self.seen is not None else []
        return _capped([self._participant(one, width) for one in known], most)

    def _participant(self, known: _Known, width: int) -> Line:
        one = known.participant
        symbol, tone = {
            "": ("●", Tone.PLAIN),
            "joined": ("+", Tone.GOOD),
            "died": ("✗", Tone.BAD),
            "left": ("-", Tone.DIM),
        }[known.mark]
        ago = text.duration((self._now - known.since) * 1000)
        said = {
            "": f"for {text.duration(self._now_ms - one.joined_at_ms)}",
            "joined": f"joined {ago} ago",
            "died": f"died, seen {ago} ago; no runtime has cleared it",
            "left": f"gone for {ago}" + ("" if one.alive else ", it had died"),
        }[known.mark]
        return (
            (f"{symbol} {one.role:<12}", tone),
            (f"pid {one.pid:<9}", Tone.PLAIN if known.mark != "left" else Tone.DIM),
            (text.fitted(said, max(0, width - 27)).rstrip(), tone),
        )

    def operations(self, width: int, most: int) -> list[Line]:
        """The operations that have not ended, the longest first."""
        if self.seen is None:
            return []
        views = sorted(self.seen.operations, key=lambda view: (view.created_at_ms, view.birth))
        if not views:
            return [(("none", Tone.DIM),)]
        longest = self._elapsed(views[0])
        return _capped(
            [self._operation(view, longest, width) for view in views[:most]], most, len(views)
        )

    def _elapsed(self, view: OperationView) -> int:
        return max(0, self._now_ms - view.created_at_ms)

    def _operation(self, view: OperationView, longest: int, width: int) -> Line:
        elapsed = self._elapsed(view)
        progress = view.detail.last_progress
        percent = (
            "" if progress is None or progress.percent is None else f"{progress.percent:.0f}% "
        )
        message = "" if progress is None else text.one_line(progress.message)
        name_width = max(8, min(40, (width - 28) * 2 // 5))
        bar_width = max(0, min(24, (width - 28) // 5))
        rest = width - name_width - bar_width - 24
        return (
            (text.fitted(text.one_line(view.spec.display_name), name_width), Tone.PLAIN),
            (f" {view.status:<12}", Tone.DIM if view.status == "provisioning" else Tone.PLAIN),
            (f"{text.duration(elapsed):>7} ", Tone.PLAIN),
            *text.bar(elapsed, max(1, longest), bar_width),
            (" " + text.fitted(percent + message, max(0, rest - 1)).rstrip(), Tone.DIM),
        )

    def feed(self, width: int, most: int) -> list[Line]:
        """The last completions, the newest below."""
        shown = list(self._feed)[-most:] if most > 0 else []
        if not shown and self.seen is not None:
            return [(("no completion yet", Tone.DIM),)]
        return [_entry(one, width) for one in shown]


def _entry(one: CompletionEntry | str, width: int) -> Line:
    if isinstance(one, str):
        return ((text.fitted(f"-- gap: {one} --", width).rstrip(), Tone.WARN),)
    status = status_of(one.terminal_outcome)
    name_width = max(8, min(48, (width - 32) // 2))
    return (
        (text.fitted(text.number(one.seq), 9, right=True), Tone.DIM),
        (f" {_clock(one.completed_at_ms)} ", Tone.DIM),
        (f"{status:<11}", _STATUS_TONES.get(status, Tone.PLAIN)),
        (text.fitted(text.one_line(one.display_name), name_width), Tone.PLAIN),
        (
            " " + text.fitted(_how(one.terminal_outcome), max(0, width - name_width - 31)).rstrip(),
            Tone.DIM,
        ),
    )


def _how(outcome: OperationTerminalOutcome) -> str:
    if isinstance(outcome, Completed):
        in_error = "" if outcome.ok else "error, "
        content = outcome.text.partition("\n")[0]
        return text.one_line(f"{in_error}{text.took(outcome.result.duration_ms)}  {content}")
    return text.one_line(outcome.text)


def _clock(at_ms: int) -> str:
    try:
        return datetime.fromtimestamp(at_ms / 1000).strftime("%H:%M:%S")
    except (ValueError, OverflowError, OSError):  # not a time of the calendar
        return "--:--:--"


def _sequences(first: int, last: int) -> str:
    which = f"{first:,}" if first == last else f"{first:,} to {last:,}"
    return f"{counted(last - first + 1, 'completion')} ({which})"


def _fill(
    name: str,
    part: int,
    whole: int,
    show: Callable[[int], str],
    width: int,
    *,
    full_is_well: bool = False,
) -> Line:
    nearly = part >= whole * 0.9 and not full_is_well
    said = f"{show(part)} of {show(whole)}"
    return (
        (text.fitted(name, _NAME_WIDTH), Tone.PLAIN),
        (text.fitted(said, 19, right=True), Tone.BAD if nearly else Tone.PLAIN),
        ("  ", Tone.PLAIN),
        *text.bar(part, whole, max(0, min(40, width - _NAME_WIDTH - 21 - 6))),
        ("  full" if part >= whole and not full_is_well else "", Tone.BAD),
    )


def _capped(lines: list[Line], most: int, of: int | None = None) -> list[Line]:
    count = len(lines) if of is None else of
    if count <= most:
        return lines
    return [*lines[: most - 1], ((f"and {count - most + 1} more", Tone.DIM),)]
