"""Seconds: how long a call waits at most, and how long between two polls."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Final, SupportsFloat, SupportsIndex, TypeAlias

from shmepoch.arguments import described
from shmepoch.errors import ArgumentInvalid, ConfigInvalid

#: About 32 years. A longer wait is one without a limit: no clock has to hold its end.
_FOREVER_S: Final = 1e9

Seconds: TypeAlias = SupportsFloat | SupportsIndex
"""Every kind of real number is one, numpy's too."""


def limit_s(timeout: Seconds | None, call: str) -> float | None:
    """How many seconds `call` waits at most; None for as long as it takes.

    Infinity, and more than a clock can hold, is no limit; a negative number is 0. Raises
    `ArgumentInvalid` for what is no number and `ConfigInvalid` for NaN.
    """
    if timeout is None:
        return None
    try:
        return _limit_s(timeout, "timeout")
    except TypeError:
        expected = "a number of seconds or None"
        raise ArgumentInvalid(call, "timeout", expected, described(timeout)) from None


def setting_s(value: Seconds, setting: str) -> float | None:
    """A setting in seconds; None for no limit. `ConfigInvalid` for what is no number."""
    try:
        return _limit_s(value, setting)
    except TypeError:
        raise ConfigInvalid(setting, value, "a number of seconds") from None


def deadline_after(timeout: Seconds | None, call: str) -> float | None:
    """When a timeout that begins now ends on the monotonic clock; raises what `limit_s` does."""
    limit = limit_s(timeout, call)
    return None if limit is None else time.monotonic() + limit


def pauses(first_s: float, longest_s: float) -> Iterator[float]:
    """How long to pause between two polls: twice as long each time, up to the longest."""
    pause_s = first_s
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, longest_s)


def _limit_s(value: Seconds, setting: str) -> float | None:
    try:
        if math.isnan(value):
            raise ConfigInvalid(setting, math.nan, "a number of seconds")
    except OverflowError:  # an integer that no float holds
        pass
    # Compared before it is converted, for such an integer.
    return float(max(0, value)) if value < _FOREVER_S else None  # type: ignore[operator, call-overload]
