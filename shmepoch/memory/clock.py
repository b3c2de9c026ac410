"""The wall clock, as far as memory and stores hold what it shows."""

from __future__ import annotations

import time
from typing import Final

#: What a word's time may be at most: stores have a sign.
LAST_MS: Final = 2**63 - 1


def wall_ms() -> int:
    """Milliseconds since 1970; 0 where the clock stands before that."""
    now = time.time_ns() // 1_000_000
    return now if 0 <= now <= LAST_MS else min(max(0, now), LAST_MS)
