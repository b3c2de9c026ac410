"""`shmepoch persist`: keeps every epoch of a namespace in a store, from a process of its own."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Final

from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.errors import ShmepochError
from shmepoch.ids import SessionId
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment, list_sessions, resolve_namespace
from shmepoch.runtime.persistence import PersistenceChannel
from shmepoch.stores import SqliteRuntimeStore

_log = logging.getLogger(__name__)

#: How soon a new epoch is found; what it completes meanwhile is still in its feed.
_LOOK_S: Final = 0.5


def persist(path: Path, namespace: str | None, max_delay: float) -> None:
    """Follow every epoch there is and every one that comes, until SIGINT or SIGTERM."""
    chosen = resolve_namespace(namespace)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with (
        SqliteRuntimeStore(path) as store,
        PersistenceChannel(store, max_delay=max_delay) as channel,
    ):
        epochs = _Epochs(chosen, channel)
        while True:
            epochs.look()
            if stop.wait(_LOOK_S):
                break
    epochs.close()


class _Epochs:
    """The epochs of a namespace that the channel follows."""

    def __init__(self, namespace: str, channel: PersistenceChannel) -> None:
        self._namespace = namespace
        self._channel = channel
        self._followed: dict[SessionId, SessionRuntimeBindings] = {}

    def look(self) -> None:
        """Follow those that are new, and let go of those that have ended."""
        for session_id, bindings in list(self._followed.items()):
            if bindings.sealed:
                self._channel.flush()
                self._channel.unfollow(bindings)
                bindings.close()
                del self._followed[session_id]
        for session_id in list_sessions(self._namespace):
            if session_id not in self._followed:
                self._follow(session_id)

    def _follow(self, session_id: SessionId) -> None:
        try:
            segment = SharedSegment.attach(self._namespace, session_id)
            segment.join(Role.PERSISTENCE)
        except FileNotFoundError:
            return  # it has ended since it was listed
        except ShmepochError as error:
            _log.error("session %s is not stored: %s", session_id, error)
            return
        bindings = SessionRuntimeBindings.of_segment(segment)
        self._channel.follow(bindings)
        self._followed[session_id] = bindings

    def close(self) -> None:
        """Leave every epoch; they go on."""
        for bindings in self._followed.values():
            bindings.close()
