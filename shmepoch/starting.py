"""Ctrl-C while the `shmepoch` command starts: it ends the process, since no work has begun.

Most of the start is the import of this package, so the package imports this module first. Other
programs are not affected.
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
    """Make Ctrl-C end this process at once and silently, with status 130."""
    _handle(lambda *_: os._exit(INTERRUPTED))


def raise_on_interrupt() -> None:
    """Make Ctrl-C raise `KeyboardInterrupt`, as in every Python program."""
    _handle(signal.default_int_handler)


def _handle(handler: signal._HANDLER) -> None:
    # Shells start background jobs with SIGINT ignored.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def imported() -> None:
    """Called after the import: in a script of this name, which may be another program, Ctrl-C works
    as before."""
    if _name == _SCRIPT and _before is not None:
        importlib.import_module("shmepoch.cli")  # the script's next import; Ctrl-C is silent there
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
