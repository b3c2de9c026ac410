"""The standard streams of the command, and the one way to show text to people."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import sys
from typing import Final, NoReturn

from shmepoch.events import Event, about

_log = logging.getLogger(__name__)

#: Characters that control a terminal or a text layout: the control characters of C0 and C1 except
#: the newline, DEL, the marks that change the direction of text, and the separators of lines. Also
#: halves of surrogate pairs, which stand for bytes that are not text and cannot be encoded.
_CONTROL: Final = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def prepare() -> None:
    """Make the standard streams take any text, and open those that are closed.

    A file that is opened later would get the number of a closed stream, and would receive its
    output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(opened, True)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def visible(text: object) -> str:
    """A text in which control characters are written as in Python source: `\\x1b`."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(text))


def counted(number: int, noun: str) -> str:
    """A number and a noun, in the singular or plural: `1 command`, `2 commands`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def complain(error: object) -> None:
    """Log an error, on standard error if that is still open."""
    _log.error("%s", said(error), extra=about(Event.COMMAND_FAILED))


def said(error: object) -> object:
    """The text of an error; a system error without its number."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return error


def print_json(encoded: bytes) -> None:
    """Print JSON on one line, in ASCII: it is the same in every encoding, and has no control
    characters."""
    print(json.dumps(json.loads(encoded), separators=(",", ":")))


def discard() -> None:
    """Discard the output of streams that fail, so that their buffers are not written again at
    exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def reader_left() -> NoReturn:
    """End the process, because the reader of its output has left, like a program without a
    handler."""
    discard()
    sys.exit(128 + signal.SIGPIPE)
