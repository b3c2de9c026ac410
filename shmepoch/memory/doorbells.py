"""Doorbells: one thread waits for commits of other processes, in any number of epochs.

A thread can sleep on one futex, and a process may await thousands of epochs. So a user has a page
of doorbells in each namespace. A process whose coroutines wait picks one doorbell, sets its bit in
every epoch that it awaits, and has one thread that sleeps on the doorbell. A writer takes the bits
after its commit and rings those doorbells; it pays for this only if a process awaits its epoch.

The page is made by the first process that listens and removed by the last.

DOORBELLS-1: a process never waits for another one here, and another file with the page's name does
no harm. A process may be stopped or killed between any two steps of making or removing a page, so

- a page has a word that says that its listeners have left it for good. A writer that has such a
  page opens the name again, once; a listener joins again. A listener that finds a page in removal
  completes the removal and makes a new page.
- a listener also checks the name of its page, and its waits, four times a second. So a page that
  has lost its name, or cannot be opened, only delays a wake-up.
"""

from __future__ import annotations

import atexit
import os
import random
import threading
import time
from pathlib import Path
from typing import Final

from shmepoch import _native as at
from shmepoch._native import Descriptor, Memory, is_locked, try_lock
from shmepoch.forking import Part, on_fork
from shmepoch.lazy import lazy
from shmepoch.memory.files import (
    SHM_DIR,
    NewFile,
    map_shared,
    open_owned,
    unlink,
)
from shmepoch.memory.namespaces import name_prefix
from shmepoch.memory.waiting import RECHECK_S, AsyncWait, report_once

DOORBELLS: Final = 32
_SIZE: Final = at.PAGE
_BLOCK: Final = 512  # the unit of st_blocks

#    offset  field    meaning
_RETIRED: Final = 0  # not 0: the page was left for good
_FIRST_DOORBELL: Final = (
    at.PAGE // 2
)  # each doorbell, every 64 bytes: how often it rang, event word
_DOORBELL_SIZE: Final = 64
_LISTENERS_BYTE: Final = 0  # lock byte: shared by listeners, exclusive to remove

_RECHECK_NS: Final = round(RECHECK_S * 1e9)
#: How often a listener without waits polls again before it ends.
_PATIENCE: Final = 2
#: How many pages in removal a listener finds, one after the other, before it goes on without one.
_ATTEMPTS: Final = 8
#: How long a writer rings a page before it opens the name again. A process that does not know of
#: doorbells, such as a cleaner of temporary files, may have removed the name.
_PAGE_S: Final = 1.0
#: How long a process that ends waits for its listener.
_END_S: Final = 1.0


