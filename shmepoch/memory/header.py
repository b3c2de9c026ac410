"""The header of a segment: written once, and checked before anything else of it is used."""

from __future__ import annotations

import secrets
import struct
import zlib
from functools import lru_cache
from typing import Final

import msgspec

from shmepoch import _native as at
from shmepoch._native import Memory
from shmepoch.errors import ConfigInvalid, LayoutUnsupported, SegmentCorrupted
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.layout import Layout

_CAPACITIES: Final = struct.Struct(f"={at.CAPACITIES}Q")
_HEADER: Final = struct.Struct(
    f"=4Q16s16s16s{_CAPACITIES.size}s{at.CHECKSUM_AT - at.CAPACITIES_AT - _CAPACITIES.size}xQ"
)
_STATES: Final = (at.OPEN, at.SEALED)
#: The bytes of a segment that `read_header` takes.
SIZE: Final = _HEADER.size


class Header(msgspec.Struct, frozen=True):
    """The facts in a segment's header, checked."""

    session_id: SessionId
    epoch_id: RuntimeEpochId
    witness: bytes
    sealed: bool
    layout: Layout


def read_header(data: bytes, name: str, size: int, session_id: SessionId) -> Header:
    """LAYOUT-1: a segment is used only after its header was found consistent.

    `data` is the segment's first bytes, which must agree with the other arguments. Raises
    `SegmentCorrupted`, which names the field, or `LayoutUnsupported`.
    """
    magic, version, stated, state, epoch, session, witness, capacities, checksum = _HEADER.unpack(
        data
    )
    if magic != at.MAGIC:
        raise SegmentCorrupted(name, "magic", at.MAGIC, magic)
    if version != at.VERSION:
        raise LayoutUnsupported(name, at.VERSION, version)
    if stated != size:
        raise SegmentCorrupted(name, "size", size, stated)
    if session != session_id.bytes:
        raise SegmentCorrupted(name, "session_id", session_id.bytes, session)
    try:
        layout, expected = _of_capacities(capacities)
    except ConfigInvalid as error:
        raise SegmentCorrupted(name, error.setting, error.allowed, error.value) from error
    if layout.size != size:
        raise SegmentCorrupted(name, "size of its capacities", size, layout.size)
    # Other capacities with the same number of pages would move all other parts unnoticed.
    if expected != checksum:
        raise SegmentCorrupted(name, "checksum of its capacities", expected, checksum)
    if state not in _STATES:
        raise SegmentCorrupted(name, "state", f"{at.OPEN} or {at.SEALED}", state)
    epoch_id = RuntimeEpochId.from_bytes(epoch)
    return Header(session_id, epoch_id, witness, state != at.OPEN, layout)


@lru_cache(maxsize=64)  # the epochs that a process attaches to are mostly of one size
def _of_capacities(capacities: bytes) -> tuple[Layout, int]:
    """The layout of these capacities, and their checksum; `ConfigInvalid` if no layout has them."""
    return Layout.from_capacities(_CAPACITIES.unpack(capacities)), zlib.crc32(capacities)


def write_header(
    memory: Memory, layout: Layout, session_id: SessionId, epoch_id: RuntimeEpochId
) -> Header:
    """Make fresh memory a segment of an open epoch, with a new witness."""
    capacities = _CAPACITIES.pack(*layout.capacities())
    witness = secrets.token_bytes(at.ID_SIZE)
    data = _HEADER.pack(
        at.MAGIC,
        at.VERSION,
        layout.size,
        at.OPEN,
        epoch_id.bytes,
        session_id.bytes,
        witness,
        capacities,
        zlib.crc32(capacities),
    )
    memory.write(0, data)
    memory.store(at.CREATED_AT, wall_ms())
    return Header(session_id, epoch_id, witness, False, layout)
