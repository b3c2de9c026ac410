"""What an operation's slot holds: its words, its spec and its detail, and their encoding."""

from __future__ import annotations

import re
import struct
from functools import reduce
from typing import Any, Final, Self, TypeVar

import msgspec
from msgspec.structs import fields, replace

from shmepoch.arguments import described, named
from shmepoch.epoch.codec import cut, to_wire, wire_decoder
from shmepoch.epoch.operations import (
    LAST_COUNT,
    Count,
    OperationLifecycleSnapshot,
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationSpec,
    OperationStatus,
)
from shmepoch.epoch.words import LAST_WATERMARK, Words
from shmepoch.errors import PayloadTooLarge, RecordInvalid
from shmepoch.ids import SessionId
from shmepoch.memory import layout as at
from shmepoch.memory.participants import slot_of

T = TypeVar("T")

#: The words at the beginning of a slot.
HEADER: Final = struct.Struct("=QQQ16sQQQQQQQ")
#: What a slot's word has the numbers of: the statuses of operations that have not ended.
STATUSES: Final = (
    OperationStatus.ABSENT,
    OperationStatus.PROVISIONING,
    OperationStatus.RUNNING,
    OperationStatus.RETIRING,
)
#: The version in a slot's word begins anew after this one.
LAST_VERSION: Final = 2**48 - 1
#: The bits of a slot's word that are always zero: neither version, nor buffer, nor status.
_SPARE_BITS: Final = 0xFEFC


class Detail(msgspec.Struct, frozen=True, array_like=True):
    """What changes of an operation while it lives, as its slot holds it."""

    started_at_ms: Count | None = None
    progress_count: Count = 0
    last_progress: OperationProgressUpdate | None = None
    peer_handle: OperationPeerHandle | None = None

    @classmethod
    def of(cls, operation: OperationLifecycleSnapshot) -> Self:
        """The detail of an operation that a store kept."""
        return cls(
            started_at_ms=operation.started_at_ms,
            progress_count=operation.progress_count,
            last_progress=operation.last_progress,
            peer_handle=operation.peer_handle,
        )


#: The detail of an operation that has just been registered.
FRESH: Final = Detail()
spec_decoder = wire_decoder(OperationSpec)
detail_decoder = wire_decoder(Detail)
_peer_decoder = wire_decoder(OperationPeerHandle)


class Slot(msgspec.Struct, frozen=True, gc=False):
    """The fixed part of one slot, as it was read."""

    number: int
    word: int
    birth: int
    terminal_seq: int
    id: bytes
    participant: int
    created_at_ms: int
    created_mono_ns: int
    elapsed_ms: int
    spec_length: int
    detail_length_0: int
    detail_length_1: int

    def as_of(self, words: Words) -> Slot:
        """The slot without a birth or an end that was not committed by then."""
        if self.birth > words.registrations:
            return replace(self, birth=0)
        if self.terminal_seq > words.watermark:
            return replace(self, terminal_seq=0)
        return self

    def out_of_bounds(self, max_participants: int) -> tuple[str, int, int] | None:
        """A word beyond its bound, if there is one: its name, the bound and the word."""
        participant = slot_of(self.participant)
        if not (
            self.word & _SPARE_BITS
            or self.terminal_seq > LAST_WATERMARK
            # All of its bits are set, so none is above it if their union is not.
            or self.birth | self.created_at_ms | self.created_mono_ns | self.elapsed_ms > LAST_COUNT
            or self.spec_length > at.SPEC_LIMIT
            or self.detail_length_0 > at.DETAIL_LIMIT
            or self.detail_length_1 > at.DETAIL_LIMIT
            or participant >= max_participants
        ):
            return None
        return next(
            (field, most, actual)
            for field, most, actual in (
                ("word's spare bits", 0, self.word & _SPARE_BITS),
                ("birth", LAST_COUNT, self.birth),
                ("terminal_seq", LAST_WATERMARK, self.terminal_seq),
                ("participant's slot", max_participants - 1, participant),
                ("created_at_ms", LAST_COUNT, self.created_at_ms),
                ("created_mono_ns", LAST_COUNT, self.created_mono_ns),
                ("elapsed_ms", LAST_COUNT, self.elapsed_ms),
                ("spec_length", at.SPEC_LIMIT, self.spec_length),
                ("detail_length[0]", at.DETAIL_LIMIT, self.detail_length_0),
                ("detail_length[1]", at.DETAIL_LIMIT, self.detail_length_1),
            )
            if actual > most
        )

    @property
    def is_emptied(self) -> bool:
        """Whether the spec and the detail are there no more."""
        return not self.word & 3

    @property
    def is_kept(self) -> bool:
        """Whether the slot holds the outcome of an operation that the feed has dropped."""
        return self.is_emptied and self.buffer == 1

    @property
    def is_passing(self) -> bool:
        """Whether the slot passes to something else; what is read of it is of no one moment."""
        return self.is_emptied and self.buffer == 0

    @property
    def status(self) -> OperationStatus:
        """The status while the operation has not ended."""
        return STATUSES[self.word & 3]

    @property
    def buffer(self) -> int:
        """Which of the two detail buffers is current."""
        return self.word >> 8 & 1

    @property
    def detail_length(self) -> int:
        """The length of the current detail; 0 stands for a fresh one."""
        return self.detail_length_1 if self.buffer else self.detail_length_0


