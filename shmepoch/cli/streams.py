"""The standard streams of the command, and the one way in which text is shown to people."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
from typing import Final, NoReturn

#: What a terminal, or what lays text out, does not show but obeys: the control characters of C0 and
#: C1 but for the newline, DEL, the marks that change the direction of text, and the separators of
#: lines. Halves of surrogate pairs, which stand for bytes that are no text, cannot be encoded.
_CONTROL: Final = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def prepare() -> None:
    """Make the standard streams take any text, and open those that the command was started without.

    What is opened later would take the number of a closed one, and be written to as if it was it.
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
    """A text with what would control a terminal written out, as Python writes it: `\\x1b`."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(text))


def counted(number: int, noun: str) -> str:
    """So many of them, as people write it: `1 command`, `2 commands`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def complain(error: object) -> None:
    """Say on standard error what went wrong, if that is still read."""
    with contextlib.suppress(OSError):
        print(f"shmepoch: {visible(said(error))}", file=sys.stderr, flush=True)


def said(error: object) -> object:
    """What to say of an error; one of the system without its number, with which its text begins."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return error


def print_json(encoded: bytes) -> None:
    """Print JSON on one line, in ASCII: it is the same in every encoding, and controls nothing."""
    print(json.dumps(json.loads(encoded), separators=(",", ":")))


def discard() -> None:
    """Print nothing any more, so that what could not be written is not tried again at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def reader_left() -> NoReturn:
    """The reader of what this prints has left: end as a program without a handler would."""
    discard()
    sys.exit(128 + signal.SIGPIPE)
