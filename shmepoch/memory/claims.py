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

from shmepoch.memory._native import Descriptor, try_lock, unlock


class Claimable(Protocol):
    """What can be claimed: an epoch's memory."""

    @property
    def carrier(self) -> Descriptor | None:
        """The descriptor that carries the locks; None of private memory."""
        ...

    @property
    def claims(self) -> list[Claim]:
        """The claims of this process, in the order in which they were made."""
        ...


class Claim:
    """One claim of this process, held from its making until it is released or lost."""

    def __init__(self, segment: Claimable, byte: int, *, shared: bool) -> None:
        self.byte: Final = byte
        self.shared: Final = shared
        self.held = True
        self._segment: Final = segment

    def release(self) -> None:
        """Give it up. Waits for nothing, so a finalizer may call it at any point."""
        if self.held:
            self._discard()

    def _discard(self) -> None:
        self.held = False
        _released.append(self)
        _settle()

    def _is_excluded(self) -> bool:
        """Whether a claim that this process made before excludes this one."""
        before = itertools.takewhile(lambda other: other is not self, list(self._segment.claims))
        return any(
            other.byte == self.byte and other.held and not (self.shared and other.shared)
            for other in before
        )

    def _lock(self) -> bool:
        carrier = self._segment.carrier
        return carrier is None or try_lock(carrier, self.byte, self.shared)

    def _drop(self) -> None:
        """Forget a released claim, and give the lock up with the last one of its byte."""
        claims, carrier = self._segment.claims, self._segment.carrier
        if self in claims:
            claims.remove(self)
            if carrier is None or carrier.closed:
                return  # then no lock is left, or it is the parent's
            if all(other.byte != self.byte for other in claims):
                unlock(carrier, self.byte)


def claim(segment: Claimable, byte: int, *, shared: bool) -> Claim | None:
    """Claim `byte`, alone or with others that share it; None while other claims exclude that."""
    made = Claim(segment, byte, shared=shared)
    with _lock:
        # In the list before it looks: finalizers and signal handlers may enter the lock again, and
        # have to find it there.
        segment.claims.append(made)
        try:
            if made._is_excluded() or not made._lock():
                made._discard()
        except BaseException:
            made._discard()
            raise
    _settle()
    return made if made.held else None


def lose_claims(segment: Claimable) -> None:
    """The locks are gone, or go with the descriptor, which is this segment's no more."""
    with _lock:
        for lost in segment.claims:
            lost.held = False
        segment.claims.clear()
    _settle()


#: Guards the lists of claims. Finalizers and signal handlers enter it again.
_lock = threading.RLock()
#: Claims to be dropped by the next thread that has the lock.
_released: Final[deque[Claim]] = deque()


def _settle() -> None:
    """Drop what was released. A thread that has the lock meanwhile does so when it is done."""
    while _released and _lock.acquire(blocking=False):
        try:
            with contextlib.suppress(IndexError):  # a finalizer in between was faster
                _released.popleft()._drop()
        finally:
            _lock.release()


def claims_after_fork() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()
    _released.clear()
