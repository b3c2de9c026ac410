"""Supervision: it notices participants that ended, and ends their operations."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Final

from shmepoch import _native as at
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.errors import BindingsClosed, EpochGone, EpochSealed, StoreBehind, WriterBusy
from shmepoch.events import Event, about
from shmepoch.memory.files import SHM_DIR
from shmepoch.memory.participants import Participant, number_of

_log = logging.getLogger(__name__)

#: How often the participants' locks are polled; a death is noticed within a second.
_INTERVAL_S: Final = 0.25
#: The names of the segments are checked once in so many polls.
_NAMES_EVERY: Final = 2
#: How many polls make a minute: each epoch shows its life in one of them.
_LIFE_EVERY: Final = round(60 / _INTERVAL_S)
#: How many participants that ended together are named in a reason, which each operation carries.
_NAMED: Final = 3
#: How long `settle` tries again while a transition is in progress, and how often.
_SETTLE_S: Final = 1.0
_SETTLE_PAUSE_S: Final = 0.001
#: How long to wait for the end of the supervising thread. It only ever waits for its log.
_STOP_S: Final = 2.0


class EpochSupervisor:
    """Ends the operations of participants that are gone, so that the agent is told of them."""

    def __init__(self, bindings: SessionRuntimeBindings) -> None:
        self.bindings: Final = bindings
        #: Whether the session's name was taken from this epoch's segment while the epoch was open.
        self.lost = False
        #: At which of the polls of a minute it shows that it lives: 10,000 epochs take turns.
        self.life_turn: Final = random.randrange(_LIFE_EVERY)
        self._memory: Final = bindings.shared_segment().memory
        self._known: object = None
        self._alone_since = -1
        self._repairs = self._memory.load(at.REPAIRS_AT)

    @property
    def out_of_reach(self) -> bool:
        """Whether its adapter no longer owns it: the name was removed, or code in this process has
        closed the bindings, which are one object for all of the process."""
        return self.lost or not self.bindings.shared_segment().attached

    def poll(self) -> int:
        """Poll once; returns how many operations it ended.

        SUPERVISE-1: it never waits, neither for a transition nor for a store. If it cannot do
        something now, the next poll does it. So it does not delay other epochs.
        """
        # If this process is alone, there are no operations of others to end, until another one
        # joins.
        if self._memory.load(at.JOINED_AT) == self._alone_since:
            return 0
        try:
            return self._poll()
        except (StoreBehind, WriterBusy) as error:
            _log.debug(
                "session %s: %s",
                self.bindings.session_id,
                error,
                extra=about(
                    Event.SUPERVISION_DEFERRED,
                    session=self.bindings.session_id,
                    epoch=self.bindings.epoch_id,
                    reason=str(error),
                ),
            )
            return 0

    def settle(self) -> None:
        """Poll before the epoch is handed out. It waits for a transition in progress, but not for
        long, since its process may be stopped."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            try:
                self._poll()
                return
            except StoreBehind:
                return
            except WriterBusy:
                if time.monotonic() > deadline:
                    return
            time.sleep(_SETTLE_PAUSE_S)

    def check_name(self) -> None:
        """Notice if this segment no longer has the session's name."""
        segment = self.bindings.shared_segment()
        if self.lost or not segment.attached or segment.named or segment.sealed:
            return
        self.lost = True
        _log.error(
            "session %s: %s is gone or another file, while epoch %s was open: later changes of the "
            "epoch are lost. Something other than shmepoch removed the name; make sure that "
            "cleaners of temporary files leave %s alone. The session can be prepared again",
            segment.session_id,
            segment.path,
            segment.epoch_id,
            SHM_DIR,
            extra=about(
                Event.NAME_LOST,
                session=segment.session_id,
                epoch=segment.epoch_id,
                path=str(segment.path),
            ),
        )
        with contextlib.suppress(EpochGone):
            segment.require_name()  # tells the others, if the file has no name at all

    def _poll(self) -> int:
        segment = self.bindings.shared_segment()
        if not segment.attached:
            return 0
        participants = segment.participants
        joined = participants.joined()
        present = participants.list(me=segment.participant)
        alone = len(present) <= 1 and not participants.others_hold_slots()
        if alone:
            # List again, after the locks were checked: a participant that has joined by now and
            # holds no lock is gone, and the rest of this poll finds its operations.
            present = participants.list(me=segment.participant)
        dead = [participant for participant in present if not participant.alive]
        # Besides the dead ones, a participant may have left regularly with operations running, or
        # have joined and left since the last poll, or have taken the slot of a dead one.
        alive = frozenset(participant.key for participant in present if participant.alive)
        known = joined, alive
        ended = 0
        if dead or alone or known != self._known:
            listed_dead = frozenset(participant.key for participant in dead)

            def has_ended(key: int) -> bool:
                if key in listed_dead:
                    return True
                # A participant that has died since, or has joined since and died, is left to the
                # next poll, which can name it.
                since = key in alive or number_of(key) > joined
                return not since and not participants.is_alive(key)

            ended = self.bindings.ops_lifecycle.terminate_where(
                has_ended,
                f"the process that ran it ended without finishing it ({_names(dead) or 'it left'})",
                dead=[participant.key for participant in dead],
            )
            for participant in dead:
                participants.clear(participant)
            if dead or ended:
                self._tell(dead, ended)
        self._tell_repairs()
        self._known = known
        self._alone_since = joined if alone else -1
        return ended

    def _tell_repairs(self) -> None:
        repairs = self._memory.load(at.REPAIRS_AT)
        if repairs != self._repairs:
            more, self._repairs = repairs - self._repairs, repairs
            _log.warning(
                "session %s: transitions that killed writers broke off, now undone: %d",
                self.bindings.session_id,
                more,
                extra=about(
                    Event.EPOCH_REPAIRED,
                    session=self.bindings.session_id,
                    epoch=self.bindings.epoch_id,
                    repairs=more,
                ),
            )

    def _tell(self, dead: Sequence[Participant], ended: int) -> None:
        # It is unknown how they ended: a normal exit releases the same lock.
        _log.log(
            logging.WARNING if ended else logging.INFO,
            "session %s: %s ended; operations terminated with that: %d",
            self.bindings.session_id,
            _names(dead) or "a participant",
            ended,
            extra=about(
                Event.PARTICIPANTS_ENDED,
                session=self.bindings.session_id,
                epoch=self.bindings.epoch_id,
                pids=[participant.pid for participant in dead],
                operations=ended,
            ),
        )


