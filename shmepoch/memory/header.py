"""The header of a segment: written once, and checked before anything else of it is used."""

from __future__ import annotations

import secrets
import struct
import time
import zlib
from functools import lru_cache
from typing import Final, NamedTuple

from shmepoch.errors import ConfigInvalid, LayoutUnsupported, SegmentCorrupted
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory import layout as at
from shmepoch.memory._native import Memory
from shmepoch.memory.layout import Layout

_CAPACITIES: Final = struct.Struct(f"={at.CAPACITIES}Q")
_HEADER: Final = struct.Struct(
    f"=4Q16s16s16s{_CAPACITIES.size}s{at.CHECKSUM_AT - at.CAPACITIES_AT - _CAPACITIES.size}xQ"
)
#: How much of a segment `Header.unpack` takes.
SIZE: Final = _HEADER.size


class Header(NamedTuple):
    """What a segment says of itself, unchecked."""

    magic: int
    version: int
    size: int
    state: int
    epoch_id: bytes
    session_id: bytes
    witness: bytes
    capacities: bytes
    checksum: int

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """The header in a segment's first bytes."""
        return cls._make(_HEADER.unpack(data))

    def check(self, name: str, size: int, session_id: SessionId) -> Layout:
        """LAYOUT-1: nothing of a segment is used before its header was found consistent."""

        if self.magic != at.MAGIC:
            raise SegmentCorrupted(name, "magic", at.MAGIC, self.magic)
        if self.version != at.VERSION:
            raise LayoutUnsupported(name, at.VERSION, self.version)
        if self.size != size:
            raise SegmentCorrupted(name, "size", size, self.size)
        if self.session_id != session_id.bytes:
            raise SegmentCorrupted(name, "session_id", session_id.bytes, self.session_id)
        try:
            layout, checksum = _of_capacities(self.capacities)
        except ConfigInvalid as error:
            raise SegmentCorrupted(name, error.setting, error.allowed, error.value) from error
        if layout.size != size:
            raise SegmentCorrupted(name, "size of its capacities", size, layout.size)
        # Other capacities that fill as many pages would shift everything else unnoticed.
        if checksum != self.checksum:
            raise SegmentCorrupted(name, "checksum of its capacities", checksum, self.checksum)
        if self.state not in (at.OPEN, at.SEALED):
            raise SegmentCorrupted(name, "state", f"{at.OPEN} or {at.SEALED}", self.state)
        return layout


@lru_cache(maxsize=64)  # the epochs that a process attaches to are mostly of one size
def _of_capacities(capacities: bytes) -> tuple[Layout, int]:
    """The layout that they make and their checksum; `ConfigInvalid` if no layout has them."""
    return Layout.from_capacities(_CAPACITIES.unpack(capacities)), zlib.crc32(capacities)


def write_header(
    memory: Memory, layout: Layout, session_id: SessionId, epoch_id: RuntimeEpochId
) -> Header:
    """Make fresh memory a segment of an open epoch, with a witness of its own."""
    capacities = _CAPACITIES.pack(*layout.capacities())
    header = Header(
        magic=at.MAGIC,
        version=at.VERSION,
        size=layout.size,
        state=at.OPEN,
        epoch_id=epoch_id.bytes,
        session_id=session_id.bytes,
        witness=secrets.token_bytes(at.ID_SIZE),
        capacities=capacities,
        checksum=zlib.crc32(capacities),
    )
    memory.write(0, _HEADER.pack(*header))
    memory.store(at.CREATED_AT, time.time_ns() // 1_000_000)
    return header
