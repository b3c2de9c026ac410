"""The wall clock, within what memory and stores can hold."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Final

#: Stores keep signed integers of 64 bits.
_LAST_MS: Final = 2**63 - 1
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def wall_ms() -> int:
    """Milliseconds since 1970; 0 if the clock is before that."""
    now = time.time_ns() // 1_000_000
    return now if 0 <= now <= _LAST_MS else min(max(0, now), _LAST_MS)


def moment(at_ms: int) -> datetime:
    """A time in milliseconds since 1970 as a `datetime` in UTC; `OverflowError` for no year of a
    calendar."""
    return _EPOCH + timedelta(milliseconds=at_ms)
