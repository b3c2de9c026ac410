"""The size of an epoch."""

from __future__ import annotations

import operator
from typing import Final

import msgspec

from shmepoch._native import MAX_PARTICIPANTS, PAGE, SPEC_LIMIT, WORD
from shmepoch.errors import ConfigInvalid

#: The rest of a detail takes 50 bytes, and part of a message must always fit.
PEER_HANDLE_LIMIT: Final = 400
#: The most bytes that a record takes besides its operation's spec, detail and reason.
RECORD_ROOM: Final = 112
#: An hour: a writer that has waited longer for a store must get an error.
MAX_STORE_WAIT_MS: Final = 3_600_000


class OpsLifecycleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The size of an epoch; every size in its memory follows from these settings.

    Some sizes are fixed, each encoded: 512 bytes for an operation's spec, 400 for its peer handle,
    and 512 for the handle and the last progress together; its message is cut to fit.

    Raises `ConfigInvalid` for a value outside its range.
    """

    max_completed: int = 256
    """Terminal operations retained; the oldest is evicted first."""
    max_concurrent: int | None = None
    """The most operations that have not ended; None: only `max_operations` limits them."""
    max_operations: int = 128
    """Room in the table for operations that have not ended."""
    feed_bytes: int = 240 * 1024
    """Room for encoded completions; a larger completion is refused."""
    max_participants: int = 64
    """Processes attached at the same time."""
    store_wait_ms: int = 0
    """How long a call that ends operations waits for a store that is behind. A store is behind if
    it lacks completions that a full feed would have to drop, or more than 1,024 completions. After
    this time the call raises `StoreBehind`, and the operation is unchanged. 0: the call does not
    wait, and completions that are dropped before they were stored are a gap."""

    def __post_init__(self) -> None:
        self._settle("max_completed", 1, 2**20)
        self._settle("max_operations", 1, 2**20)
        self._settle("max_participants", 1, MAX_PARTICIPANTS)
        self._settle("store_wait_ms", 0, MAX_STORE_WAIT_MS)
        # Every operation of a full table must be able to end in one commit (FEED-3).
        self._settle("feed_bytes", least_feed_bytes(self.max_operations), 2**31)
        if self.feed_bytes % WORD:
            raise ConfigInvalid("feed_bytes", self.feed_bytes, f"a multiple of {WORD}")
        if self.max_concurrent is not None:
            most = self.max_operations
            allowed = f"None, or an integer from 1 to max_operations, which is {most}"
            self._settle("max_concurrent", 1, most, allowed)

    def _settle(self, setting: str, lowest: int, highest: int, allowed: str = "") -> None:
        """Check the range of a setting, and convert it from any type of integer to int."""
        value = getattr(self, setting)
        number = operator.index(value) if hasattr(value, "__index__") else lowest - 1
        if isinstance(value, bool) or not lowest <= number <= highest:
            allowed = allowed or f"an integer from {lowest} to {highest}"
            raise ConfigInvalid(setting, value, allowed)
        if number is not value:
            msgspec.structs.force_setattr(self, setting, number)

    def capacities(self) -> tuple[int, int, int, int, int, int]:
        """The settings in the form of a segment's header, each as one number."""
        return (
            self.max_completed,
            self.max_concurrent or 0,
            self.max_operations,
            self.feed_bytes,
            self.max_participants,
            self.store_wait_ms,
        )


def least_feed_bytes(max_operations: int) -> int:
    """The smallest feed of an epoch with room for so many operations."""
    return PAGE + max_operations * 2 * SPEC_LIMIT
