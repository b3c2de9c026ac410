"""OpenTelemetry spans of operations, made of the completion feed once they have ended.

A trace costs the processes that run operations nothing: a tracer reads the feed like any other
consumer.
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
from typing import Final, Self

try:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Status, StatusCode, TracerProvider, get_tracer_provider
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the traces of shmepoch need its extra: pip install 'shmepoch[tracing]'", name=error.name
    ) from None

from shmepoch.arguments import require, require_position
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.completions import CompletionEntry, CompletionFeedGap, CompletionSeq
from shmepoch.epoch.operations import Failed, Terminated, status_of
from shmepoch.errors import EpochGone, EpochSealed, ShmepochError
from shmepoch.events import Event, about

_log = logging.getLogger(__name__)

#: How soon a tracer's thread notices that it is to end.
_LOOK_S: Final = 0.25


class OperationTracer:
    """Makes a span of each ended operation of an epoch.

    As a context manager it follows the epoch in a thread of its own, until the block or the epoch
    ends. Without a thread, call `emit` to make the spans that are due; in an event loop, call it
    after each `await feed.advanced(tracer.position)`.
    """

    def __init__(
        self,
        bindings: SessionRuntimeBindings,
        tracer_provider: TracerProvider | None = None,
        *,
        after_seq: CompletionSeq = 0,
    ) -> None:
        """Begin after a sequence of the feed. The spans go to the provider, or to the global one.

        `bindings` may be an observer's. Raises `EpochGone` and `EpochSealed` where they cannot
        attach any more.
        """
        require(SessionRuntimeBindings, bindings, "OperationTracer", "bindings")
        self._position = require_position(after_seq, "OperationTracer", "after_seq")
        self._tracer: Final = (tracer_provider or get_tracer_provider()).get_tracer(
            "shmepoch", importlib.metadata.version("shmepoch")
        )
        self._registry: Final = bindings.ops_lifecycle
        self._feed: Final = self._registry.completion_feed()
        self._epoch: Final = {
            "session.id": str(bindings.session_id),
            "shmepoch.epoch.id": str(bindings.epoch_id),
        }
        #: The entries that were dropped since the last span. The next span tells of them.
        self._gap: CompletionFeedGap | None = None
        self._lock = threading.Lock()
        self._end: Final = threading.Event()
        self._thread: Final = threading.Thread(
            target=self._follow, name="shmepoch-tracer", daemon=True
        )

    @property
    def position(self) -> CompletionSeq:
        """The last sequence that was handled. Another tracer goes on after it."""
        return self._position

    def emit(self) -> int:
        """Make the spans of the operations that have ended since the last call; their number.

        Raises `SegmentCorrupted` for an entry that is damaged.
        """
        with self._lock:
            batch = self._feed.list_since(self._position)
            gap = batch.gap_after(self._position)
            if gap is not None:
                after = self._gap.after_seq if self._gap is not None else gap.after_seq
                self._gap = CompletionFeedGap(after, gap.dropped_through)
            for entry in batch.entries:
                self._emit(entry)
                self._position = entry.seq
            self._position = max(self._position, batch.watermark)
            return len(batch.entries)

    def _emit(self, entry: CompletionEntry) -> None:
        view = self._registry.ended_by(entry)  # None: the span is of no length, at the end
        status = status_of(entry.terminal_outcome)
        span = self._tracer.start_span(
            entry.display_name,
            context=Context(),  # it is no part of what this process is tracing just now
            start_time=_ns(entry.completed_at_ms if view is None else view.created_at_ms),
            attributes={
                **self._epoch,
                "shmepoch.seq": entry.seq,
                "shmepoch.operation.id": str(entry.operation_id),
                "shmepoch.operation.kind": str(entry.kind),
                "shmepoch.operation.status": str(status),
            },
        )
        ended_ns = _ns(entry.completed_at_ms)
        if view is not None:
            span.set_attribute("shmepoch.operation.source", view.spec.source_label)
            if view.started_at_ms is not None:
                span.add_event("started", timestamp=_ns(view.started_at_ms))
            progress = view.detail.last_progress
            if progress is not None:
                # The time of the report is not known; only that it was the last one.
                facts: dict[str, str | int | float] = {
                    "message": progress.message,
                    "count": view.detail.progress_count,
                }
                if progress.percent is not None:
                    facts["percent"] = progress.percent
                span.add_event("progress", facts, timestamp=ended_ns)
        self._tell_gap(span, ended_ns)
        match entry.terminal_outcome:
            case Failed(reason) | Terminated(reason):
                span.set_attribute("error.type", str(status))
                span.set_status(Status(StatusCode.ERROR, reason))
        span.end(ended_ns)

    def _tell_gap(self, span: Span, at_ns: int) -> None:
        """Say on the first span after a gap which operations have no span."""
        if self._gap is not None:
            facts = {
                "after_seq": self._gap.after_seq,
                "dropped_through": self._gap.dropped_through,
                "missing": self._gap.missing,
            }
            span.add_event("gap", facts, timestamp=at_ns)
            self._gap = None

    # --- a thread of its own ----------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()
        self._emit_or_say()  # what was committed since

    def _follow(self) -> None:
        while not self._end.is_set():
            try:
                self._feed.wait_for_advance(self._position, _LOOK_S)
            except TimeoutError:
                continue
            except (EpochSealed, EpochGone):
                return  # all its spans are made
            if not self._emit_or_say():
                return

    def _emit_or_say(self) -> bool:
        """Make the spans that are due; False if that failed, which is logged."""
        try:
            self.emit()
            return True
        except ShmepochError as error:
            _log.error(
                "no more spans of epoch %s: %s",
                self._epoch["shmepoch.epoch.id"],
                error,
                extra=about(
                    Event.TRACING_FAILED,
                    session=self._epoch["session.id"],
                    epoch=self._epoch["shmepoch.epoch.id"],
                    seq=self._position,
                    reason=str(error),
                ),
            )
            return False


def _ns(wall_ms: int) -> int:
    return wall_ms * 1_000_000
