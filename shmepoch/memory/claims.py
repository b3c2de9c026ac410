"""Claims: being the epoch's one agent or its one loop, until it is given up.

The kernel proves a claim to other processes: a lock on one byte, which it drops with the process.
Locks of one descriptor do not exclude each other, and all bindings that a process has of an epoch
share one. So a segment also keeps a list of its process's claims. Private memory has only the list.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from typing import Final, Protocol

from shmepoch._native import Descriptor, try_lock, unlock


class Claimable(Protocol):
    """What can be claimed: an epoch's memory."""

    @property
    def carrier(self) -> Descriptor | None:
        """The descriptor that carries the locks; None of private memory."""
        ...

    @property
    def claims(self) -> list[Listed]:
        """The claims of this process, in the order in which they were made."""
        ...


class Listed:
    """A claim as its segment lists it."""

    def __init__(self, segment: Claimable, byte: int, shared: bool) -> None:
        self.byte: Final = byte
        self.shared: Final = shared
        self.held = True
        self._segment: Final = segment

    def is_excluded(self) -> bool:
        """Whether a claim that this process made before excludes this one."""
        before = itertools.takewhile(lambda other: other is not self, list(self._segment.claims))
        return any(
            other.byte == self.byte and other.held and not (self.shared and other.shared)
            for other in before
        )

    def lock(self) -> bool:
        """Take the lock of its byte, if there are locks; whether other processes allow it."""
        carrier = self._segment.carrier
        return carrier is None or try_lock(carrier, self.byte, self.shared)

    def drop(self) -> None:
        """Leave the list, and give the lock up with the last claim of its byte."""
        claims, carrier = self._segment.claims, self._segment.carrier
        if self in claims:
            claims.remove(self)
            if carrier is None or carrier.closed:
                return  # then no lock is left, or it is the parent's
            if all(other.byte != self.byte for other in claims):
                unlock(carrier, self.byte)


class Claim:
    """Holds a byte of an epoch until it is released, collected or lost.

    It is collected wherever an interrupt leaves it, so none is held without an owner.
    """

    def __init__(self, listed: Listed) -> None:
        self._listed: Final = listed

    @property
    def held(self) -> bool:
        """Whether it still holds its byte."""
        return self._listed.held

    def release(self) -> None:
        """Give it up. Waits for nothing, since it is also what a finalizer does, at any point."""
        if self._listed.held:
            self._listed.held = False
            _released.append(self._listed)
            _settle()

    def __del__(self) -> None:
        self.release()


def claim(segment: Claimable, byte: int, *, shared: bool) -> Claim | None:
    """Claim `byte`, alone or with others that share it; None while other claims exclude that."""
    listed = Listed(segment, byte, shared)
    made = Claim(listed)
    with _lock:
        # In the list before it looks: finalizers and signal handlers may enter the lock again, and
        # have to find it there.
        segment.claims.append(listed)
        try:
            if listed.is_excluded() or not listed.lock():
                made.release()
        except BaseException:
            made.release()  # not when it is collected: a traceback may keep it
            raise
    _settle()
    return made if made.held else None


def lose_claims(segment: Claimable) -> None:
    """The locks are gone, or go with the descriptor, which is this segment's no more."""
    if not segment.claims:
        return  # as most have none; one that is being made finds the descriptor closed
    with _lock:
        for lost in segment.claims:
            lost.held = False
        segment.claims.clear()
    _settle()


#: Guards the lists of claims. Finalizers and signal handlers enter it again.
_lock = threading.RLock()
#: Claims to be dropped by the next thread that has the lock.
_released: Final[deque[Listed]] = deque()


def _settle() -> None:
    """Drop what was released. A thread that has the lock meanwhile does so when it is done."""
    while _released and _lock.acquire(blocking=False):
        try:
            with contextlib.suppress(IndexError):  # a finalizer in between was faster
                _released.popleft().drop()
        finally:
            _lock.release()


def claims_after_fork() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()
    _released.clear()
