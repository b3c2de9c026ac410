"""Child processes of a run: how they are started, heard, and ended with all they started."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any, Final

_context = multiprocessing.get_context("spawn")

#: How long a child has to end by itself once its pipe is closed.
_GRACE_S: Final = 5.0


class Child:
    """One child process and the runtime's end of its pipe, on an event loop."""

    def __init__(
        self,
        role: str,
        target: Callable[..., None],
        args: tuple[object, ...],
        on_message: Callable[[Child, Any], None],
        on_death: Callable[[Child], None],
    ) -> None:
        self.role: Final = role
        self._on_message = on_message
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._pipe, theirs = _context.Pipe()
        token, *others = args
        self._process = _context.Process(target=target, args=(token, theirs, *others))
        self._process.start()
        theirs.close()
        self._loop.add_reader(self._pipe.fileno(), self._hear)
        self._loop.add_reader(self._process.sentinel, self._died)
        self._watched = True

    @property
    def pid(self) -> int:
        """The child's process id, which is its process group's too."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exitcode(self) -> int | None:
        """How it ended, as multiprocessing says it; None while it runs."""
        return self._process.exitcode

    def send(self, message: object) -> bool:
        """Send to the child; whether it was there to take it."""
        try:
            self._pipe.send(message)
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """Kill the child alone, as a crash would."""
        os.kill(self.pid, signal.SIGKILL)

    def kill_group(self) -> None:
        """Kill the child with everything it started."""
        with contextlib.suppress(ProcessLookupError):  # before it has made its group
            os.killpg(self.pid, signal.SIGKILL)
        self.kill()

    async def end(self) -> None:
        """Close the pipe, which ends the child, and make sure of everything it started."""
        self._unwatch()
        ended = asyncio.Event()
        self._loop.add_reader(self._process.sentinel, ended.set)
        self._pipe.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), _GRACE_S)
        self._loop.remove_reader(self._process.sentinel)
        self._bury()

    def _hear(self) -> None:
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            self._loop.remove_reader(self._pipe.fileno())  # its death is heard of by itself
            return
        self._on_message(self, message)

    def _died(self) -> None:
        while self._watched and self._pipe.poll():  # what it said before it died counts
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
        # Before the child is reaped: until then nobody else can have its process group's number.
        self.kill_group()
        self._process.join()
