"""The session adapter: it owns the sessions of one runtime."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final, Self, TypeVar

from shmepoch.arguments import SessionIdLike, require, session_id_of
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.errors import (
    AdapterClosed,
    ChannelClosed,
    EpochGone,
    SegmentCorrupted,
    SessionBusy,
    SessionNotRegistered,
)
from shmepoch.events import Event, about
from shmepoch.ids import SessionId
from shmepoch.memory.doorbells import remove_unused_doorbells
from shmepoch.memory.namespaces import resolve_namespace
from shmepoch.memory.removal import remove_leftovers
from shmepoch.runtime.durability import Durability
from shmepoch.runtime.observing import observe_session
from shmepoch.runtime.opening import EpochOpener
from shmepoch.runtime.supervision import EpochSupervisor, Supervisor
from shmepoch.stores import RuntimeStore

T = TypeVar("T")

_log = logging.getLogger(__name__)

#: How long `close` waits for calls that are in progress, all together.
_CLOSE_S: Final = 1.0


class _Session:
    """The adapter's state of one session. Changed only by the call that holds `lock`."""

    def __init__(self, id: SessionId) -> None:
        self.id: Final = id
        #: Reentrant: a signal handler or finalizer is refused instead of waiting for ever.
        self.lock: Final = threading.RLock()
        self.busy = False
        #: The epoch that the adapter owns, with its bindings; read without the lock.
        self.owned: EpochSupervisor | None = None


