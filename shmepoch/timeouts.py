"""Timeouts in seconds, and the pauses between two polls."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Final, SupportsFloat, SupportsIndex, TypeAlias

from shmepoch.arguments import described
from shmepoch.errors import ArgumentInvalid, ConfigInvalid

#: About 32 years. A longer wait has no limit, so that no clock must hold its end.
_FOREVER_S: Final = 1e9

Seconds: TypeAlias = SupportsFloat | SupportsIndex
"""Any type of real number, numpy's too."""


def limit_s(timeout: Seconds | None, call: str) -> float | None:
    """The longest wait of `call` in seconds; None for no limit.

    Infinity, and a number that no clock can hold, mean no limit; a negative number is 0. Raises
    `ArgumentInvalid` for a value that is not a number and `ConfigInvalid` for NaN.
    """
    if timeout is None:
        return None
    try:
        return _limit_s(timeout, "timeout")
    except TypeError:
        expected = "a number of seconds or None"
        raise ArgumentInvalid(call, "timeout", expected, described(timeout)) from None


def setting_s(value: Seconds, setting: str) -> float | None:
    """A setting in seconds; None for no limit. `ConfigInvalid` if it is not a number."""
    try:
        return _limit_s(value, setting)
    except TypeError:
        raise ConfigInvalid(setting, value, "a number of seconds") from None


def deadline_after(timeout: Seconds | None, call: str) -> float | None:
    """The end, on the monotonic clock, of a timeout that begins now. Raises the errors of
    `limit_s`."""
    limit = limit_s(timeout, call)
    return None if limit is None else time.monotonic() + limit


def pauses(first_s: float, longest_s: float) -> Iterator[float]:
    """The pauses between two polls: twice as long each time, up to the longest."""
    pause_s = first_s
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, longest_s)


def _limit_s(value: Seconds, setting: str) -> float | None:
    try:
        if math.isnan(value):
            raise ConfigInvalid(setting, math.nan, "a number of seconds")
    except OverflowError:  # an integer that is too large for a float
        pass
    # Compared before the conversion, because of such integers.
    return float(max(0, value)) if value < _FOREVER_S else None  # type: ignore[operator, call-overload]
