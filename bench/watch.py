"""What `shmepoch watch` takes of a processor, with many epochs of which a few do something.

    .venv/bin/python -m bench.watch [--epochs 100] [--live 5] [--seconds 30] [--page]

It runs in a pseudo-terminal of 160 columns and 50 lines. Its start is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import secrets
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Final

import psutil

from bench.work import operate
from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings

#: A live epoch ends so many operations a second, in so many steps.
RATE: Final = 100
STEPS: Final = 10
#: How long the command takes to start, at most, and to fill its sparklines a little.
SETTLE_S: Final = 8.0
_ENTER: Final = b"\r"


@contextlib.contextmanager
def watching(namespace: str, interval: float) -> Iterator[tuple[psutil.Process, int]]:
    """The command in a pseudo-terminal that is read; and its other end."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "shmepoch", "watch", "--interval", str(interval)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "SHMEPOCH_NAMESPACE": namespace},
    )
    os.close(theirs)
    reader = threading.Thread(target=_read, args=(ours,))
    reader.start()
    try:
        yield psutil.Process(process.pid), ours
    finally:
        process.terminate()
        process.wait()
        reader.join()
        os.close(ours)


def _read(terminal: int) -> None:
    with contextlib.suppress(OSError):  # EIO once the other end is closed
        while os.read(terminal, 65536):
            pass


def work(live: Sequence[SessionRuntimeBindings], seconds: float) -> None:
    """End operations in each of these epochs, evenly, for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for bindings in live:
            for _ in range(RATE // STEPS):
                operate(bindings, "done")
        time.sleep(1 / STEPS)


def share(process: psutil.Process, live: Sequence[SessionRuntimeBindings], seconds: float) -> float:
    """Per cent of one processor that it takes while these work."""
    began, used = time.monotonic(), sum(process.cpu_times()[:2])
    work(live, seconds)
    return 100 * (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--live", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--interval", type=float, default=1.0)
    parser.add_argument("--page", action="store_true", help="Open one epoch's page as well.")
    options = parser.parse_args()
    namespace = f"bench-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        adapter = stack.enter_context(RuntimeSessionAdapter.ephemeral(namespace=namespace))
        epochs = [adapter.prepare_bindings(SessionId.new()) for _ in range(options.epochs)]
        for bindings in epochs:
            stack.callback(adapter.unregister_session, bindings.session_id)
        live = epochs[: options.live]
        process, terminal = stack.enter_context(watching(namespace, options.interval))
        work(live, SETTLE_S)
        figure = share(process, live, options.seconds)
        print(f"{options.epochs} epochs, {options.live} live: {figure:.1f} % of a processor")
        if options.page:
            os.write(terminal, _ENTER)
            work(live, 1)
            figure = share(process, live, options.seconds)
            print(f"one epoch's page above them: {figure:.1f} % of a processor")


if __name__ == "__main__":
    main()
