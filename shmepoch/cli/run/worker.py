"""The worker process: runs commands as operations of its epoch."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Final

from shmepoch.cli.run.messages import Assignment, Idle
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.operations import (
    OperationKind,
    OperationProgressUpdate,
    OperationResult,
    OperationSpec,
)
from shmepoch.errors import InvalidTransition
from shmepoch.ids import OperationId

#: How much of the end of a command's output its operation keeps.
TAIL_BYTES: Final = 4096
#: How much of a command, or of a line of output, names it in tables.
NAME_BYTES: Final = 200
#: Between two progress reports; a report tells how many lines there have been.
_REPORT_EVERY_S: Final = 0.1
_CHUNK: Final = 1 << 16


def main(token: str, pipe: Connection) -> None:
    """Run what the runtime assigns until it closes the pipe."""
    # A group of its own: when this process is killed, the runtime ends what it had started.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bindings = SessionRuntimeBindings.from_token(token)
    for assignment in _assignments(pipe):
        _Command(bindings, pipe, assignment).run()
    bindings.close()


def _assignments(pipe: Connection) -> Iterator[Assignment]:
    # The runtime may close its end at any moment, also while this process is still starting.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(Idle())
            yield pipe.recv()


class _Command:
    """One command, from its registration to its end."""

    def __init__(
        self, bindings: SessionRuntimeBindings, pipe: Connection, assignment: Assignment
    ) -> None:
        self._registry = bindings.ops_lifecycle
        self._pipe = pipe
        self._id: OperationId = assignment.operation_id
        self._command = assignment.command
        self._spec = OperationSpec(
            id=self._id,
            kind=OperationKind.BACKGROUND_TOOL_OP,
            owner_session_id=bindings.session_id,
            display_name=clip(assignment.command.encode(), NAME_BYTES),
            source_label=f"line {assignment.line}",
        )
        self._tail = b""
        self._lines = 0
        self._reported_at = time.monotonic()

    def run(self) -> None:
        self._registry.register_operation(self._spec)
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self._command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            self._registry.provisioning_failed(self._id, f"could not be started: {error}")
            return
        try:
            self._registry.provisioning_succeeded(self._id)
            self._follow(process)
            self._end(process.wait(), round((time.monotonic() - started) * 1000))
        except InvalidTransition:
            process.wait()  # somebody else, such as a cancelling runtime, has ended it

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        """Read the output until the shell has ended; what it left in the background may go on."""
        assert process.stdout is not None
        exited = os.pidfd_open(process.pid)
        output = process.stdout.fileno()
        os.set_blocking(output, False)
        with selectors.DefaultSelector() as selector, process.stdout:
            for source in (output, exited, self._pipe):
                selector.register(source, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if output in ready and not self._read(output):
                    selector.unregister(output)
                if self._pipe.fileno() in ready:
                    os.killpg(0, signal.SIGKILL)  # the runtime is gone, and nobody will ask
                if exited in ready:
                    while self._read(output):
                        pass
                    break
        os.close(exited)

    def _read(self, output: int) -> bool:
        """Take what there is; whether there may be more."""
        try:
            chunk = os.read(output, _CHUNK)
        except BlockingIOError:
            return False
        self._tail = (self._tail + chunk)[-TAIL_BYTES:]
        self._lines += chunk.count(b"\n")
        now = time.monotonic()
        if chunk and now - self._reported_at >= _REPORT_EVERY_S:
            self._reported_at = now
            last = clip(self._tail.rstrip(b"\n").rpartition(b"\n")[2], NAME_BYTES)
            update = OperationProgressUpdate(f"{self._lines} lines, the last: {last}")
            self._registry.report_progress(self._id, update)
        return bool(chunk)

    def _end(self, status: int, duration_ms: int) -> None:
        output = clip(self._tail, TAIL_BYTES, keep_end=True)
        if status == 0:
            self._registry.complete_operation(
                self._id, OperationResult(id=self._id, content=output, duration_ms=duration_ms)
            )
            return
        how = f"exit status {status}" if status > 0 else f"killed by {_signal_name(-status)}"
        self._registry.fail_operation(self._id, f"{how} after {duration_ms} ms\n{output}")


def clip(data: bytes, limit: int, *, keep_end: bool = False) -> str:
    """At most `limit` bytes of `data` as text; what is not UTF-8 is replaced."""
    text = (data[-limit:] if keep_end else data[:limit]).decode(errors="replace")
    # A replacement character takes three bytes, so there may be more of them than before.
    while len(text.encode()) > limit:
        text = text[1:] if keep_end else text[:-1]
    return text


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
