"""Bells: how one thread hears of commits in any number of epochs of other processes.

A thread can sleep on one futex, and a process may await thousands of epochs. So a namespace has a
page of bells. A process whose coroutines wait picks one bell, sets the bell's bit in every epoch
that it awaits, and has one thread that sleeps on the bell. A writer takes the bits after its commit
and rings those bells; it pays for this only if somebody awaits its epoch.

The page is made by the first who listens and removed by the last. A file that is being removed says
so, and whoever had it open opens the new one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import threading
import weakref
from pathlib import Path
from typing import Final

from shmepoch.forking import Part, on_fork
from shmepoch.lazy import lazy
from shmepoch.memory import layout as at
from shmepoch.memory._native import Descriptor, Memory, try_lock
from shmepoch.memory.files import (
    SHM_DIR,
    create_unnamed,
    link,
    map_shared,
    open_owned,
    unlink,
)
from shmepoch.memory.waiting import AsyncWait

BELLS: Final = 32
_SIZE: Final = at.PAGE

#    offset  field    meaning
_RETIRED: Final = 0  # not 0: the page is being removed
_FIRST_BELL: Final = at.PAGE // 2  # each bell, every 64 bytes: how often it rang, event word
_BELL_SIZE: Final = 64
_LISTENERS_BYTE: Final = 0  # lock byte: shared by listeners, exclusive to remove

#: How long a sleeping listener goes without looking: the bound on what a writer that was killed
#: between its commit and its ringing can delay.
_RECHECK_NS: Final = 250_000_000
#: Looks in vain after which a listener without waits ends.
_PATIENCE: Final = 2


class Bells:
    """This process's end of its namespace's bells."""

    def __init__(self, namespace: str) -> None:
        self._path: Final = bells_path(namespace)
        self._lock: threading.Lock
        self._waits: set[AsyncWait]
        self._thread: threading.Thread | None
        self._page: Memory | None
        self._fd: Descriptor | None
        self._reset()

    @staticmethod
    def of(namespace: str) -> Bells:
        """The one `Bells` of this process for `namespace`."""
        with _bells_lock:
            bells = _bells.get(namespace)
            if bells is None:
                bells = _bells[namespace] = Bells(namespace)
            return bells

    def ring(self, bits: int) -> None:
        """Ring every bell whose bit is set."""
        while True:
            memory = self._page
            if memory is None:
                try:
                    memory = self._page = self._open_page()
                except FileNotFoundError:
                    return  # the last listener has left
            for bell in range(BELLS):
                if bits >> bell & 1:
                    offset = _FIRST_BELL + bell * _BELL_SIZE
                    memory.fetch_add(offset, 1)
                    memory.wake(offset + at.WORD)
            if not memory.load(_RETIRED):
                return
            self._page = None

    def add(self, wait: AsyncWait) -> None:
        """Have the listening thread resolve `wait` once it is over."""
        with self._lock:
            if self._thread is None:
                page, self._fd = self._join_listeners()
                self._thread = threading.Thread(
                    target=self._listen, args=(page,), name="shmepoch-bells", daemon=True
                )
                self._thread.start()
            self._waits.add(wait)
        # Armed before the look: a commit after the look finds the bit and rings.
        self._arm(wait)
        if wait.over:
            wait.resolve()

    def discard(self, wait: AsyncWait) -> None:
        """Nobody waits for this any more."""
        with self._lock:
            self._waits.discard(wait)

    def stop(self) -> None:
        """End the listening thread, if there is one, and wait for it."""
        with self._lock:
            thread, self._stopping = self._thread, True
        if thread is not None:
            self.ring(1 << self._bell)
            thread.join()
        self._stopping = False

    def after_fork(self) -> None:
        """Forget the parent's thread, waits and locks."""
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._waits = set()
        self._thread = None
        self._stopping = False
        self._bell = random.randrange(BELLS)
        self._page = None
        self._fd = None

    def _arm(self, wait: AsyncWait) -> None:
        bit = 1 << self._bell
        if not wait.memory.load(at.BELLS_AT) & bit:
            wait.memory.fetch_or(at.BELLS_AT, bit)

    def _listen(self, page: Memory) -> None:
        bell = _FIRST_BELL + self._bell * _BELL_SIZE
        patience = _PATIENCE
        while True:
            rung = page.load(bell)
            with self._lock:
                waits = list(self._waits)
                patience = _PATIENCE if waits else patience - 1
                if self._stopping or patience < 0:
                    self._thread = None
                    fd, self._fd = self._fd, None
                    break
            for wait in waits:
                self._arm(wait)
                if wait.over:
                    wait.resolve()
                    self.discard(wait)
            page.wait_above(bell, rung, bell + at.WORD, _RETIRED, _RECHECK_NS)
        assert fd is not None
        _remove_if_last(page, fd, self._path)
        fd.close()

    def _open_page(self) -> Memory:
        fd = open_owned(self._path)
        try:
            return map_shared(fd, _SIZE)
        finally:
            fd.close()

    def _join_listeners(self) -> tuple[Memory, Descriptor]:
        """Open or make the page, and hold the listeners' lock through the descriptor."""
        while True:
            try:
                fd = open_owned(self._path)
            except FileNotFoundError:
                fd = create_unnamed(_SIZE)
                with contextlib.suppress(FileExistsError):
                    link(fd, self._path)
            page = map_shared(fd, _SIZE)
            if try_lock(fd, _LISTENERS_BYTE, True) and os.fstat(fd.fileno()).st_nlink > 0:
                if not page.load(_RETIRED):
                    return page, fd
                unlink(fd, self._path)  # whoever retired it was killed before this
            fd.close()


def bells_path(namespace: str) -> Path:
    """Where a namespace's bells lie while somebody listens."""
    return SHM_DIR / f"shmepoch.{namespace}.bells"


def remove_unused_bells(namespace: str) -> None:
    """Remove what listeners that were killed left behind."""
    path = bells_path(namespace)
    try:
        fd = open_owned(path)
    except FileNotFoundError:
        return
    try:
        _remove_if_last(map_shared(fd, _SIZE), fd, path)
    finally:
        fd.close()


def _remove_if_last(page: Memory, fd: Descriptor, path: Path) -> None:
    # An exclusive lock replaces this description's shared one only if nobody else has one.
    if try_lock(fd, _LISTENERS_BYTE, False):
        page.store(_RETIRED, 1)
        unlink(fd, path)


class SharedWaits:
    """The coroutines of this process that wait for one shared segment."""

    def __init__(self, memory: Memory, namespace: str) -> None:
        self._memory = memory
        self._namespace = namespace

    @lazy
    def _bells(self) -> Bells:
        return Bells.of(self._namespace)  # not before somebody waits: most never do

    def add(self, wait: AsyncWait, /) -> None:
        self._bells.add(wait)

    def discard(self, wait: AsyncWait, /) -> None:
        self._bells.discard(wait)

    def notify(self) -> None:
        if self._memory.load(at.BELLS_AT):
            self._bells.ring(self._memory.exchange(at.BELLS_AT, 0))


_bells: weakref.WeakValueDictionary[str, Bells] = weakref.WeakValueDictionary()
_bells_lock = threading.Lock()


def _after_fork_in_child() -> None:
    global _bells_lock
    _bells_lock = threading.Lock()
    for bells in list(_bells.values()):
        bells.after_fork()


@atexit.register
def _stop_listening() -> None:
    for bells in list(_bells.values()):
        bells.stop()


on_fork(Part.BELLS, after_in_child=_after_fork_in_child)