class Doorbells:
    """This process's end of its namespace's doorbells."""

    def __init__(self, path: Path) -> None:
        self._path: Final = path
        self._waits: set[AsyncWait]
        self._listening: threading.Lock  # held by the one thread that listens
        self._stopping: bool
        self._doorbell: int
        self._page: Memory | None  # for writing, until `_page_ends` on the monotonic clock
        self._page_ends: float
        self._heard: Memory | None  # for listening
        self._fd: Descriptor | None  # of `_heard`; it carries the listeners' lock
        self._reset()

    @staticmethod
    def of(namespace: str) -> Doorbells:
        """The one `Doorbells` of this process for `namespace`."""
        path = doorbells_path(namespace)
        # `get` first: `setdefault` alone would make an object each time. If two are made at once,
        # one stays.
        return _doorbells.get(path) or _doorbells.setdefault(path, Doorbells(path))

    def ring(self, bits: int) -> None:
        """Ring every doorbell whose bit is set. Raises `OSError` if it cannot."""
        page, now = self._page, time.monotonic()
        # If the page is left after this check, the bits cannot be of its successor, which is newer.
        if page is None or page.load(_RETIRED) or now >= self._page_ends:
            page = self._page = self._open_page()
            self._page_ends = now + _PAGE_S
        if page is not None:
            for doorbell in range(DOORBELLS):
                if bits >> doorbell & 1:
                    _ring(page, doorbell)

    def add(self, wait: AsyncWait) -> None:
        """Have the listening thread resolve `wait` once it is over."""
        self._waits.add(wait)
        # A thread that is about to end checks for waits after it has released this lock.
        if not self._listening.locked() and not self._start():
            wait.poll_by_itself()
        # Armed before the check: a commit after the check finds the bit and rings.
        self._arm(wait)
        if wait.over:
            wait.resolve()

    def discard(self, wait: AsyncWait) -> None:
        """Forget a wait that is over."""
        self._waits.discard(wait)

    def stop(self) -> None:
        """End the listening, if there is any, and wait a second at most until it has ended."""
        self._stopping = True
        heard = self._heard
        if heard is not None:
            _ring(heard, self._doorbell)
        if self._listening.acquire(timeout=_END_S):
            self._listening.release()

    def after_fork(self) -> None:
        """Forget the parent's thread, waits and locks."""
        self._reset()

    def _reset(self) -> None:
        self._waits = set()
        self._listening = threading.Lock()
        self._stopping = False
        self._doorbell = random.randrange(DOORBELLS)
        self._page = None
        self._page_ends = 0.0
        self._heard = None
        self._fd = None

    def _arm(self, wait: AsyncWait) -> None:
        bit = 1 << self._doorbell
        if not wait.memory.load(at.DOORBELLS_AT) & bit:
            wait.memory.fetch_or(at.DOORBELLS_AT, bit)

    def _start(self) -> bool:
        """Start a thread that listens; False if that fails."""
        if _exiting:
            return False  # it would leave its page behind, and newer interpreters refuse it
        self._stopping = False
        try:
            threading.Thread(target=self._listen, name="shmepoch-doorbells", daemon=True).start()
        except RuntimeError as error:
            report_once("no thread listens for commits; each wait polls by itself", error)
            return False
        return True

    # --- the listening thread -----------------------------------------------------------------

    def _listen(self) -> None:
        # A wait may have been added while this thread stopped listening, and relies on it. The copy
        # orders this check after the addition, also without an interpreter lock.
        while list(self._waits) and not self._stopping:
            if not self._listening.acquire(blocking=False):
                return  # another thread was faster
            try:
                self._serve()
            except Exception as error:
                report_once("the waits for commits of other processes were not polled", error)
                time.sleep(RECHECK_S)
            finally:
                self._listening.release()

    def _serve(self) -> None:
        doorbell = _FIRST_DOORBELL + self._doorbell * _DOORBELL_SIZE
        patience = _PATIENCE
        page = self._join_listeners()
        try:
            while True:
                rung = page.load(doorbell)
                waits = list(self._waits)
                patience = _PATIENCE if waits else patience - 1
                if self._stopping or patience < 0:
                    break
                for wait in waits:
                    self._arm(wait)
                    if wait.over:
                        wait.resolve()
                        self._waits.discard(wait)
                told = page.wait_above(doorbell, rung, doorbell + at.WORD, _RETIRED, _RECHECK_NS)
                if page.load(_RETIRED) or not (told or self._is_named()):
                    self._leave_listeners(page, last=False)
                    page = self._join_listeners()
        finally:
            self._leave_listeners(page, last=True)

    def _is_named(self) -> bool:
        return self._fd is not None and os.fstat(self._fd.fileno()).st_nlink > 0

    def _join_listeners(self) -> Memory:
        """The page to listen on; if there is none now, memory that no writer rings."""
        page = None
        try:
            for _ in range(_ATTEMPTS):
                page = self._try_join()
                if page is not None:
                    break
        except OSError as error:
            report_once("commits of other processes are noticed late, by polling", error)
        self._heard = page or Memory.private(_SIZE)
        return self._heard

    def _try_join(self) -> Memory | None:
        """Open or make the page, and hold the listeners' lock through its descriptor.

        None if another process was faster, or if the page is being removed: this completes the
        removal.
        """
        new = None
        try:
            fd = open_owned(self._path)
        except FileNotFoundError:
            new = NewFile(self._path, _SIZE)
            fd = new.fd
        joined = False
        try:
            if new is not None:
                try:
                    new.publish()
                except FileExistsError:
                    return None  # another listener was faster
            page = _map_page(fd)
            # The lock is refused while a process removes the page, even if that process is stopped.
            if (
                page is not None
                and try_lock(fd, _LISTENERS_BYTE, True)
                and os.fstat(fd.fileno()).st_nlink > 0
                and not page.load(_RETIRED)
            ):
                self._fd, joined = fd, True
                return page
            _retire(page, fd, self._path)
            return None
        finally:
            if new is not None:
                new.discard()
            if not joined:
                fd.close()

    def _leave_listeners(self, page: Memory, *, last: bool) -> None:
        """Leave the page for good: it is retired or has lost its name. With `last` this thread
        stops, and the page is removed if no other process listens."""
        self._heard = None
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            if last:
                _remove_if_unused(page, fd, self._path)
            else:
                _retire(page, fd, self._path)
        finally:
            fd.close()

    # --- writers ------------------------------------------------------------------------------

    def _open_page(self) -> Memory | None:
        """The page that listeners hear now, or None if there is none."""
        try:
            fd = open_owned(self._path)
        except FileNotFoundError:
            return None  # the last listener has left
        try:
            page = _map_page(fd)
        finally:
            fd.close()
        return None if page is None or page.load(_RETIRED) else page


