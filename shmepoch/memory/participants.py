"""Participants: the processes attached to a segment, and which of them are still alive.

A participant holds the lock byte of its slot for as long as it lives. The kernel releases the lock
with the process, however it died and in whatever container: no heartbeat, PID or clock is needed.
Each participant has a number that is never used twice. It distinguishes a slot's present holder
from earlier ones.
"""

from __future__ import annotations

import os
from datetime import datetime
from enum import StrEnum
from typing import Final

import msgspec

from shmepoch import _native as at
from shmepoch._native import Descriptor, Memory, is_locked, try_lock, unlock
from shmepoch.errors import ParticipantsExhausted, SegmentCorrupted
from shmepoch.memory.clock import moment, wall_ms
from shmepoch.memory.layout import Layout

_SLOT_BITS: Final = 8
_LAST_NUMBER: Final = 2**48


class Role(StrEnum):
    """The task of a participant in its epoch."""

    RUNTIME = "runtime"
    AGENT = "agent"
    WORKER = "worker"
    PERSISTENCE = "persistence"
    OBSERVER = "observer"

    def __init__(self, *value: str) -> None:
        #: The number of the role in a participant's word.
        self.number: Final = len(type(self).__members__)


_ROLES: Final = tuple(Role)


class Participant(msgspec.Struct, frozen=True, kw_only=True):
    """The holder of one slot; `alive` is false if it died. `pid` is of its own PID namespace."""

    slot: int
    number: int
    role: Role
    pid: int
    joined_at_ms: int
    alive: bool
    is_self: bool

    @property
    def joined_at(self) -> datetime:
        """When it attached, in UTC; `OverflowError` for no year of a calendar."""
        return moment(self.joined_at_ms)

    @property
    def key(self) -> int:
        """The participant's name in the slots of the operations that it runs."""
        return self.number << _SLOT_BITS | self.slot


class Participants:
    """The participant table of one attached segment."""

    def __init__(self, memory: Memory, fd: Descriptor, capacity: int, name: str) -> None:
        self._memory = memory
        self._fd = fd
        self._capacity = capacity
        self._name = name

    def join(self, role: Role, *, only_free: bool = False) -> int:
        """Take a free slot, or unless `only_free` one whose holder died. Returns the new
        participant's key.

        It takes the slot's lock, so two processes that join at once need no other lock. Raises
        `ParticipantsExhausted` if every slot has a live holder.
        """
        # A load that the kernel treats as a store. If the first access to a new mapping is a store,
        # it maps one page; if it is a load, sixteen, which take longer to map and to unmap.
        joined = self._memory.fetch_or(at.JOINED_AT, 0)
        if joined >= _LAST_NUMBER:
            raise SegmentCorrupted(self._name, "joined", f"below {_LAST_NUMBER}", joined)
        slot = self._lock_slot(only_free)
        offset = Layout.participant(slot)
        number = self._memory.fetch_add(at.JOINED_AT, 1) + 1
        self._memory.store(offset + at.PARTICIPANT_PID, os.getpid())
        self._memory.store(offset + at.PARTICIPANT_JOINED, wall_ms())
        self._memory.store(offset, number << _SLOT_BITS | role.number)
        return number << _SLOT_BITS | slot

    def _lock_slot(self, only_free: bool) -> int:
        """Lock a free slot, else one whose holder died: so the supervisor can see the dead
        first."""
        slot = self._free_slot(0)
        while slot >= 0:
            if try_lock(self._fd, at.PARTICIPANT_BYTE + slot, False):
                return slot
            slot = self._free_slot(slot + 1)
        for slot in range(0 if only_free else self._capacity):
            if try_lock(self._fd, at.PARTICIPANT_BYTE + slot, False):
                return slot
        raise ParticipantsExhausted(self._capacity, self._name)

    def _free_slot(self, start: int) -> int:
        return self._memory.find(at.PARTICIPANTS_AT, self._capacity, 0, start, at.PARTICIPANT_SIZE)

    def announce(self, key: int, role: Role) -> None:
        """Change the role of this attachment's participant."""
        self._memory.store(
            Layout.participant(slot_of(key)), number_of(key) << _SLOT_BITS | role.number
        )

    def leave(self, key: int) -> None:
        """Free the slot of this attachment's participant. Its lock is released with the descriptor,
        which is about to be closed."""
        self._memory.store(Layout.participant(slot_of(key)), 0)

    def list(self, *, me: int = 0) -> list[Participant]:
        """The holders of slots, dead ones included; `me` is this attachment."""
        found = []
        for slot, word in enumerate(self._words()):
            if word == 0:
                continue
            offset = Layout.participant(slot)
            number, role = word >> _SLOT_BITS, word & ((1 << _SLOT_BITS) - 1)
            if role >= len(_ROLES):
                raise SegmentCorrupted(
                    self._name, f"participants[{slot}].role", f"below {len(_ROLES)}", role
                )
            is_self = (number << _SLOT_BITS | slot) == me
            found.append(
                Participant(
                    slot=slot,
                    number=number,
                    role=_ROLES[role],
                    pid=self._memory.load(offset + at.PARTICIPANT_PID),
                    joined_at_ms=self._memory.load(offset + at.PARTICIPANT_JOINED),
                    alive=is_self or is_locked(self._fd, at.PARTICIPANT_BYTE + slot),
                    is_self=is_self,
                )
            )
        return found

    def is_alive(self, key: int) -> bool:
        """Whether the participant with this key is attached. Not for this attachment itself."""
        slot = slot_of(key)
        number = self._memory.load(Layout.participant(slot)) >> _SLOT_BITS
        return number == number_of(key) and is_locked(self._fd, at.PARTICIPANT_BYTE + slot)

    def others_hold_slots(self) -> bool:
        """Whether another attachment is a participant. It holds its slot's lock from before it
        joins until it ends."""
        return any(is_locked(self._fd, at.PARTICIPANT_BYTE + i) for i in range(self._capacity))

    def joined(self) -> int:
        """How many participants ever joined."""
        return self._memory.load(at.JOINED_AT)

    def clear(self, dead: Participant) -> None:
        """Free the slot of a participant that died, unless another has taken it since."""
        if not try_lock(self._fd, at.PARTICIPANT_BYTE + dead.slot, False):
            return
        offset = Layout.participant(dead.slot)
        if self._memory.load(offset) >> _SLOT_BITS == dead.number:
            self._memory.store(offset, 0)
        unlock(self._fd, at.PARTICIPANT_BYTE + dead.slot)

    def _words(self) -> tuple[int, ...]:
        return self._memory.load_column(at.PARTICIPANTS_AT, self._capacity, at.PARTICIPANT_SIZE)


def number_of(key: int) -> int:
    """The number in a participant's key."""
    return key >> _SLOT_BITS


def slot_of(key: int) -> int:
    """The slot in a participant's key."""
    return key & ((1 << _SLOT_BITS) - 1)
