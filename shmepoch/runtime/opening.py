"""The source of an epoch: the session's live segment, or the store, or a new one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, TypeAlias

from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.errors import (
    RuntimeAlreadyActive,
    SegmentCorrupted,
    SegmentExists,
    StoreLoadFailed,
)
from shmepoch.events import Event, about
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.participants import Role
from shmepoch.memory.removal import abandon
from shmepoch.memory.segment import SharedSegment
from shmepoch.runtime.durability import Durability
from shmepoch.runtime.supervision import EpochSupervisor

_log = logging.getLogger(__name__)

#: Called with an epoch after it is owned; an error from it undoes that.
Adopt: TypeAlias = Callable[[EpochSupervisor], None]


class EpochOpener:
    """Opens the epochs of one adapter. Each call either hands an epoch over, or leaves nothing
    behind."""

    def __init__(
        self,
        namespace: str,
        config: OpsLifecycleConfig,
        durability: Durability | None,
        *,
        rotate_if_unloadable: bool,
        check_open: Callable[[], None],
    ) -> None:
        self._namespace: Final = namespace
        self._config = config
        self._durability: Final = durability
        self._rotate_if_unloadable: Final = rotate_if_unloadable
        #: Raises if the adapter is closed.
        self._check_open: Final = check_open

    def open(self, session_id: SessionId, adopt: Adopt) -> SessionRuntimeBindings:
        """The epoch of a session that has no other runtime. Raises `RuntimeAlreadyActive`,
        `SharedMemoryExhausted`, `StoreLoadFailed`, and the errors of a segment that is not
        valid."""
        abandoned = False
        while True:
            self._check_open()
            try:
                bindings = self._find(session_id, adopt)
            except SegmentExists:
                continue  # another runtime was faster; the next pass names it
            except SegmentCorrupted as error:
                if abandoned or not self._rotate_if_unloadable:
                    raise
                if not abandon(self._namespace, session_id):
                    raise
                _log.exception(
                    "session %s: its damaged segment was removed",
                    session_id,
                    extra=about(Event.SEGMENT_ABANDONED, session=session_id, reason=str(error)),
                )
                abandoned = True
                continue
            if bindings is not None:
                return bindings

    def _find(self, session_id: SessionId, adopt: Adopt) -> SessionRuntimeBindings | None:
        """A session's epoch from its segment or the store; None if it has moved meanwhile."""
        try:
            found = SharedSegment.attach(self._namespace, session_id)
        except FileNotFoundError:
            return self._recover(session_id, adopt)
        return self._take_over(session_id, found, adopt)

    def _take_over(
        self, session_id: SessionId, found: SharedSegment, adopt: Adopt
    ) -> SessionRuntimeBindings | None:
        """Become the runtime of a live segment, whose runtime was killed or closed.

        OWN-1: only the owner of the segment that has the session's name gives that name to another
        segment, or removes it. A segment may have lost the name before its owner left it, so the
        name is checked after the segment was taken over.
        """
        bindings = SessionRuntimeBindings.of_segment(found)
        segment = bindings.shared_segment()
        with ExitStack() as undo:
            if segment is found:
                undo.callback(bindings.close)
            if not segment.try_own():
                runtimes = [p.pid for p in bindings.participants() if p.role is Role.RUNTIME]
                raise RuntimeAlreadyActive(session_id, runtimes[0] if runtimes else 0)
            if segment is not found:  # this process used it before, and still uses it
                undo.callback(segment.disown, segment.role)
            if not segment.named:
                return None
            if segment.sealed:
                # Its runtime was killed between sealing it and replacing or removing it.
                if self._durability is not None:
                    self._durability.follow(bindings)
                return self.renew(session_id, bindings, adopt)
            segment.join(Role.RUNTIME)
            owned = EpochSupervisor(bindings)
            owned.settle()  # not for a new epoch: no process has left operations in it yet
            self._hand_over(owned, adopt)
            undo.pop_all()
        _log.info(
            "session %s: live epoch %s",
            session_id,
            segment.epoch_id,
            extra=about(Event.EPOCH_CONTINUED, session=session_id, epoch=segment.epoch_id),
        )
        return bindings

    def renew(
        self, session_id: SessionId, old: SessionRuntimeBindings, adopt: Adopt
    ) -> SessionRuntimeBindings:
        """A new epoch that replaces a sealed one, which this process owns."""
        if self._durability is not None:
            self._durability.end(old)
        bindings = self._make(
            session_id, RuntimeEpochId.new(), adopt, replacing=old.shared_segment()
        )
        old.close()  # last: until then its lock keeps others from replacing it
        _log.info(
            "session %s: new epoch %s after %s",
            session_id,
            bindings.epoch_id,
            old.epoch_id,
            extra=about(
                Event.EPOCH_ROTATED,
                session=session_id,
                epoch=bindings.epoch_id,
                before=str(old.epoch_id),
            ),
        )
        return bindings

    def _recover(self, session_id: SessionId, adopt: Adopt) -> SessionRuntimeBindings:
        """The stored epoch of a session that has no live segment, or else a new one."""
        stored = None
        if self._durability is not None:
            stored = self._durability.load(session_id, self._config)
        if stored is None:
            why = "no store" if self._durability is None else "the store has none"
            return self._create(session_id, adopt, why)
        try:
            bindings = self._make(session_id, stored.epoch_id, adopt, stored=stored)
        except StoreLoadFailed as error:
            if self._durability is None or not self._durability.rotates(error):
                raise
            return self._create(session_id, adopt, "the stored one cannot be continued")
        _log.info(
            "session %s: epoch %s from the store, through %d",
            session_id,
            stored.epoch_id,
            stored.last_seq,
            extra=about(
                Event.EPOCH_RECOVERED,
                session=session_id,
                epoch=stored.epoch_id,
                seq=stored.last_seq,
            ),
        )
        return bindings

    def _create(self, session_id: SessionId, adopt: Adopt, why: str) -> SessionRuntimeBindings:
        """A new epoch for a session that has none to go on with."""
        bindings = self._make(session_id, RuntimeEpochId.new(), adopt)
        _log.info(
            "session %s: new epoch %s, %s",
            session_id,
            bindings.epoch_id,
            why,
            extra=about(
                Event.EPOCH_CREATED, session=session_id, epoch=bindings.epoch_id, reason=why
            ),
        )
        return bindings

    def _make(
        self,
        session_id: SessionId,
        epoch_id: RuntimeEpochId,
        adopt: Adopt,
        *,
        replacing: SharedSegment | None = None,
        stored: PersistedOpsSnapshot | None = None,
    ) -> SessionRuntimeBindings:
        """Make an epoch. Raises `SegmentExists` if the session has a segment other than
        `replacing`, or had one since `stored` was loaded."""
        config = self._config
        if stored is not None and self._durability is not None:
            config = self._durability.room_for(stored, config)
            if config != self._config:
                _log.info(
                    "session %s: epoch %s is recovered into more room, %s",
                    session_id,
                    epoch_id,
                    config,
                    extra=about(Event.EPOCH_ENLARGED, session=session_id, epoch=epoch_id),
                )
        segment = SharedSegment.allocate(
            self._namespace, config, session_id=session_id, epoch_id=epoch_id
        )
        with ExitStack() as undo:
            undo.callback(segment.close)
            segment.try_own()
            segment.join(Role.RUNTIME)
            if stored is not None and self._durability is not None:
                self._durability.restore(segment, stored)
            segment.publish(replace=replacing is not None and replacing.named)
            undo.callback(self._unpublish, segment)
            # From here on the name keeps others away, and any change that they made before is
            # visible.
            if stored is not None and not self._is_current(session_id, stored):
                raise SegmentExists(segment.name)
            bindings = SessionRuntimeBindings.of_segment(segment)
            self._hand_over(EpochSupervisor(bindings), adopt)
            undo.pop_all()
        return bindings

    @staticmethod
    def _unpublish(segment: SharedSegment) -> None:
        # If it was left already, another attachment may have taken it over.
        if segment.attached:
            segment.unlink()

    def _is_current(self, session_id: SessionId, stored: PersistedOpsSnapshot) -> bool:
        return self._durability is None or self._durability.is_current(session_id, stored)

    def _hand_over(self, owned: EpochSupervisor, adopt: Adopt) -> None:
        if self._durability is not None:
            self._durability.follow(owned.bindings)
        adopt(owned)
