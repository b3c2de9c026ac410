"""The wall clock, within what memory and stores can hold."""

from __future__ import annotations

import time
from typing import Final

#: Stores keep signed integers of 64 bits.
_LAST_MS: Final = 2**63 - 1


def wall_ms() -> int:
    """Milliseconds since 1970; 0 if the clock is before that."""
    now = time.time_ns() // 1_000_000
    return now if 0 <= now <= _LAST_MS else min(max(0, now), _LAST_MS)