class RuntimeSessionAdapter:
    """Owns sessions: makes their epochs, finds them again, supervises them and ends them.

    A session has one live runtime. When the adapter is closed or its process dies, the segments
    stay, and the next adapter continues them. Its methods may be called from any thread; calls
    about one session wait for each other, and for no other session. After a fork it belongs to the
    parent.

    ADAPTER-1: while a call waits for a store or another process, it holds the lock of its own
    session only. Calls about other sessions, polls and the supervision do not take that lock. So a
    store that is stuck delays its own session and no other.
    """

    def __init__(
        self,
        *,
        namespace: str | None,
        config: OpsLifecycleConfig | None,
        durability: Durability | None = None,
        rotate_if_unloadable: bool = False,
    ) -> None:
        require(OpsLifecycleConfig | None, config, "RuntimeSessionAdapter", "config")
        self._namespace: Final = resolve_namespace(namespace)
        self._config = config or OpsLifecycleConfig()
        self._durability: Final = durability
        self._opener: Final = EpochOpener(
            self._namespace,
            self._config,
            durability,
            rotate_if_unloadable=rotate_if_unloadable,
            check_open=self._check_open,
        )
        #: Each access is one operation of the dictionary, which needs no lock.
        self._sessions: Final[dict[SessionId, _Session]] = {}
        self._supervising: Final = threading.RLock()
        self._supervisor: Supervisor | None = None
        self._pid: Final = os.getpid()
        self._closed = False
        remove_leftovers(self._namespace)

    @classmethod
    def ephemeral(
        cls,
        *,
        namespace: str | None = None,
        config: OpsLifecycleConfig | None = None,
        rotate_if_unloadable: bool = False,
    ) -> Self:
        """An adapter whose epochs survive every process, and end with the machine.

        `namespace` separates deployments (default: SHMEPOCH_NAMESPACE, else "default"); `config` is
        the size of new epochs. A session with a damaged segment is refused with `SegmentCorrupted`;
        with `rotate_if_unloadable`, the segment is removed and a new epoch started. Raises
        `NamespaceInvalid`.
        """
        return cls(namespace=namespace, config=config, rotate_if_unloadable=rotate_if_unloadable)

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

        A session without a live segment is recovered from the store. Its operations that had not
        ended cannot still be running. They end as `Terminated`, so that the agent is told of
        them; if `terminate_unfinished` is false they are dropped. A session that the store cannot
        load is refused with `StoreLoadFailed`; with `rotate_if_unloadable`, it gets a new epoch. A
        session with a damaged live segment is refused with `SegmentCorrupted`; with
        `rotate_if_unloadable`, the segment is removed and the session recovered from the store.

        A completion is durable within 50 ms, as far as the store's speed allows. A completion that
        retention drops before that is a gap, and is counted; with a `store_wait_ms` in `config`,
        writers wait for the store instead.
        """
        require(RuntimeStore, store, "RuntimeSessionAdapter.persistent", "store")
        return cls(
            namespace=namespace,
            config=config,
            durability=Durability(store, terminate_unfinished, rotate_if_unloadable),
            rotate_if_unloadable=rotate_if_unloadable,
        )

    # --- sessions -----------------------------------------------------------------------------

    def register_session(self, session_id: SessionIdLike) -> None:
        """Own a session: continue its live epoch, or make one.

        Does nothing if this adapter owns it already. Raises `RuntimeAlreadyActive` while another
        runtime owns it, `SharedMemoryExhausted`, and the errors of a segment that is not valid.
        After a failure the session is unchanged, and the call may be repeated. A signal handler or
        finalizer that interrupted a call about the same session gets `SessionBusy`, from this and
        every other method that changes a session.
        """
        session_id = session_id_of(session_id, "register_session")
        self.prepare_bindings(session_id)

    def prepare_bindings(self, session_id: SessionIdLike) -> SessionRuntimeBindings:
        """The bindings of a session; registers it first if necessary. The same object every time.

        New bindings after the epoch has ended, the session's name was removed or they were closed.
        Raises the errors of `register_session`.
        """
        session_id = session_id_of(session_id, "prepare_bindings")
        self._check_open()
        owned = self._owned(session_id)
        if owned is not None and not owned.bindings.ended:
            return owned.bindings
        return self._alone(session_id, self._prepare)

    def ops_lifecycle_registry(self, session_id: SessionIdLike) -> RuntimeOpsLifecycleRegistry:
        """The registry of a session's epoch; `SessionNotRegistered`."""
        session_id = session_id_of(session_id, "ops_lifecycle_registry")
        self._check_open()
        owned = self._owned(session_id)
        if owned is None:
            raise SessionNotRegistered(session_id)
        return owned.bindings.ops_lifecycle

    def contains_session(self, session_id: SessionIdLike) -> bool:
        """Whether this adapter owns the session; false in a forked child."""
        session_id = session_id_of(session_id, "contains_session")
        return self._pid == os.getpid() and self._owned(session_id) is not None

    def observe_session(self, session_id: SessionIdLike) -> SessionRuntimeBindings:
        """Observe a session of this adapter's namespace, owned by any process, like
        `shmepoch.observe_session`. Completions that the feed has dropped are read from the
        adapter's store."""
        self._check_open()
        bindings = observe_session(session_id, namespace=self._namespace)
        if self._durability is not None:
            bindings.history = self._durability.store
        return bindings

    def reset_session(self, session_id: SessionIdLike) -> SessionRuntimeBindings:
        """Seal the session's epoch and start a new one with fresh cursors; its bindings.

        Waits on the old epoch end with `EpochSealed`. Raises `SessionNotRegistered`. If the store
        does not take the old epoch's end, it raises `StoreWriteFailed` and starts no new epoch;
        call it again, or call `prepare_bindings`, which completes the reset.
        """
        session_id = session_id_of(session_id, "reset_session")
        return self._alone(session_id, self._reset)

    def unregister_session(self, session_id: SessionIdLike) -> None:
        """End the session: its operations end as `Terminated`, its epoch is sealed and its segment
        removed.

        Raises `SessionNotRegistered`. If the store does not take the epoch's end, it raises
        `StoreWriteFailed`, or `StoreBehind` before that, and the segment stays; call it again.
        """
        session_id = session_id_of(session_id, "unregister_session")
        self._alone(session_id, self._unregister)

    def close(self) -> None:
        """Give up every session, and leave the segments for the next runtime.

        If another call about a session is in progress, in another thread or interrupted by this
        call, the session is given up when that call ends; the log names it if that takes too long.
        May be called again after it was interrupted.
        """
        if self._pid != os.getpid():
            return
        self._closed = True
        try:
            self._stop_supervising()
            if self._durability is not None:
                self._durability.close()
        finally:
            self._give_up_all()
        remove_unused_doorbells(self._namespace)
        remove_leftovers(self._namespace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        # In a thread: it waits for the store, and for calls of other threads.
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._sessions)} sessions"
        return f"RuntimeSessionAdapter(namespace={self._namespace!r}, {state})"

    # --- one call about a session at a time ---------------------------------------------------

    def _alone(self, session_id: SessionId, act: Callable[[_Session], T]) -> T:
        """Call `act` while no other call is about the session."""
        self._check_open()
        while True:
            session = self._sessions.setdefault(session_id, _Session(session_id))
            with session.lock:
                # Another call may have forgotten the session while this one waited.
                if self._sessions.get(session_id) is session:
                    return self._act(session, act)

    def _act(self, session: _Session, act: Callable[[_Session], T]) -> T:
        if session.busy:
            raise SessionBusy(session.id)
        session.busy = True
        try:
            self._check_open()
            done = act(session)
        except ChannelClosed:
            self._check_open()
            raise
        finally:
            session.busy = False
            if self._closed:
                self._give_up(session)
            elif session.owned is None:
                self._sessions.pop(session.id, None)
        return done

    def _give_up_all(self) -> None:
        deadline = time.monotonic() + _CLOSE_S
        for session in list(self._sessions.values()):
            if not session.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                self._left(session, "another call is about it")
                continue
            try:
                if session.busy:
                    self._left(session, "the call that this one interrupted is about it")
                else:
                    self._give_up(session)
            finally:
                session.lock.release()

    def _give_up(self, session: _Session) -> None:
        if session.owned is not None:
            bindings = session.owned.bindings
            bindings.close()
            if bindings.shared_segment().attached:
                self._left(session, "a transition of this process is in progress")
            session.owned = None
            _log.info(
                "session %s: given up; epoch %s is left to the next runtime",
                session.id,
                bindings.epoch_id,
                extra=about(Event.SESSION_GIVEN_UP, session=session.id, epoch=bindings.epoch_id),
            )
        self._sessions.pop(session.id, None)

    @staticmethod
    def _left(session: _Session, why: str) -> None:
        _log.warning(
            "session %s: given up later than the adapter, since %s",
            session.id,
            why,
            extra=about(Event.SESSION_GIVEN_UP_LATE, session=session.id, reason=why),
        )

    # --- what a call does about its session ---------------------------------------------------

    def _prepare(self, session: _Session) -> SessionRuntimeBindings:
        self._supervise()  # before anything is owned, since the thread may fail to start
        if session.owned is not None:
            old = session.owned.bindings
            segment = old.shared_segment()
            if segment.attached and segment.named:
                session.owned.lost = False  # it has its name again
                if not old.ended:
                    return old
                return self._opener.renew(session.id, old, partial(self._adopt, session))
            self._forget(session, old)
        return self._opener.open(session.id, partial(self._adopt, session))

    def _reset(self, session: _Session) -> SessionRuntimeBindings:
        old = self._require(session)
        old.shared_segment().seal()
        self._check_open()  # sealing may have waited; the next runtime replaces a sealed epoch
        return self._prepare(session)

    def _unregister(self, session: _Session) -> None:
        bindings = self._require(session)
        segment = bindings.shared_segment()
        with suppress(EpochGone):  # there is nothing left to end
            if not segment.ended:
                self._end(bindings)
        if self._durability is not None:
            self._durability.end(bindings)
        segment.unlink()
        bindings.close()
        session.owned = None
        _log.info(
            "session %s: unregistered with its epoch %s",
            session.id,
            bindings.epoch_id,
            extra=about(Event.SESSION_UNREGISTERED, session=session.id, epoch=bindings.epoch_id),
        )

    @staticmethod
    def _end(bindings: SessionRuntimeBindings) -> None:
        try:
            bindings.ops_lifecycle.terminate_and_seal("the session was unregistered")
        except SegmentCorrupted as error:
            _log.exception(
                "session %s: removed with its running operations",
                bindings.session_id,
                extra=about(
                    Event.OPERATIONS_LOST,
                    session=bindings.session_id,
                    epoch=bindings.epoch_id,
                    reason=str(error),
                ),
            )
            bindings.shared_segment().seal()

    def _forget(self, session: _Session, old: SessionRuntimeBindings) -> None:
        """Stop owning an epoch whose segment has lost its name, or whose bindings were closed."""
        if old.sealed:  # and perhaps replaced, by a call that failed later
            if self._durability is not None:
                self._durability.end(old)
            old.close()
        elif self._durability is not None:
            self._durability.forget(old)
        # An open epoch stays attached: its users get `EpochGone`.
        session.owned = None

    def _require(self, session: _Session) -> SessionRuntimeBindings:
        if session.owned is None or session.owned.out_of_reach:
            raise SessionNotRegistered(session.id)
        return session.owned.bindings

    def _owned(self, session_id: SessionId) -> EpochSupervisor | None:
        session = self._sessions.get(session_id)
        owned = None if session is None else session.owned
        return None if owned is None or owned.out_of_reach else owned

    def _check_open(self) -> None:
        # Before any lock: in a forked child, the thread that held one does not exist.
        if self._closed or self._pid != os.getpid():
            raise AdapterClosed

    def _adopt(self, session: _Session, owned: EpochSupervisor) -> None:
        self._check_open()  # `close` may have skipped this session meanwhile
        session.owned = owned

    # --- supervision --------------------------------------------------------------------------

    def _supervise(self) -> None:
        with self._supervising:
            if self._supervisor is None:
                supervisor = Supervisor(self._epochs)
                supervisor.start()
                self._supervisor = supervisor
        if self._closed:  # meanwhile; the closer may have found none
            self._stop_supervising()

    def _stop_supervising(self) -> None:
        with self._supervising:
            supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.stop()

    def _epochs(self) -> list[EpochSupervisor]:
        owned = [session.owned for session in list(self._sessions.values())]
        return [epoch for epoch in owned if epoch is not None and not epoch.lost]
