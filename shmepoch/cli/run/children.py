"""Child processes of a run: started, heard, and ended with all their descendants."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any, Final

from shmepoch.cli import logs
from shmepoch.cli.run.descendants import adopt_orphans, children, kill_children
from shmepoch.cli.run.inherited import set_for_commands, take_all_descriptors
from shmepoch.cli.streams import complain, said
from shmepoch.errors import ShmepochError

_context = multiprocessing.get_context("spawn")

#: How long a child has to end after its pipe is closed. A worker gives its command less.
_GRACE_S: Final = 5.0


class ChildFailed(ShmepochError):
    """A child ended by itself. A new one would end in the same way, so it is not replaced."""

    role: str
    pid: int
    exitcode: int
    message = """the {role} process {pid} ended with status {exitcode}; it has said why, and the run
    cannot go on without it"""


class Children:
    """Starts the children of this process, and ends everything that they leave running."""

    def __init__(self) -> None:
        adopt_orphans()
        self._descriptors: Final = take_all_descriptors()
        resource_tracker.ensure_running()  # multiprocessing's own helper; it ends with this process
        self._not_ours: Final = frozenset(children())

    def start(
        self,
        role: str,
        main: Callable[..., None],
        args: tuple[object, ...],
        on_message: Callable[[Child, Any], None],
        on_death: Callable[[Child], None],
    ) -> Child:
        """Start a process that runs `main(pipe, *args)`; to be called on the event loop."""
        return Child(self._end_orphans, self._descriptors, role, main, args, on_message, on_death)

    def _end_orphans(self) -> None:
        """Kill the processes that dead children started."""
        alive = {child.pid for child in multiprocessing.active_children() if child.pid is not None}
        kill_children(keep=self._not_ours | alive)


class Child:
    """One child process and the runtime's end of its pipe, on an event loop."""

    def __init__(
        self,
        end_orphans: Callable[[], None],
        descriptors: int,
        role: str,
        main: Callable[..., None],
        args: tuple[object, ...],
        on_message: Callable[[Child, Any], None],
        on_death: Callable[[Child], None],
    ) -> None:
        self.role: Final = role
        self.killed = False
        self._end_orphans = end_orphans
        self._on_message = on_message
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(
            target=_main, args=(logs.configured(), descriptors, role, main, theirs, *args)
        )
        # The child inherits the mask: until it has its own session, a Ctrl-C reaches it too.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._loop.add_reader(self._pipe.fileno(), self._hear)
        self._loop.add_reader(self._process.sentinel, self._died)
        self._watched = True

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exitcode(self) -> int | None:
        """The exit code of multiprocessing: -9 if it was killed; None while it runs."""
        return self._process.exitcode

    def send(self, message: object) -> bool:
        """Send to the child; whether its pipe was open."""
        try:
            self._pipe.send(message)
        except OSError:
            return False
        return True

    def kill(self) -> bool:
        """Kill the child alone, as a crash would; whether it was alive."""
        self.killed = self.exitcode is None
        self._process.kill()
        return self.killed

    async def end(self) -> None:
        """Close the pipe, which ends the child, and kill everything that it started."""
        self._unwatch()
        ended = asyncio.Event()
        self._loop.add_reader(self._process.sentinel, ended.set)
        self._pipe.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), _GRACE_S)
        self._loop.remove_reader(self._process.sentinel)
        self._process.kill()
        self._bury()

    def _hear(self) -> None:
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            self._loop.remove_reader(self._pipe.fileno())  # its death is reported separately
            return
        self._on_message(self, message)

    def _died(self) -> None:
        while self._watched and self._pipe.poll():  # messages from before its death count
            try:
                self._on_message(self, self._pipe.recv())
            except (EOFError, OSError):
                break
        self._unwatch()
        self._pipe.close()
        self._bury()
        self._on_death(self)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove_reader(self._pipe.fileno())
            self._loop.remove_reader(self._process.sentinel)

    def _bury(self) -> None:
        self._process.join()
        self._end_orphans()


def _main(
    log: logs.Log,
    descriptors: int,
    role: str,
    main: Callable[..., None],
    pipe: object,
    *args: object,
) -> None:
    """The main function of every child."""
    log.configure()
    # A new session: only the runtime handles Ctrl-C, and commands have no terminal to wait for.
    os.setsid()
    # A handler, not SIG_IGN: commands would inherit that.
    signal.signal(signal.SIGINT, lambda *_: None)
    set_for_commands(descriptors)
    try:
        main(pipe, *args)
    except (ShmepochError, OSError) as error:
        complain(f"{role} process {os.getpid()}: {said(error)}")
        sys.exit(1)