def _names(participants: Sequence[Participant]) -> str:
    """The names of the first few, and how many more there are."""
    names = ", ".join(f"{one.role} process {one.pid}" for one in participants[:_NAMED])
    more = len(participants) - _NAMED
    return f"{names} and {more} more" if more > 0 else names


class Supervisor:
    """One thread that supervises every epoch of an adapter."""

    def __init__(self, epochs: Callable[[], Iterable[EpochSupervisor]]) -> None:
        self._epochs = epochs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shmepoch-supervisor", daemon=True)
        #: The errors of the last poll, so that each is logged once.
        self._failing: dict[EpochSupervisor, str] = {}

    def start(self) -> None:
        """Start the thread. Raises `RuntimeError` if that fails."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for its end unless the caller runs in it."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        names = _Names()
        for turn in count():
            if self._stop.wait(_INTERVAL_S):
                break
            changed = turn % _NAMES_EVERY == 0 and names.may_have_changed()
            life_turn = turn % _LIFE_EVERY
            failing: dict[EpochSupervisor, str] = {}
            for epoch in self._epochs():
                try:
                    if changed:
                        epoch.check_name()
                    if epoch.life_turn == life_turn:
                        epoch.bindings.shared_segment().show_life()
                    epoch.poll()
                # Another thread or process has just ended or left it.
                except (EpochSealed, EpochGone, BindingsClosed) as error:
                    _log.debug(
                        "not supervised: %s",
                        error,
                        extra=about(
                            Event.SUPERVISION_ENDED,
                            session=epoch.bindings.session_id,
                            epoch=epoch.bindings.epoch_id,
                            reason=str(error),
                        ),
                    )
                except Exception as error:  # of one epoch: the others go on
                    failing[epoch] = repr(error)
                    if self._failing.get(epoch) != failing[epoch]:
                        _log.exception(
                            "an epoch cannot be supervised; it is tried again",
                            extra=about(
                                Event.SUPERVISION_FAILED,
                                session=epoch.bindings.session_id,
                                epoch=epoch.bindings.epoch_id,
                                reason=failing[epoch],
                            ),
                        )
            self._failing = failing


class _Names:
    """Whether names in shared memory may have changed: one check for all epochs.

    A directory's time is as coarse as the kernel's clock, so a second change soon after the first
    may not show. So a change counts for the next poll as well, which is late enough.
    """

    def __init__(self) -> None:
        self._seen: object = None
        self._changed = True

    def may_have_changed(self) -> bool:
        now: object = None
        try:
            found = os.stat(SHM_DIR)
            now = found.st_dev, found.st_ino, found.st_mtime_ns
        except OSError:
            pass  # the directory is gone, and every name with it
        before, self._changed = self._changed, now != self._seen
        self._seen = now
        return self._changed or before
