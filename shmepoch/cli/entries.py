"""Texts about a completion, besides its name: the time and the manner of the operation's end."""

from __future__ import annotations

from datetime import datetime

from shmepoch.epoch.operations import (
    Aborted,
    Cancelled,
    Completed,
    Failed,
    OperationTerminalOutcome,
    Terminated,
)


def how(outcome: OperationTerminalOutcome) -> str:
    """The duration if it completed; otherwise the first line of the reason."""
    match outcome:
        case Completed(result):
            return f"in {result.duration_ms} ms"
        case Failed(text) | Terminated(text):
            return text.partition("\n")[0]
        case Aborted(reason) | Cancelled(reason):
            return (reason or "").partition("\n")[0]
        case _:
            return ""


def local_time(at_ms: int) -> str:
    """A time of the wall clock, in milliseconds since the Unix epoch, to the second."""
    try:
        return datetime.fromtimestamp(at_ms / 1000).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):  # not a year of the calendar
        return f"{at_ms} ms"
