"""Ctrl-C while the `shmepoch` command starts: it ends the process, for nothing has begun yet.

Most of the start is the import of this package, which therefore imports this module first. In every
other program that changes nothing.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from typing import Final

INTERRUPTED: Final = 128 + signal.SIGINT


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends this process at once and without a word, with status 130."""
    _handle(lambda *_: os._exit(INTERRUPTED))


def raise_on_interrupt() -> None:
    """From now on Ctrl-C raises `KeyboardInterrupt`, as in every Python program."""
    _handle(signal.default_int_handler)


def _handle(handler: signal._HANDLER) -> None:
    # A shell starts background jobs with it ignored.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def imported() -> None:
    """The package is imported: in what may be another program, Ctrl-C does what it did before."""
    if _name == _SCRIPT and _before is not None:
        importlib.import_module("shmepoch.cli")  # the script does that next, and is quiet by then
        signal.signal(signal.SIGINT, _before)


def _started_as() -> str:
    """The name of the script or, for `python -m`, of the module that this process runs."""
    name = next(iter(getattr(sys, "argv", ())), "")
    if name == "-m":  # while the package is imported; the module's name stands before the arguments
        return f"-m {sys.orig_argv[-len(sys.argv)]}"
    return os.path.basename(name)


_SCRIPT: Final = "shmepoch"
_MODULE: Final = "-m shmepoch"
_name: Final = _started_as()
_before: signal._HANDLER = None
if _name in (_SCRIPT, _MODULE) and threading.current_thread() is threading.main_thread():
    _before = signal.getsignal(signal.SIGINT)
    end_on_interrupt()
