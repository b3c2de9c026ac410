"""One epoch that a persistence channel follows: what the store does not have of it yet."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, NamedTuple

from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.codec import Record
from shmepoch.epoch.completions import CompletionFeedGap, CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import OperationLifecycleSnapshot
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.stores.protocol import EpochCapture, RuntimeStore

_log = logging.getLogger(__name__)


class EpochPersistence(Record, kw_only=True, frozen=True):
    """How far the store has come with one epoch."""

    session_id: SessionId
    epoch_id: RuntimeEpochId
    watermark: CompletionSeq
    durable_seq: CompletionSeq
    """Every completion up to this one is in the store, unless it is among the missed."""
    missed: int = 0
    """Completions that retention dropped before the channel had read them."""
    last_gap: CompletionFeedGap | None = None
    """The last of the gaps that `missed` counts."""
    error: str | None = None
    """Why this epoch cannot be stored any more, whatever is tried; None while it can."""
    failure: str | None = None
    """Why the store did not take what is new of it the last time; it is tried again."""

    @property
    def lag(self) -> int:
        """How many completions are not in the store yet."""
        return self.watermark - self.durable_seq


class _Fingerprint(NamedTuple):
    """What tells, at little cost, whether there is something to store."""

    watermark: CompletionSeq
    active: int
    cursors: EpochCursorSnapshot
    sealed: bool


class Reading(NamedTuple):
    """What was read of an epoch, and what will be so once the store has it."""

    capture: EpochCapture
    fingerprint: _Fingerprint
    watermark: CompletionSeq
    gap: CompletionFeedGap | None
    live: dict[OperationId, OperationLifecycleSnapshot]


class Followed:
    """An epoch, and how far the store has come with it. Changed by its channel's thread only."""

    def __init__(self, bindings: SessionRuntimeBindings) -> None:
        self.bindings: Final = bindings
        self.feed: Final = bindings.ops_lifecycle.completion_feed()
        self.durable: CompletionSeq = 0
        #: Why it cannot be stored any more; the channel's to say.
        self.error: Exception | None = None
        #: Why it was not stored the last time, how often it failed alone, and whether it did so
        #: while the store took others; the channel's to say.
        self.failure: Exception | None = None
        self.failures = 0
        self.is_suspect = False
        #: The wait for its next completion; the channel's to keep.
        self.waiting: asyncio.Task[None] | None = None
        self._missed = 0
        self._last_gap: CompletionFeedGap | None = None
        self._stored: _Fingerprint | None = None
        self._position: CompletionSeq | None = None
        self._live: dict[OperationId, OperationLifecycleSnapshot] = {}

    @property
    def id(self) -> RuntimeEpochId:
        return self.bindings.epoch_id

    def pending(self) -> int:
        """How many completions were committed and are not stored."""
        return self.feed.watermark() - self.durable

    def is_due(self, *, thoroughly: bool) -> bool:
        """Whether there is something to store.

        How far running operations have come does not show in what is compared; with `thoroughly`
        they count as something.
        """
        if self.error is not None:
            return False
        now = self._fingerprint()
        return now != self._stored or (thoroughly and now.active > 0)

    def locate(self, store: RuntimeStore) -> None:
        """Find where the next reading begins, if that is not known."""
        if self._position is None:
            last = store.last_seq(self.id)
            after, through = self.bindings.skipped
            # No completion has a sequence that recovery skipped, so none of those is missing.
            self._position = through if after <= last < through else last

    def read(self) -> Reading:
        """What the store does not have yet; it was located before."""
        bindings = self.bindings
        assert self._position is not None
        fingerprint = self._fingerprint()
        # `capture_news` keeps PERSIST-1: an operation that ended meanwhile has its entry with it.
        snapshot, batch = bindings.ops_lifecycle.capture_news(
            bindings.epoch_id, bindings.cursor_state, self._position
        )
        ended = {entry.operation_id for entry in batch.entries}
        live = {o.id: o for o in snapshot.operations if not o.status.is_terminal}
        news = {
            operation.id: operation
            for operation in snapshot.operations
            if operation.id in ended
            or (operation.id in live and self._live.get(operation.id) != operation)
        }
        capture = EpochCapture(
            session_id=bindings.session_id,
            snapshot=PersistedOpsSnapshot(
                epoch_id=bindings.epoch_id,
                operations=tuple(news.values()),
                specs=tuple(spec for spec in snapshot.specs if spec.id in news),
                entries=batch.entries,
                cursors=snapshot.cursors,
            ),
            sealed=fingerprint.sealed,
        )
        gap = batch.gap_after(self._position)
        return Reading(capture, fingerprint, batch.watermark, gap, live)

    def stored(self, reading: Reading) -> None:
        """The store has taken `reading`."""
        self._stored = reading.fingerprint
        self._position = self.durable = reading.watermark
        self._live = reading.live
        self.failures, self.is_suspect = 0, False
        if reading.gap is not None:
            self._missed += reading.gap.missing
            self._last_gap = reading.gap
            _log.error(
                "epoch %s: completions %d to %d were dropped before they were stored; create it "
                "with a larger feed_bytes or max_completed, or with a store_wait_ms",
                self.id,
                reading.gap.after_seq + 1,
                reading.gap.dropped_through,
            )
        self.feed.mark_durable(reading.watermark)

    def ask_again(self) -> None:
        """What the store holds is not certain any more; the next reading begins where it says."""
        self._position = None
        self._live = {}

    def status(self) -> EpochPersistence:
        """How far the store has come with it."""
        durable = self.durable  # before the watermark, which is never below it then
        return EpochPersistence(
            session_id=self.bindings.session_id,
            epoch_id=self.id,
            watermark=self.feed.watermark(),
            durable_seq=durable,
            missed=self._missed,
            last_gap=self._last_gap,
            error=None if self.error is None else str(self.error),
            failure=None if self.failure is None else str(self.failure),
        )

    def _fingerprint(self) -> _Fingerprint:
        bindings = self.bindings
        return _Fingerprint(
            self.feed.watermark(),
            bindings.ops_lifecycle.active_count(),
            bindings.cursor_state.snapshot(),
            bindings.sealed,
        )
