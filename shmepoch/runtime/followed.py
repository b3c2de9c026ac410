"""One epoch that a persistence channel follows, and how much of it is stored."""

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
from shmepoch.events import Event, about
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.stores.protocol import EpochCapture, RuntimeStore

_log = logging.getLogger(__name__)


class EpochPersistence(Record, kw_only=True, frozen=True):
    """The store's progress with one epoch."""

    session_id: SessionId
    epoch_id: RuntimeEpochId
    watermark: CompletionSeq
    durable_seq: CompletionSeq
    """Every completion up to this one is in the store, unless it was missed."""
    missed: int = 0
    """Completions that retention dropped before the channel had read them."""
    last_gap: CompletionFeedGap | None = None
    """The last of the gaps that `missed` counts."""
    error: str | None = None
    """Why this epoch can never be stored again; None while it can."""
    failure: str | None = None
    """Why the last attempt to store its news failed; it is tried again."""

    @property
    def lag(self) -> int:
        """How many completions are not in the store yet."""
        return self.watermark - self.durable_seq


class _Fingerprint(NamedTuple):
    """A cheap comparison that shows whether there is something to store."""

    watermark: CompletionSeq
    active: int
    cursors: EpochCursorSnapshot
    sealed: bool


class Reading(NamedTuple):
    """One reading of an epoch: the capture for the store, and the state after the store has it."""

    capture: EpochCapture
    fingerprint: _Fingerprint
    watermark: CompletionSeq
    gap: CompletionFeedGap | None
    live: dict[OperationId, OperationLifecycleSnapshot]


class Followed:
    """An epoch, and the store's progress with it. Changed by its channel's thread only."""

    def __init__(self, bindings: SessionRuntimeBindings) -> None:
        self.bindings: Final = bindings
        self.feed: Final = bindings.ops_lifecycle.completion_feed()
        self.durable: CompletionSeq = 0
        #: Why it can never be stored again; set by the channel.
        self.error: Exception | None = None
        #: Why the last attempt failed, how often it failed alone, and whether it failed while the
        #: store took others; set by the channel.
        self.failure: Exception | None = None
        self.failures = 0
        self.is_suspect = False
        #: The wait for its next completion; kept by the channel.
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

        The comparison does not include the progress of running operations. With `thoroughly`, an
        epoch with running operations always counts as changed.
        """
        if self.error is not None:
            return False
        now = self._fingerprint()
        return now != self._stored or (thoroughly and now.active > 0)

    def locate(self, store: RuntimeStore) -> None:
        """Ask the store where the next reading begins, if that is not known."""
        if self._position is None:
            last = store.last_seq(self.id)
            after, through = self.bindings.skipped
            # No completion has a sequence that recovery skipped, so these are not missing.
            self._position = through if after <= last < through else last

    def read(self) -> Reading:
        """Read what the store does not have yet. `locate` was called before."""
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
        """Record that the store has taken `reading`."""
        self._stored = reading.fingerprint
        self._position = self.durable = reading.watermark
        self._live = reading.live
        if self.is_suspect:
            _log.info(
                "epoch %s is stored again",
                self.id,
                extra=about(
                    Event.EPOCH_TAKEN,
                    session=self.bindings.session_id,
                    epoch=self.id,
                    seq=reading.watermark,
                ),
            )
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
                extra=about(
                    Event.STORE_GAP,
                    session=self.bindings.session_id,
                    epoch=self.id,
                    seq=reading.gap.dropped_through,
                    completions=reading.gap.missing,
                ),
            )
        self.feed.mark_durable(reading.watermark)

    def ask_again(self) -> None:
        """Forget what the store holds, since it is uncertain; the next reading asks the store."""
        self._position = None
        self._live = {}

    def status(self) -> EpochPersistence:
        """The store's progress with it."""
        durable = self.durable  # read before the watermark, which is then never below it
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
