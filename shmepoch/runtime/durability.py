"""The durable side of an adapter: its use of the store and of the persistence channel."""

from __future__ import annotations

import logging
from typing import Final

from shmepoch._native import RECOVERY_SKIP
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.cursors import EpochCursorState
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.recovery import require_consistent, room_for
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.errors import (
    CaptureInvalid,
    PayloadTooLarge,
    RecordInvalid,
    SegmentCorrupted,
    StoreLoadFailed,
)
from shmepoch.events import Event, about
from shmepoch.ids import SessionId
from shmepoch.memory.layout import Layout
from shmepoch.memory.segment import SharedSegment
from shmepoch.runtime.persistence import PersistenceChannel
from shmepoch.stores import EpochCapture, RuntimeStore

_log = logging.getLogger(__name__)

#: How long the end of an epoch waits for a failing or slow store.
_END_TIMEOUT_S: Final = 10.0


class Durability:
    """One store, the channel that fills it, and the recovery from it."""

    def __init__(
        self, store: RuntimeStore, terminate_unfinished: bool, rotate_if_unloadable: bool
    ) -> None:
        self.store = store
        self.channel = PersistenceChannel(store)
        self._terminate_unfinished = terminate_unfinished
        self._rotate_if_unloadable = rotate_if_unloadable

    def load(
        self, session_id: SessionId, config: OpsLifecycleConfig
    ) -> PersistedOpsSnapshot | None:
        """The session's stored epoch, or None, with as many completions as can fit an epoch of this
        size. A store that fails to load is not an empty store: it raises `StoreLoadFailed`, unless
        the adapter rotates."""
        try:
            stored = self.store.load(session_id, max_entries=Layout(config).entries)
            if stored is not None:
                _require_consistent(session_id, stored)
            return stored
        except StoreLoadFailed as error:
            if not self.rotates(error):
                raise
            return None

    def rotates(self, error: StoreLoadFailed) -> bool:
        """Whether to start a new epoch for a session that cannot be loaded."""
        if self._rotate_if_unloadable:
            _log.error(
                "session %s: not loadable, so its epoch is rotated",
                error.session_id,
                exc_info=error,
                extra=about(
                    Event.STORED_EPOCH_ABANDONED, session=error.session_id, reason=error.reason
                ),
            )
        return self._rotate_if_unloadable

    def room_for(
        self, stored: PersistedOpsSnapshot, config: OpsLifecycleConfig
    ) -> OpsLifecycleConfig:
        """The size of an epoch that continues a stored one: `config`, or larger."""
        return room_for(stored, config, unfinished=self._terminate_unfinished)

    def is_current(self, session_id: SessionId, stored: PersistedOpsSnapshot) -> bool:
        """Whether the store's epoch is still as it was loaded: another runtime may have continued
        and ended it since."""
        now = self.store.load(session_id, max_entries=1)
        return (
            now is not None
            and now.epoch_id == stored.epoch_id
            and now.entries[-1:] == stored.entries[-1:]
        )

    def restore(self, segment: SharedSegment, stored: PersistedOpsSnapshot) -> None:
        """Continue a stored epoch in a segment that no process has found yet.

        Raises `StoreWriteFailed` if the store cannot reserve the sequences that this skips, and
        `StoreLoadFailed` if the stored epoch cannot be continued.
        """
        try:
            self._continue(segment, stored)
        except (RecordInvalid, PayloadTooLarge, CaptureInvalid) as error:
            raise StoreLoadFailed(segment.session_id, str(error)) from error

    def _continue(self, segment: SharedSegment, stored: PersistedOpsSnapshot) -> None:
        # Reserved before any process sees a sequence above them: if the machine crashes again
        # before anything is stored, it must not use the same sequences twice.
        reserved = PersistedOpsSnapshot(
            epoch_id=stored.epoch_id, skipped=(stored.left_out(RECOVERY_SKIP),)
        )
        self.store.save([EpochCapture(session_id=segment.session_id, snapshot=reserved)])
        registry = RuntimeOpsLifecycleRegistry(segment)
        registry.restore(stored, skip=RECOVERY_SKIP, unfinished=self._terminate_unfinished)
        EpochCursorState(segment).advance_all(stored.recovered_cursors)
        # These completions came from the store. With `store_wait_ms`, a writer may drop them at
        # once.
        feed = registry.completion_feed()
        feed.mark_durable(feed.watermark())
        if self._terminate_unfinished:
            registry.terminate_owner("the runtime restarted, and the operation with it")

    def follow(self, bindings: SessionRuntimeBindings) -> None:
        """Start to keep an epoch durable."""
        bindings.history = self.store
        self.channel.follow(bindings)

    def end(self, bindings: SessionRuntimeBindings) -> None:
        """Store the end of a sealed epoch, and stop following it.

        Raises `StoreWriteFailed` if the store does not take it, or the error that makes this epoch
        impossible to store; then it goes on following. For a damaged segment only the end is
        stored: anything else that the store does not have is lost.
        """
        try:
            self.channel.flush(_END_TIMEOUT_S, bindings=bindings)
        except (SegmentCorrupted, CaptureInvalid) as error:
            session_id = bindings.session_id
            _log.exception(
                "session %s: everything that is not stored is lost",
                session_id,
                extra=about(
                    Event.UNSTORED_LOST,
                    session=session_id,
                    epoch=bindings.epoch_id,
                    reason=str(error),
                ),
            )
            ended = PersistedOpsSnapshot(epoch_id=bindings.epoch_id)
            self.store.save([EpochCapture(session_id=session_id, snapshot=ended, sealed=True)])
        self.channel.unfollow(bindings)

    def forget(self, bindings: SessionRuntimeBindings) -> None:
        """Stop following an epoch that has not ended, and is out of reach."""
        self.channel.unfollow(bindings)

    def close(self) -> None:
        """Store what is new, and stop."""
        self.channel.close()


def _require_consistent(session_id: SessionId, stored: PersistedOpsSnapshot) -> None:
    try:
        require_consistent(stored)
    except RecordInvalid as error:
        raise StoreLoadFailed(session_id, error.reason) from error