def _ring(page: Memory, doorbell: int) -> None:
    offset = _FIRST_DOORBELL + doorbell * _DOORBELL_SIZE
    page.fetch_add(offset, 1)
    page.wake(offset + at.WORD)


def _map_page(fd: Descriptor) -> Memory | None:
    """The page in a file of this user's; None if the file has no whole page. An access beyond the
    end of the file is a SIGBUS, and so is an access to a page that was not reserved if tmpfs is
    full."""
    found = os.fstat(fd.fileno())
    whole = found.st_size == _SIZE and found.st_blocks * _BLOCK >= _SIZE
    return map_shared(fd, _SIZE) if whole else None


def _retire(page: Memory | None, fd: Descriptor, path: Path) -> None:
    """Leave a page for good. The word is set before the name is removed: a listener that finds no
    page makes a new one, and by then a writer that has this page must know."""
    if page is not None:
        page.store(_RETIRED, 1)
        for doorbell in range(DOORBELLS):
            page.wake(_FIRST_DOORBELL + doorbell * _DOORBELL_SIZE + at.WORD)
    unlink(fd, path)


def _remove_if_unused(page: Memory | None, fd: Descriptor, path: Path) -> bool:
    # An exclusive lock replaces this description's shared one only if no other has one.
    unused = try_lock(fd, _LISTENERS_BYTE, False)
    if unused:
        _retire(page, fd, path)
    return unused


def doorbells_path(namespace: str) -> Path:
    """The path of this user's doorbells of a namespace, while a process listens."""
    return SHM_DIR / f"{name_prefix(namespace)}{os.geteuid()}.doorbells"


def remove_unused_doorbells(namespace: str) -> bool:
    """Remove a page that killed listeners left behind; whether there was one. A page of another
    user stays."""
    path = doorbells_path(namespace)
    try:
        fd = open_owned(path)
    except OSError:
        return False
    try:
        return _remove_if_unused(_map_page(fd), fd, path)
    finally:
        fd.close()


def has_listeners(namespace: str) -> bool:
    """Whether a process listens on this user's page of doorbells; raises what `open_owned` does."""
    fd = open_owned(doorbells_path(namespace))
    try:
        return is_locked(fd, _LISTENERS_BYTE)
    finally:
        fd.close()


class SharedWaits:
    """The coroutines of this process that wait for one shared segment."""

    def __init__(self, memory: Memory, namespace: str) -> None:
        self._memory = memory
        self._namespace = namespace

    @lazy
    def _doorbells(self) -> Doorbells:
        return Doorbells.of(self._namespace)  # at the first wait: most segments never have one

    def add(self, wait: AsyncWait, /) -> None:
        self._doorbells.add(wait)

    def discard(self, wait: AsyncWait, /) -> None:
        self._doorbells.discard(wait)

    def notify(self) -> None:
        if self._memory.load(at.DOORBELLS_AT):
            self._doorbells.ring(self._memory.exchange(at.DOORBELLS_AT, 0))


_doorbells: Final[dict[Path, Doorbells]] = {}
_exiting = False


def _after_fork_in_child() -> None:
    for doorbells in list(_doorbells.values()):
        doorbells.after_fork()


@atexit.register
def _stop_listening() -> None:
    global _exiting
    _exiting = True
    for doorbells in list(_doorbells.values()):
        doorbells.stop()


on_fork(Part.DOORBELLS, after_in_child=_after_fork_in_child)
