"""A terminal that goes away: the run stops writing to it, and ends by SIGHUP or goes on."""

from __future__ import annotations

import errno
import os
import sys
import termios
from typing import Any, Final, TextIO

_STANDARD_STREAMS: Final = range(3)


def leave_if_gone() -> bool:
    """Replace standard streams whose terminal is gone by /dev/null; whether there were any."""
    gone = [fd for fd in _STANDARD_STREAMS if _is_gone(fd)]
    if gone:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in gone:
            os.dup2(null, fd)
        os.close(null)
    return bool(gone)


def _is_gone(fd: int) -> bool:
    try:
        termios.tcgetattr(fd)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)  # a file that is not a terminal gives another error
    return False


class LastingStream:
    """A stream that accepts writes even after its terminal is gone.

    Its `OSError`s have the name of the stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._name = "standard error" if stream is sys.stderr else "standard output"

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            if not leave_if_gone():
                error.filename = self._name
                raise
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            if not leave_if_gone():
                error.filename = self._name
                raise
            self._stream.flush()  # its buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
