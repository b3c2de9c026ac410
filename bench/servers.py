"""The servers of contestants: on loopback, at a free port, stopped with the stack."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from time import monotonic, sleep

#: Debian's folders of servers; they are not on every user's PATH.
ELSEWHERE = "/usr/sbin:/usr/local/sbin"

_START_S = 20.0


class ServerMissing(Exception):
    """The server's program is not installed, or it did not start."""


def redis(stack: ExitStack) -> int:
    """The port of a new Redis, which keeps everything in memory only."""
    port = _free_port()
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    listening = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
    _start(stack, "redis-server", [*listening, "--save", "", "--appendonly", "no"], port)
    return port


def nats(stack: ExitStack) -> int:
    """The port of a new NATS with JetStream."""
    port = _free_port()
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    _start(stack, "nats-server", ["-a", "127.0.0.1", "-p", str(port), "-js", "-sd", folder], port)
    return port


def _start(stack: ExitStack, program: str, options: list[str], port: int) -> None:
    path = shutil.which(program) or shutil.which(program, path=ELSEWHERE)
    if path is None:
        raise ServerMissing(f"{program} is not installed")
    server = subprocess.Popen(
        [path, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    stack.callback(server.wait)
    stack.callback(server.kill)
    deadline = monotonic() + _START_S
    while monotonic() < deadline:
        if server.poll() is not None:
            raise ServerMissing(f"{program} ended with {server.returncode} as it started")
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        sleep(0.02)
    raise ServerMissing(f"{program} did not start within {_START_S:.0f} s")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
