"""`shmepoch persist`: keeps every epoch of a namespace in a store, from a separate process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Final

import typer

from shmepoch.cli.exits import NOT_CARRIED_OUT, NOT_WELL, fail, reporting
from shmepoch.cli.options import Namespace, Store, seconds
from shmepoch.cli.run.interruptions import End
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.errors import ShmepochError, StoreWriteFailed
from shmepoch.ids import SessionId
from shmepoch.memory.files import require_shm
from shmepoch.memory.namespaces import list_sessions, resolve_namespace
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment
from shmepoch.runtime.persistence import MOST_DELAY_S, PersistenceChannel
from shmepoch.stores import SqliteRuntimeStore

_log = logging.getLogger(__name__)

#: How soon a new epoch is found; completions until then are still in its feed. Also how long one
#: poll waits for the end of an epoch to be stored.
_POLL_S: Final = 0.5
#: How long the end waits for a failing or slow store.
_END_TIMEOUT_S: Final = 10.0


def persist(
    store: Store,
    namespace: Namespace = None,
    max_delay: Annotated[
        float,
        typer.Option(
            callback=seconds(0, MOST_DELAY_S),
            help="Seconds within which a completion is durable.",
        ),
    ] = 0.05,
) -> None:
    """Keep every epoch of a namespace in a store, until Ctrl-C, SIGTERM or SIGHUP.

    After the signal it waits until everything is stored. Exit status: 0 if everything is stored, 1
    if the store did not take it within 10 seconds, 2 for a bad namespace or file, 3 if there is no
    shared memory. A second Ctrl-C does not wait; anything that the store lacks is in shared memory.
    """
    with reporting():
        try:
            _persist(store, namespace, max_delay)
        except (StoreWriteFailed, TimeoutError) as error:
            fail(NOT_WELL, error)
        except OSError as error:
            fail(NOT_CARRIED_OUT, error)


def _persist(path: Path, namespace: str | None, max_delay: float) -> None:
    """Follow every epoch, also new ones, until SIGINT, SIGTERM or SIGHUP.

    Returns after everything is stored. Raises `StoreWriteFailed` or `TimeoutError` if the store
    does not take it in time, and the error of an epoch that cannot be stored. Before it follows any
    epoch it may raise `NamespaceInvalid`, `SharedMemoryUnusable`, `ConfigInvalid` and
    `StoreUnusable`.
    """
    chosen = resolve_namespace(namespace)
    require_shm()
    end = End()
    with SqliteRuntimeStore(path) as store:
        channel = PersistenceChannel(store, max_delay=max_delay)
        epochs = _Epochs(chosen, channel)
        try:
            epochs.poll()
            while not end.asked_for_within(_POLL_S):
                epochs.poll()
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
        self._said: dict[str, str] = {}

    def poll(self) -> None:
        """Follow new epochs, and leave those that have ended."""
        ended = [bindings for bindings in self._followed.values() if bindings.ended]
        patience = _POLL_S
        for bindings in ended:
            if not self._is_stored(bindings, patience):
                patience = _POLL_S / 10  # the store may be down; a poll does not wait for all
            else:
                self._channel.unfollow(bindings)
                bindings.close()
                del self._followed[bindings.session_id]
        for session_id in self._found():
            if session_id not in self._followed:
                self._follow(session_id)

    def _found(self) -> list[SessionId]:
        try:
            return list(list_sessions(self._namespace))
        except OSError as error:
            self._say("new sessions are not found", error)
            return []

    def _is_stored(self, bindings: SessionRuntimeBindings, timeout: float) -> bool:
        try:
            self._channel.flush(timeout, bindings=bindings)
        except (StoreWriteFailed, TimeoutError):
            return False  # the channel has logged it, and tries again
        except ShmepochError:
            pass  # an epoch that cannot be stored; the channel has logged that, too
        return True

    def _follow(self, session_id: SessionId) -> None:
        try:
            segment = SharedSegment.attach(self._namespace, session_id)
        except FileNotFoundError:
            return  # it has ended since it was listed
        except (ShmepochError, OSError) as error:
            self._say(f"session {session_id} is not stored", error)
            return
        try:
            segment.join(Role.PERSISTENCE)
        except (ShmepochError, OSError) as error:
            segment.close()
            self._say(f"session {session_id} is not stored", error)
            return
        bindings = SessionRuntimeBindings.of_segment(segment)
        self._channel.follow(bindings)
        self._followed[session_id] = bindings

    def _say(self, what: str, error: Exception) -> None:
        """Log a problem and its reason, unless it was last logged with the same reason."""
        if self._said.get(what) != str(error):
            self._said[what] = str(error)
            _log.error("%s: %s", what, error)

    def close(self) -> None:
        """Leave every epoch. The epochs go on."""
        for bindings in self._followed.values():
            bindings.close()
