"""Texts about a completion, besides its name: the time and the manner of the operation's end."""

from __future__ import annotations

from datetime import datetime

from shmepoch.epoch.operations import Completed, OperationTerminalOutcome


def how(outcome: OperationTerminalOutcome) -> str:
    """The duration if it completed; otherwise the first line of the reason."""
    if isinstance(outcome, Completed):
        return f"in {outcome.result.duration_ms} ms"
    return outcome.text.partition("\n")[0]


def local_time(at_ms: int) -> str:
    """A time of the wall clock, in milliseconds since the Unix epoch, to the second."""
    try:
        return datetime.fromtimestamp(at_ms / 1000).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):  # not a year of the calendar
        return f"{at_ms} ms"
