"""Claims: a process holds the place of the epoch's one agent or one loop until it releases it.

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
    """An epoch's memory, of which a byte can be claimed."""

    @property
    def carrier(self) -> Descriptor | None:
        """The descriptor that carries the locks; None for private memory."""
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
        """Leave the list, and release the lock with the last claim of its byte."""
        claims, carrier = self._segment.claims, self._segment.carrier
        if self in claims:
            claims.remove(self)
            if carrier is None or carrier.closed:
                return  # the lock is released already, or is the parent's
            if all(other.byte != self.byte for other in claims):
                unlock(carrier, self.byte)


class Claim:
    """Holds a byte of an epoch until it is released, collected or lost.

    An interrupt cannot leave it held without an owner: then it is collected.
    """

    def __init__(self, listed: Listed) -> None:
        self._listed: Final = listed

    @property
    def held(self) -> bool:
        """Whether it still holds its byte."""
        return self._listed.held

    def release(self) -> None:
        """Release the byte. It never waits, since a finalizer calls it too, at any point."""
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
        # In the list before the check: finalizers and signal handlers may enter the lock again, and
        # must find it there.
        segment.claims.append(listed)
        try:
            if listed.is_excluded() or not listed.lock():
                made.release()
        except BaseException:
            made.release()  # at once: a traceback may keep it from being collected
            raise
    _settle()
    return made if made.held else None


def lose_claims(segment: Claimable) -> None:
    """Drop all claims. The locks are released already, or are released with the descriptor."""
    if not segment.claims:
        return  # the usual case; a claim that is being made finds the descriptor closed
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
    """Drop the released claims. If another thread has the lock, it drops them when it is done."""
    while _released and _lock.acquire(blocking=False):
        try:
            with contextlib.suppress(IndexError):  # a finalizer was faster
                _released.popleft().drop()
        finally:
            _lock.release()


def claims_after_fork() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()
    _released.clear()
