"""Supervision: noticing participants that died, and ending what they ran."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Final

from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.errors import BindingsClosed, EpochSealed, StoreBehind

_log = logging.getLogger(__name__)

#: How often the participants' locks are looked at; a death is noticed within a second.
_INTERVAL_S: Final = 0.25


class EpochSupervisor:
    """Ends the operations whose participant is gone, so that the agent hears of them."""

    def __init__(self, bindings: SessionRuntimeBindings) -> None:
        self._bindings = bindings
        self._known: object = None

    def look(self) -> int:
        """Look once; how many operations were ended."""
        segment = self._bindings.shared_segment()
        if not segment.attached:
            return 0
        participants = segment.participants
        joined = participants.joined()
        present = participants.list(me=segment.participant)
        dead = [participant for participant in present if not participant.alive]
        # Besides those found dead, somebody may have left in good order with operations running,
        # or have joined and gone since the last look, or have taken a dead one's slot.
        known = joined, tuple(participant.key for participant in present if participant.alive)
        if not dead and known == self._known:
            return 0
        registry = self._bindings.ops_lifecycle
        try:
            ended = registry.terminate_where(
                lambda key: key != segment.participant and not participants.is_alive(key),
                _reason([f"{participant.role} process {participant.pid}" for participant in dead]),
            )
        except StoreBehind as error:  # the next look tries again; other epochs do not wait for it
            _log.debug("session %s: %s", self._bindings.session_id, error)
            return 0
        for participant in dead:
            registry.forget_watchers(participant.key)
            participants.clear(participant)
        if ended or dead:
            _log.warning(
                "session %s: %d participants died, %d of their operations ended as terminated",
                self._bindings.session_id,
                len(dead),
                ended,
            )
        self._known = known
        return ended


def _reason(who: Iterable[str]) -> str:
    return f"the process that ran it ended without finishing it ({', '.join(who) or 'it left'})"


class Supervisor:
    """One thread that looks after every epoch of an adapter."""

    def __init__(self, epochs: Callable[[], Iterable[EpochSupervisor]]) -> None:
        self._epochs = epochs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shmepoch-supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            for epoch in self._epochs():
                try:
                    epoch.look()
                except (EpochSealed, BindingsClosed) as error:  # by another thread, just now
                    _log.debug("not supervised: %s", error)
                except Exception:  # whatever is wrong with one epoch, the others are looked after
                    _log.exception("looking after an epoch failed")
