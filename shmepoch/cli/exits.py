"""The exit statuses of the command, and the errors that lead to them."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Final, NoReturn

from shmepoch.cli import streams
from shmepoch.errors import (
    NamespaceInvalid,
    SessionNotFound,
    ShmepochError,
    StoreUnusable,
)
from shmepoch.monitoring.selection import EpochAmbiguous, EpochUnknown

DONE: Final = 0
NOT_WELL: Final = 1
REFUSED: Final = 2
NOT_CARRIED_OUT: Final = 3
#: The base of the status of a command that a signal ended; the signal's number is added.
SIGNALLED: Final = 128

#: The meaning of each status, the same for every command.
MEANINGS: Final = {
    DONE: "it was done, and all is well",
    NOT_WELL: "it was done, and not all is well",
    REFUSED: "nothing was done: an option, a file or a name is wrong",
    NOT_CARRIED_OUT: "it could not be carried out",
    SIGNALLED + signal.SIGHUP: "SIGHUP ended it",
    SIGNALLED + signal.SIGINT: "Ctrl-C ended it",
    SIGNALLED + signal.SIGPIPE: "the reader of its output has left",
    SIGNALLED + signal.SIGTERM: "SIGTERM ended it",
}

_REFUSALS: Final = (
    NamespaceInvalid,
    SessionNotFound,
    StoreUnusable,
    EpochAmbiguous,
    EpochUnknown,
)


@contextlib.contextmanager
def reporting(*refusals: type[Exception]) -> Iterator[None]:
    """Print an error of the block in one line, and exit with its status. `refusals` are added to
    those of every command. `main` handles an `OSError`."""
    refused: tuple[type[Exception], ...] = (*_REFUSALS, *refusals)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        streams.reader_left()
    except refused as error:
        fail(REFUSED, error)
    except ShmepochError as error:
        fail(NOT_CARRIED_OUT, error)


class ExtraMissing(ShmepochError):
    """A command needs packages that are not installed."""

    extra: str
    message = "this command needs the extra {extra!r}: pip install 'shmepoch[{extra}]'"


@contextlib.contextmanager
def needing_extra(extra: str, package: str) -> Iterator[None]:
    """Raise `ExtraMissing` if the block cannot import the package of an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ExtraMissing(extra) from None


def fail(status: int, error: Exception) -> NoReturn:
    """Print an error, and exit with this status."""
    streams.complain(error)
    streams.discard()  # otherwise the exit of the process fails again, with another status
    sys.exit(status)