class OperationView(msgspec.Struct, frozen=True):
    """One operation as a reader found it, whole."""

    slot: Slot
    spec: OperationSpec
    detail: Detail


class EncodedSpec(msgspec.Struct, frozen=True, gc=False):
    """A spec as its slot holds it, and as it will be read from there."""

    data: bytes
    spec: OperationSpec


def encode_spec(spec: OperationSpec, session_id: SessionId) -> EncodedSpec:
    """A spec for its slot, of an operation that is this session's unless it says otherwise.

    Raises `RecordInvalid` or `PayloadTooLarge` if it cannot be held.
    """
    if not isinstance(spec, OperationSpec):
        raise RecordInvalid("OperationSpec", f"it is {described(spec)}")
    if spec.owner_session_id is None:
        spec = replace(spec, owner_session_id=session_id)
    data, found = encode_checked(spec, spec_decoder)
    if len(data) > at.SPEC_LIMIT:
        raise PayloadTooLarge(
            len(data),
            at.SPEC_LIMIT,
            what=f"the spec of operation {spec.id} (display_name and source_label above all)",
        )
    return EncodedSpec(data, found)


def encode_peer_handle(handle: OperationPeerHandle) -> None:
    """Refuse a handle that cannot be held: `RecordInvalid`, `PayloadTooLarge`."""
    data, _ = encode_checked(handle, _peer_decoder)
    if len(data) > at.PEER_HANDLE_LIMIT:
        raise PayloadTooLarge(len(data), at.PEER_HANDLE_LIMIT, what="the peer handle")


def encode_detail(detail: Detail) -> bytes:
    """A detail for its slot. The last progress message is cut to the room that a peer handle
    leaves."""
    data = to_wire(detail)
    excess, progress = len(data) - at.DETAIL_LIMIT, detail.last_progress
    if excess > 0 and progress is not None:
        message = cut(progress.message, len(progress.message.encode()) - excess)
        data = to_wire(replace(detail, last_progress=replace(progress, message=message)))
    if len(data) > at.DETAIL_LIMIT:
        raise PayloadTooLarge(len(data), at.DETAIL_LIMIT, what="the peer handle")
    return data


def encode_checked(record: msgspec.Struct, decoder: msgspec.msgpack.Decoder[T]) -> tuple[bytes, T]:
    """A record for shared memory, refused unless a reader will find in it what went in; and what
    that reader will find."""
    try:
        data = to_wire(record)
        found = decoder.decode(data)
    except (msgspec.MsgspecError, NotImplementedError, OverflowError, ValueError) as error:
        raise _invalid(record, decoder.type, str(error)) from error
    if found != record:  # such as the text of an identifier in the place of one
        raise _invalid(record, decoder.type, f"{record!r} would be read as {found!r}")
    return data, found


def _invalid(record: msgspec.Struct, kind: Any, reason: str) -> RecordInvalid:
    """Why `record` cannot be held, in the terms of its caller and not of its encoding."""
    if not isinstance(record, kind):
        return RecordInvalid(named(kind), f"it is {described(record)}")
    found = _WRONG_TYPE.fullmatch(reason)
    if found is not None:
        *way, name = found["path"].split(".")
        holder = reduce(getattr, way, record)
        [wanted] = [field.type for field in fields(holder) if field.name == name]
        reason = f"{found['path']} is {described(getattr(holder, name))}, not {named(wanted)}"
    return RecordInvalid(type(record).__name__, reason)


#: What a decoder says of a field of another type than the record's.
_WRONG_TYPE: Final = re.compile(
    r"(?:Expected `[^`]*`, got `[^`]*`|\w+ takes bytes, not: .*) - at `\$\.(?P<path>[\w.]+)`",
    re.DOTALL,
)
