"""The worker process: runs commands as operations of its epoch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Final

from shmepoch.cli.run.descendants import adopt_orphans, kill_children, reap_children
from shmepoch.cli.run.messages import Assignment, Idle
from shmepoch.cli.run.outcomes import NAME_BYTES, TAIL_BYTES, failure, head, kept, named
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.operations import (
    OperationKind,
    OperationProgressUpdate,
    OperationResult,
    OperationSpec,
)
from shmepoch.errors import InvalidTransition
from shmepoch.ids import OperationId

#: A little more than is kept, so that half a character at the start is not kept.
_KEPT_BYTES: Final = TAIL_BYTES + 3
#: The time between two progress reports; a report has the number of lines.
_REPORT_EVERY_S: Final = 0.1
#: The time between SIGTERM and SIGKILL for a command that is no longer wanted.
_GRACE_S: Final = 2.0
_CHUNK: Final = 1 << 16


def main(pipe: Connection, token: str) -> None:
    """Run the assigned commands until the runtime closes the pipe."""
    adopt_orphans()
    bindings = SessionRuntimeBindings.from_token(token)
    try:
        for assignment in _assignments(pipe):
            _Command(bindings, pipe, assignment).run()
            reap_children()  # this process has adopted the background processes of commands
    finally:
        bindings.close()
        kill_children()


def _assignments(pipe: Connection) -> Iterator[Assignment]:
    # The runtime may close its end at any moment, also while this process is still starting.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(Idle())
            yield pipe.recv()


class _Unwanted(Exception):
    """The command is no longer wanted: the runtime is gone, or has ended the operation."""


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
            display_name=named(assignment.command),
            source_label=f"line {assignment.line}",
        )
        self._tail = b""
        self._size = 0
        self._lines = 0
        self._reported_at = time.monotonic()

    def run(self) -> None:
        self._registry.register_operation(self._spec)
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                [b"/bin/sh", b"-c", self._command.encode()],  # UTF-8 in every locale
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except OSError as error:
            self._registry.provisioning_failed(self._id, f"could not be started: {error}")
            return
        try:
            self._registry.provisioning_succeeded(self._id)
            self._follow(process)
            self._end(process.wait(), round((time.monotonic() - started) * 1000))
        except (_Unwanted, InvalidTransition):
            _stop(process)
            with contextlib.suppress(InvalidTransition):  # it has ended, and was reported
                self._registry.cancel_operation(self._id, "its worker was told to end")

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        """Read the output until the shell has ended; its background processes may go on."""
        assert process.stdout is not None
        output = process.stdout.fileno()
        os.set_blocking(output, False)
        with process.stdout, _exit_of(process) as exited, selectors.DefaultSelector() as selector:
            for source in (output, exited, self._pipe):
                selector.register(source, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if self._pipe.fileno() in ready:  # a busy worker gets no message except its end
                    raise _Unwanted
                if exited in ready:
                    self._read_rest(output)
                    return
                if output in ready and not self._read(output):
                    selector.unregister(output)

    def _read_rest(self, output: int) -> None:
        # No more than the pipe can hold: a background process may write for ever.
        left = fcntl.fcntl(output, fcntl.F_GETPIPE_SZ)
        while left > 0 and (size := self._read(output)):
            left -= size

    def _read(self, output: int) -> int:
        """Read the available output; returns its size."""
        try:
            chunk = os.read(output, _CHUNK)
        except BlockingIOError:
            return 0
        self._tail = (self._tail + chunk)[-_KEPT_BYTES:]
        self._size += len(chunk)
        self._lines += chunk.count(b"\n")
        now = time.monotonic()
        if chunk and now - self._reported_at >= _REPORT_EVERY_S:
            self._reported_at = now
            last = self._tail.rstrip(b"\n").rpartition(b"\n")[2].decode(errors="replace")
            update = OperationProgressUpdate(
                f"{self._lines} lines, the last: {head(last, NAME_BYTES)}"
            )
            self._registry.report_progress(self._id, update)
        return len(chunk)

    def _end(self, status: int, duration_ms: int) -> None:
        output = kept(self._tail.decode(errors="replace"), self._size)
        if status == 0:
            self._registry.complete_operation(
                self._id, OperationResult(id=self._id, content=output, duration_ms=duration_ms)
            )
        else:
            self._registry.fail_operation(self._id, failure(status, duration_ms, output))


@contextlib.contextmanager
def _exit_of(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """A descriptor that becomes readable when the process has ended."""
    descriptor = os.pidfd_open(process.pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a command to end; then kill it, if it still runs, and all its descendants."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    process.kill()
    process.wait()
    kill_children()
