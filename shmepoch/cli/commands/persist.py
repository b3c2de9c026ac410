"""`shmepoch persist`: keeps every epoch of a namespace in a store, from a separate process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from shmepoch.cli.exits import NOT_CARRIED_OUT, NOT_WELL, fail, reporting
from shmepoch.cli.options import Namespace, Store, seconds
from shmepoch.cli.run.interruptions import End
from shmepoch.cli.streams import counted, visible
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.errors import ShmepochError, StoreWriteFailed
from shmepoch.events import Event, about
from shmepoch.ids import SessionId
from shmepoch.memory.files import require_shm
from shmepoch.memory.namespaces import list_sessions, resolve_namespace
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment
from shmepoch.runtime.persistence import MOST_DELAY_S, PersistenceChannel
from shmepoch.stores import SqliteRuntimeStore

_log = logging.getLogger(__name__)

#: The time until a new epoch is found; its completions are still in its feed then. It is also the
#: time that one poll waits until the end of an epoch is stored.
_POLL_S: Final = 0.5
#: The time that the end waits for a failing or slow store.
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

    After the signal it waits until everything is stored, and says how much it stored. A second
    Ctrl-C does not wait; anything that the store lacks is in shared memory.

    Examples:

        shmepoch persist --store epochs.db
        shmepoch --log-level info persist --store epochs.db --namespace blue

    Exit status: 0 if everything is stored, 1 if the store did not take it within 10 seconds or a
    feed dropped completions before they were stored, 2 for a bad namespace or file, 3 if there is
    no shared memory.
    """
    with reporting():
        try:
            stored = _persist(store, namespace, max_delay)
        except (StoreWriteFailed, TimeoutError) as error:
            fail(NOT_WELL, error)
        except OSError as error:
            fail(NOT_CARRIED_OUT, error)
        missed = f"; {stored.missed} were dropped before they were" if stored.missed else ""
        completions, epochs = counted(stored.completions, "completion"), stored.epochs
        print(f"stored {completions} of {counted(epochs, 'epoch')} in {visible(store)}{missed}")
    if stored.missed:
        sys.exit(NOT_WELL)


class _Stored(NamedTuple):
    """The figures of a whole run: `missed` completions were dropped before they were stored."""

    completions: int
    epochs: int
    missed: int


def _persist(path: Path, namespace: str | None, max_delay: float) -> _Stored:
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
        return _Stored(channel.status().entries, epochs.count, epochs.missed)


class _Epochs:
    """The epochs of a namespace that the channel follows."""

    def __init__(self, namespace: str, channel: PersistenceChannel) -> None:
        self._namespace = namespace
        self._channel = channel
        self._followed: dict[SessionId, SessionRuntimeBindings] = {}
        self._said: dict[str, str] = {}
        #: The number of epochs that it has followed; and of completions that were dropped before
        #: they were stored, in epochs that it has left.
        self.count = 0
        self.missed = 0

    def poll(self) -> None:
        """Follow new epochs, and leave those that have ended."""
        ended = [bindings for bindings in self._followed.values() if bindings.ended]
        patience = _POLL_S
        for bindings in ended:
            if not self._is_stored(bindings, patience):
                patience = _POLL_S / 10  # the store may be down; do not wait for each epoch
            else:
                self._leave([bindings])
                del self._followed[bindings.session_id]
        for session_id in self._found():
            if session_id not in self._followed:
                self._follow(session_id)

    def _found(self) -> list[SessionId]:
        try:
            return list(list_sessions(self._namespace))
        except OSError as error:
            if self._is_news("", error):
                _log.error(
                    "new sessions are not found: %s",
                    error,
                    extra=about(Event.SESSIONS_NOT_FOUND, reason=str(error)),
                )
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
            self._not_followed(session_id, error)
            return
        try:
            segment.join(Role.PERSISTENCE)
        except (ShmepochError, OSError) as error:
            segment.close()
            self._not_followed(session_id, error)
            return
        bindings = SessionRuntimeBindings.of_segment(segment)
        self._channel.follow(bindings)
        self._followed[session_id] = bindings
        self.count += 1
        _log.info(
            "session %s: epoch %s is stored from now on",
            session_id,
            bindings.epoch_id,
            extra=about(Event.EPOCH_FOLLOWED, session=session_id, epoch=bindings.epoch_id),
        )

    def _not_followed(self, session_id: SessionId, error: Exception) -> None:
        if self._is_news(str(session_id), error):
            _log.error(
                "session %s is not stored: %s",
                session_id,
                error,
                extra=about(Event.SESSION_NOT_FOLLOWED, session=session_id, reason=str(error)),
            )

    def _is_news(self, subject: str, error: Exception) -> bool:
        """Whether a problem was not logged with the same reason before."""
        before = self._said.get(subject)
        self._said[subject] = str(error)
        return before != str(error)

    def _leave(self, epochs: Collection[SessionRuntimeBindings]) -> None:
        standing = {epoch.epoch_id: epoch for epoch in self._channel.status().epochs}
        for bindings in epochs:
            session_id, epoch_id = bindings.session_id, bindings.epoch_id
            self._channel.unfollow(bindings)
            bindings.close()
            self.missed += standing[epoch_id].missed
            _log.info(
                "session %s: epoch %s is stored no longer",
                session_id,
                epoch_id,
                extra=about(
                    Event.EPOCH_LEFT,
                    session=session_id,
                    epoch=epoch_id,
                    seq=standing[epoch_id].durable_seq,
                ),
            )

    def close(self) -> None:
        """Leave every epoch. The epochs go on."""
        self._leave(self._followed.values())
