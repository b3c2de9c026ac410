"""`shmepoch persist`: keeps every epoch of a namespace in a store, from a process of its own."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Final

from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.errors import ShmepochError, StoreWriteFailed
from shmepoch.ids import SessionId
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment, list_sessions, resolve_namespace
from shmepoch.runtime.persistence import PersistenceChannel
from shmepoch.stores import SqliteRuntimeStore

_log = logging.getLogger(__name__)

#: How soon a new epoch is found; what it completes meanwhile is still in its feed. And how long one
#: look waits for the end of an epoch to be stored, before it sees to other things.
_LOOK_S: Final = 0.5
#: How long the end waits for a store that fails or is slow.
_END_TIMEOUT_S: Final = 10.0


def persist(path: Path, namespace: str | None, max_delay: float) -> None:
    """Follow every epoch there is and every one that comes, until SIGINT or SIGTERM.

    Returns once everything is stored; raises `StoreWriteFailed` or `TimeoutError` if the store does
    not take it in time, and the error of an epoch that cannot be stored.
    """
    chosen = resolve_namespace(namespace)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with SqliteRuntimeStore(path) as store:
        channel = PersistenceChannel(store, max_delay=max_delay)
        epochs = _Epochs(chosen, channel)
        try:
            epochs.look()
            while not stop.wait(_LOOK_S):
                epochs.look()
            channel.flush(_END_TIMEOUT_S)
        finally:
            channel.close()
            epochs.close()


class _Epochs:
    """The epochs of a namespace that the channel follows."""

    def __init__(self, namespace: str, channel: PersistenceChannel) -> None:
        self._namespace = namespace
        self._channel = channel
        self._followed: dict[SessionId, SessionRuntimeBindings] = {}
        self._refused: dict[SessionId, str] = {}

    def look(self) -> None:
        """Follow those that are new, and let go of those that have ended."""
        ended = [bindings for bindings in self._followed.values() if bindings.sealed]
        if ended and self._all_stored():
            for bindings in ended:
                self._channel.unfollow(bindings)
                bindings.close()
                del self._followed[bindings.session_id]
        for session_id in list_sessions(self._namespace):
            if session_id not in self._followed:
                self._follow(session_id)

    def _all_stored(self) -> bool:
        try:
            self._channel.flush(_LOOK_S)
        except (StoreWriteFailed, TimeoutError):
            return False  # the channel has said so, and goes on trying
        except ShmepochError:
            pass  # of an epoch that cannot be stored, of which the channel has said so too
        return True

    def _follow(self, session_id: SessionId) -> None:
        try:
            segment = SharedSegment.attach(self._namespace, session_id)
        except FileNotFoundError:
            return  # it has ended since it was listed
        except ShmepochError as error:
            self._refuse(session_id, error)
            return
        try:
            segment.join(Role.PERSISTENCE)
        except ShmepochError as error:
            segment.close()
            self._refuse(session_id, error)
            return
        bindings = SessionRuntimeBindings.of_segment(segment)
        self._channel.follow(bindings)
        self._followed[session_id] = bindings

    def _refuse(self, session_id: SessionId, error: ShmepochError) -> None:
        """Say why a session is not stored, unless that was the reason at the last look as well."""
        if self._refused.get(session_id) != str(error):
            self._refused[session_id] = str(error)
            _log.error("session %s is not stored: %s", session_id, error)

    def close(self) -> None:
        """Leave every epoch; they go on."""
        for bindings in self._followed.values():
            bindings.close()
