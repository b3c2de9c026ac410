"""The session adapter: the runtime's end of every session it owns."""

from __future__ import annotations

import logging
import os
import threading
from typing import Self

from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.errors import (
    AdapterClosed,
    RuntimeAlreadyActive,
    SegmentExists,
    SessionNotRegistered,
)
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.bells import remove_unused_bells
from shmepoch.memory.layout import OpsLifecycleConfig
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment, resolve_namespace
from shmepoch.runtime.durability import Durability
from shmepoch.runtime.observing import observe_session
from shmepoch.runtime.supervision import EpochSupervisor, Supervisor
from shmepoch.stores import RuntimeStore

_log = logging.getLogger(__name__)


class RuntimeSessionAdapter:
    """Owns sessions: makes their epochs, finds them again, looks after them and ends them.

    A session has one live runtime. Closing the adapter, or dying, leaves the segments, and the
    next adapter goes on with them. Its methods may be called from any thread; after a fork it
    belongs to the parent.
    """

    def __init__(
        self,
        *,
        namespace: str | None,
        config: OpsLifecycleConfig | None,
        durability: Durability | None = None,
    ) -> None:
        self._namespace = resolve_namespace(namespace)
        self._config = config or OpsLifecycleConfig()
        self._durability = durability
        self._lock = threading.RLock()
        self._sessions: dict[SessionId, SessionRuntimeBindings] = {}
        self._supervised: dict[SessionId, EpochSupervisor] = {}
        self._supervisor: Supervisor | None = None
        self._pid: int | None = os.getpid()

    @classmethod
    def ephemeral(
        cls, *, namespace: str | None = None, config: OpsLifecycleConfig | None = None
    ) -> Self:
        """An adapter whose epochs survive every process, and end with the machine.

        `namespace` keeps deployments apart (default: SHMEPOCH_NAMESPACE, else "default");
        `config` sizes the epochs that it makes. Raises `NamespaceInvalid`.
        """
        return cls(namespace=namespace, config=config)

    @classmethod
    def persistent(
        cls,
        store: RuntimeStore,
        *,
        namespace: str | None = None,
        config: OpsLifecycleConfig | None = None,
        terminate_unfinished: bool = True,
        rotate_if_unloadable: bool = False,
    ) -> Self:
        """An adapter whose epochs also survive the machine's restart, in `store`.

        A session without a live segment goes on from the store. Its operations that had not ended
        cannot be running any more: they end as `Terminated`, so that the agent hears of them,
        unless `terminate_unfinished` is false, which drops them. A session that the store cannot
        load is refused with `StoreLoadFailed`, unless `rotate_if_unloadable` says to start a new
        epoch for it.

        A completion is durable within 50 ms, as far as the store's speed allows. One that retention
        drops before that is a gap and is counted; `config` with a `store_wait_ms` makes writers
        wait for the store instead.
        """
        return cls(
            namespace=namespace,
            config=config,
            durability=Durability(store, terminate_unfinished, rotate_if_unloadable),
        )

    # --- sessions -----------------------------------------------------------------------------

    def register_session(self, session_id: SessionId) -> None:
        """Own a session: go on with its live epoch, or make one.

        Does nothing if this adapter owns it already. Raises `RuntimeAlreadyActive` while another
        runtime does, `SharedMemoryExhausted`, and what validating a segment may raise.
        """
        self.prepare_bindings(session_id)

    def prepare_bindings(self, session_id: SessionId) -> SessionRuntimeBindings:
        """The bindings of a session, registering it first if need be: the same ones every time."""
        self._check_open()
        with self._lock:
            self._check_open()
            bindings = self._sessions.get(session_id)
            if bindings is None:
                bindings = self._open(session_id)
                self._adopt(bindings)
            return bindings

    def ops_lifecycle_registry(self, session_id: SessionId) -> RuntimeOpsLifecycleRegistry:
        """The registry of a session's epoch; `SessionNotRegistered`."""
        return self._registered(session_id).ops_lifecycle

    def contains_session(self, session_id: SessionId) -> bool:
        """Whether this adapter owns the session; in a forked child it owns none."""
        return self._pid == os.getpid() and session_id in self._sessions

    def observe_session(self, session_id: SessionId) -> SessionRuntimeBindings:
        """Look at a session of this adapter's namespace, whatever process owns it, as
        `shmepoch.observe_session` does. Completions that the feed has dropped are read from the
        adapter's store."""
        self._check_open()
        bindings = observe_session(session_id, namespace=self._namespace)
        if self._durability is not None:
            bindings.history = self._durability.store
        return bindings

    def reset_session(self, session_id: SessionId) -> SessionRuntimeBindings:
        """Seal the session's epoch and start a new one with fresh cursors; its bindings.

        Who waits on the old epoch wakes with `EpochSealed`. Raises `SessionNotRegistered`. With a
        store that does not take the old epoch's end it raises `StoreWriteFailed` and starts no new
        one; call it again.
        """
        self._check_open()
        with self._lock:
            old = self._registered(session_id)
            old.shared_segment().seal()
            if self._durability is not None:
                self._durability.end(old)
            bindings = self._create(session_id, RuntimeEpochId.new(), replace=True)
            _log.info(
                "session %s: reset from epoch %s to %s", session_id, old.epoch_id, bindings.epoch_id
            )
            self._adopt(bindings)
            old.close()
            return bindings

    def unregister_session(self, session_id: SessionId) -> None:
        """End the session: its operations end as `Terminated`, its epoch is sealed and its segment
        removed.

        Raises `SessionNotRegistered`. With a store that does not take the epoch's end it raises
        `StoreWriteFailed`, or `StoreBehind` before that, and the segment stays; call it again.
        """
        self._check_open()
        with self._lock:
            bindings = self._registered(session_id)
            segment = bindings.shared_segment()
            if not segment.sealed:
                bindings.ops_lifecycle.terminate_owner("the session was unregistered")
                segment.seal()
            if self._durability is not None:
                self._durability.end(bindings)
            del self._sessions[session_id], self._supervised[session_id]
            segment.unlink()
            bindings.close()

    def close(self) -> None:
        """Give up every session, leaving the segments for the next runtime."""
        if self._pid != os.getpid():
            return  # closed, or the parent's
        with self._lock:
            if self._pid is None:
                return
            self._pid = None
        if self._supervisor is not None:
            self._supervisor.stop()
        if self._durability is not None:
            self._durability.close()
        for bindings in self._sessions.values():
            bindings.close()
        self._sessions.clear()
        self._supervised.clear()
        remove_unused_bells(self._namespace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- where an epoch comes from ------------------------------------------------------------

    def _open(self, session_id: SessionId) -> SessionRuntimeBindings:
        while True:
            try:
                found = SharedSegment.attach(self._namespace, session_id)
            except FileNotFoundError:
                try:
                    return self._recover(session_id)
                except SegmentExists:
                    continue  # another runtime was faster; it will be named
            return self._take_over(found)

    def _take_over(self, found: SharedSegment) -> SessionRuntimeBindings:
        """Become the runtime of a live segment, whose runtime was killed or closed."""
        bindings = SessionRuntimeBindings.of_segment(found)
        segment = bindings.shared_segment()
        if not segment.try_own():
            runtimes = [p.pid for p in bindings.participants() if p.role is Role.RUNTIME]
            if segment is found:
                bindings.close()
            raise RuntimeAlreadyActive(segment.session_id, runtimes[0] if runtimes else 0)
        if segment.sealed:
            # Its runtime was killed between sealing it and replacing or removing it.
            if self._durability is not None:
                self._durability.follow(bindings)
                self._durability.end(bindings)
            bindings.close()
            bindings = self._create(segment.session_id, RuntimeEpochId.new(), replace=True)
            _log.info(
                "session %s: new epoch %s, the one found was sealed",
                segment.session_id,
                bindings.epoch_id,
            )
            return bindings
        segment.join(Role.RUNTIME)
        _log.info("session %s: live epoch %s", segment.session_id, segment.epoch_id)
        return bindings

    def _recover(self, session_id: SessionId) -> SessionRuntimeBindings:
        """The stored epoch of a session that has no live segment, or else a new one."""
        stored = None
        if self._durability is not None:
            stored = self._durability.load(session_id, self._config)
        if stored is None:
            bindings = self._create(session_id, RuntimeEpochId.new(), replace=False)
            why = "no store" if self._durability is None else "the store has none"
            _log.info("session %s: new epoch %s, %s", session_id, bindings.epoch_id, why)
            return bindings
        bindings = self._create(session_id, stored.epoch_id, replace=False, stored=stored)
        _log.info(
            "session %s: epoch %s from the store, through %d",
            session_id,
            stored.epoch_id,
            stored.last_seq,
        )
        return bindings

    def _create(
        self,
        session_id: SessionId,
        epoch_id: RuntimeEpochId,
        *,
        replace: bool,
        stored: PersistedOpsSnapshot | None = None,
    ) -> SessionRuntimeBindings:
        config = self._config
        if stored is not None and self._durability is not None:
            config = self._durability.room_for(stored, config)
        segment = SharedSegment.allocate(
            self._namespace, config, session_id=session_id, epoch_id=epoch_id
        )
        try:
            segment.try_own()
            segment.join(Role.RUNTIME)
            if stored is not None and self._durability is not None:
                self._durability.restore(segment, stored)
            segment.publish(replace=replace)
        except BaseException:
            segment.close()
            raise
        return SessionRuntimeBindings.of_segment(segment)

    def _adopt(self, bindings: SessionRuntimeBindings) -> None:
        supervised = EpochSupervisor(bindings)
        supervised.look()
        if self._durability is not None:
            self._durability.follow(bindings)
        self._sessions[bindings.session_id] = bindings
        self._supervised[bindings.session_id] = supervised
        if self._supervisor is None:
            self._supervisor = Supervisor(self._epochs)
            self._supervisor.start()

    def _epochs(self) -> list[EpochSupervisor]:
        with self._lock:
            return list(self._supervised.values())

    def _registered(self, session_id: SessionId) -> SessionRuntimeBindings:
        self._check_open()
        with self._lock:
            self._check_open()
            bindings = self._sessions.get(session_id)
            if bindings is None:
                raise SessionNotRegistered(session_id)
            return bindings

    def _check_open(self) -> None:
        """Asked before the lock, too: in a forked child, what held that does not exist."""
        if self._pid != os.getpid():
            raise AdapterClosed
