"""Child processes of a test, started in all the ways of Python programs."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, cast

from shmepoch import SessionRuntimeBindings

#: "subprocess" is a new interpreter that gets a token in its environment.
METHODS: Final = ("fork", "spawn", "forkserver", "subprocess")
#: Longer than any step takes on any machine; a process that reaches it hangs.
WATCHDOG_S: Final = 60.0

_ROOT: Final = Path(__file__).parents[2]
_MAIN: Final = "from tests.processes.children import main; main()"


class _Raised(NamedTuple):
    error: BaseException
    traceback: str


class Channel:
    """One end of the connection between a test and its child."""

    def __init__(self, connection: Connection) -> None:
        self.connection: Final = connection

    def say(self, value: object) -> None:
        """Send a value to the other side."""
        self.connection.send(value)

    def hear(self) -> Any:
        """The next value from the other side; raises its error, or `EOFError` if it is gone."""
        assert self.connection.poll(WATCHDOG_S), "nothing was said"
        value = self.connection.recv()
        if isinstance(value, _Raised):
            value.error.add_note(value.traceback)
            raise value.error
        return value

    @property
    def silent(self) -> bool:
        """Whether no value has come."""
        return not self.connection.poll()


class Child(Channel):
    """A started process. At the end of its `with` it is killed if it still lives."""

    def __init__(
        self, process: BaseProcess | subprocess.Popen[bytes], connection: Connection
    ) -> None:
        super().__init__(connection)
        assert process.pid is not None
        self.pid: Final = process.pid
        self._process = process

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, and wait until it is dead."""
        self.signal(signal.SIGKILL)
        self.join()

    def join(self) -> int:
        """Wait for its end; its exit code, negative if a signal ended it."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.wait(WATCHDOG_S)
        # Not join with a timeout: that waits for the end of every child which it has forked, too.
        process = self._process
        wait_until(lambda: process.exitcode is not None)
        return cast(int, process.exitcode)

    def result(self) -> Any:
        """The result of its act, after its end."""
        value = self.hear()
        assert self.join() == 0
        return value

    def stopped(self) -> bool:
        """Whether a signal has stopped it."""
        state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if isinstance(self._process, subprocess.Popen):
            alive = self._process.poll() is None
        else:
            alive = self._process.is_alive()
        if alive:
            self.kill()
        self.connection.close()
        if isinstance(self._process, BaseProcess):
            self._process.join()
            self._process.close()


def start(
    act: Callable[..., Any],
    bindings: SessionRuntimeBindings | None,
    *args: object,
    method: str = "fork",
) -> Child:
    """Start a child that calls `act(bindings, channel, *args)`.

    At its end it sends its result, or its error.
    """
    ours, theirs = Pipe()
    try:
        if method == "subprocess":
            return Child(_popen(act, bindings, args, ours, theirs), ours)
        context: BaseContext = multiprocessing.get_context(method)
        process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=_perform, args=(act, bindings, theirs, ours if method == "fork" else None, args)
        )
        process.start()
        return Child(process, ours)
    finally:
        theirs.close()


def _popen(
    act: Callable[..., Any],
    bindings: SessionRuntimeBindings | None,
    args: tuple[object, ...],
    ours: Connection,
    theirs: Connection,
) -> subprocess.Popen[bytes]:
    environment = dict(os.environ, TEST_CHANNEL=str(theirs.fileno()))
    if bindings is not None:
        environment["SHMEPOCH_TOKEN"] = bindings.to_token()
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN],
        cwd=_ROOT,
        env=environment,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    ours.send((act.__module__, act.__qualname__, args))
    return process


def main() -> None:
    """The main program of a new interpreter from `start`."""
    connection = Connection(int(os.environ["TEST_CHANNEL"]))
    module, name, args = connection.recv()
    token = os.environ.get("SHMEPOCH_TOKEN")
    bindings = SessionRuntimeBindings.from_token(token) if token else None
    _perform(getattr(importlib.import_module(module), name), bindings, connection, None, args)


def _perform(
    act: Callable[..., Any],
    bindings: SessionRuntimeBindings | None,
    connection: Connection,
    inherited: Connection | None,
    args: tuple[Any, ...],
) -> None:
    if inherited is not None:
        inherited.close()
    channel = Channel(connection)
    try:
        said = act(bindings, channel, *args)
        pickle.dumps(said)
    except BaseException as error:
        said = _Raised(error, traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):  # the test is over
        channel.say(said)
    connection.close()


def wait_until(look: Callable[[], bool]) -> None:
    """Wait until `look` is true; for children, which cannot fail a test."""
    deadline = time.monotonic() + WATCHDOG_S
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition never came true")
        time.sleep(0.001)
