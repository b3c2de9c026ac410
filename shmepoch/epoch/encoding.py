"""The encoding of an operation for shared memory: its spec, its detail and its outcome.

A slot holds the spec in two parts: the head, which the operation's feed entry will have too, and
the rest. The native module joins a template, the head and the outcome to an entry. So it reads no
MessagePack, and nothing is encoded while a lock is held.
"""

from __future__ import annotations

import re
from functools import reduce
from typing import Any, Final, Self, TypeVar

import msgspec
from msgspec.structs import fields, replace

from shmepoch._native import DETAIL_LIMIT, SPEC_LIMIT
from shmepoch.arguments import described, named
from shmepoch.config import PEER_HANDLE_LIMIT
from shmepoch.epoch.codec import cut, to_wire, wire_decoder
from shmepoch.epoch.operations import (
    Count,
    OperationKind,
    OperationLifecycleSnapshot,
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationSpec,
    OperationTerminalOutcome,
)
from shmepoch.errors import PayloadTooLarge, RecordInvalid
from shmepoch.ids import OperationId, SessionId

T = TypeVar("T")

_U64: Final = b"\xcf"  # MessagePack's uint64, of eight bytes, big-endian
_ID: Final = b"\xc4\x10"  # and its binary data, of sixteen
#: The bytes of an entry before its sequence, its id, its head, its outcome and its time.
ENTRY_TEMPLATE: Final = (
    b"\x86" + to_wire("seq") + _U64,
    to_wire("operation_id") + _ID,
    to_wire("kind"),
    to_wire("terminal_outcome"),
    to_wire("completed_at_ms") + _U64,
)
_DISPLAY_NAME: Final = to_wire("display_name")
_HEAD_MAP: Final = b"\x82" + to_wire("kind")


class Detail(msgspec.Struct, frozen=True, array_like=True):
    """The part of an operation that changes while it lives, as its slot holds it."""

    progress_count: Count = 0
    last_progress: OperationProgressUpdate | None = None
    peer_handle: OperationPeerHandle | None = None

    @classmethod
    def of(cls, operation: OperationLifecycleSnapshot) -> Self:
        """The detail of an operation that a store kept."""
        return cls(
            progress_count=operation.progress_count,
            last_progress=operation.last_progress,
            peer_handle=operation.peer_handle,
        )


#: The detail of an operation that has just been registered.
FRESH: Final = Detail()


class _Head(msgspec.Struct):
    """The part of the spec that is in the feed entry, besides the id."""

    kind: OperationKind
    display_name: str


class _Rest(msgspec.Struct, array_like=True):
    """The part that is not in the entry; the owner is None if it is the epoch's session."""

    owner_session_id: SessionId | None
    source_label: str
    child_session_id: SessionId | None
    expect_peer_channel: bool


class EncodedSpec(msgspec.Struct, frozen=True, gc=False):
    """A spec, encoded for its slot, and as a reader will decode it."""

    head: bytes
    rest: bytes
    spec: OperationSpec


_spec_decoder: Final = wire_decoder(OperationSpec)
_head_decoder: Final = wire_decoder(_Head)
_rest_decoder: Final = wire_decoder(_Rest)
_detail_decoder: Final = wire_decoder(Detail)
_peer_decoder: Final = wire_decoder(OperationPeerHandle)
_progress_decoder: Final = wire_decoder(OperationProgressUpdate)
_outcome_decoder: Final[msgspec.msgpack.Decoder[OperationTerminalOutcome]] = wire_decoder(
    OperationTerminalOutcome  # type: ignore[arg-type] # a union is no class
)


def encode_spec(spec: OperationSpec, session_id: SessionId) -> EncodedSpec:
    """Encode a spec for its slot. If the spec names no owner, this session owns the operation.

    Raises `RecordInvalid` or `PayloadTooLarge` if it cannot be held.
    """
    if not isinstance(spec, OperationSpec):
        raise RecordInvalid("OperationSpec", f"it is {described(spec)}")
    if spec.owner_session_id is None:
        spec = replace(spec, owner_session_id=session_id)
    data, found = encode_checked(spec, _spec_decoder)
    if len(data) > SPEC_LIMIT:
        raise PayloadTooLarge(
            len(data),
            SPEC_LIMIT,
            what=f"the spec of operation {spec.id} (display_name and source_label above all)",
        )
    head = encode_head(found.kind, found.display_name)
    return EncodedSpec(head, _encode_rest(found, session_id), found)


def encode_head(kind: OperationKind, display_name: str) -> bytes:
    """The head: the bytes between the template's parts before the head and before the outcome."""
    return to_wire(kind) + _DISPLAY_NAME + to_wire(display_name)


def _encode_rest(spec: OperationSpec, session_id: SessionId) -> bytes:
    owner = spec.owner_session_id
    return to_wire(
        _Rest(
            None if owner == session_id else owner,
            spec.source_label,
            spec.child_session_id,
            spec.expect_peer_channel,
        )
    )


def decode_spec(id: bytes, head: bytes, rest: bytes, session_id: SessionId) -> OperationSpec:
    """Decode a spec. Raises `msgspec.DecodeError` or `ValueError`."""
    first = _head_decoder.decode(_HEAD_MAP + head)
    second = _rest_decoder.decode(rest)
    return OperationSpec(
        id=OperationId(id),
        kind=first.kind,
        owner_session_id=second.owner_session_id or session_id,
        display_name=first.display_name,
        source_label=second.source_label,
        child_session_id=second.child_session_id,
        expect_peer_channel=second.expect_peer_channel,
    )


def encode_outcome(outcome: OperationTerminalOutcome) -> bytes:
    """Encode an outcome. Raises `RecordInvalid`."""
    return encode_checked(outcome, _outcome_decoder)[0]


def decode_outcome(data: bytes) -> OperationTerminalOutcome:
    """Decode an outcome. Raises `msgspec.DecodeError` or `ValueError`."""
    return _outcome_decoder.decode(data)


def check_peer_handle(handle: OperationPeerHandle) -> None:
    """Raise `RecordInvalid` or `PayloadTooLarge` if a slot cannot hold the handle."""
    data, _ = encode_checked(handle, _peer_decoder)
    if len(data) > PEER_HANDLE_LIMIT:
        raise PayloadTooLarge(len(data), PEER_HANDLE_LIMIT, what="the peer handle")


def check_progress(update: OperationProgressUpdate) -> None:
    """Raise `RecordInvalid` if this is not a valid update."""
    encode_checked(update, _progress_decoder)


def encode_detail(detail: Detail) -> bytes:
    """Encode a detail for its slot. The last progress message is cut to the room beside the peer
    handle."""
    if detail == FRESH:
        return b""
    data = to_wire(detail)
    excess, progress = len(data) - DETAIL_LIMIT, detail.last_progress
    if excess > 0 and progress is not None:
        message = cut(progress.message, len(progress.message.encode()) - excess)
        data = to_wire(replace(detail, last_progress=replace(progress, message=message)))
    if len(data) > DETAIL_LIMIT:
        raise PayloadTooLarge(len(data), DETAIL_LIMIT, what="the peer handle")
    return data


def decode_detail(data: bytes) -> Detail:
    """Decode a detail. Raises `msgspec.DecodeError` or `ValueError`."""
    return _detail_decoder.decode(data) if data else FRESH


def encode_checked(record: msgspec.Struct, decoder: msgspec.msgpack.Decoder[T]) -> tuple[bytes, T]:
    """Encode a record for shared memory; also returns the record as a reader will decode it.
    Refused if the two differ."""
    try:
        data = to_wire(record)
        found = decoder.decode(data)
    except (msgspec.MsgspecError, NotImplementedError, OverflowError, ValueError) as error:
        raise _invalid(record, decoder.type, str(error)) from error
    if found != record:  # such as a string in the place of an identifier
        raise _invalid(record, decoder.type, f"{record!r} would be read as {found!r}")
    return data, found


def _invalid(record: msgspec.Struct, kind: Any, reason: str) -> RecordInvalid:
    """Why `record` is refused, in the terms of the caller and not of the encoding."""
    if not isinstance(record, kind):
        return RecordInvalid(named(kind), f"it is {described(record)}")
    found = _WRONG_TYPE.fullmatch(reason)
    if found is not None:
        *way, name = found["path"].split(".")
        holder = reduce(getattr, way, record)
        [wanted] = [field.type for field in fields(holder) if field.name == name]
        reason = f"{found['path']} is {described(getattr(holder, name))}, not {named(wanted)}"
    return RecordInvalid(type(record).__name__, reason)


#: The message of a decoder about a field of the wrong type.
_WRONG_TYPE: Final = re.compile(
    r"(?:Expected `[^`]*`, got `[^`]*`|\w+ takes bytes, not: .*) - at `\$\.(?P<path>[\w.]+)`",
    re.DOTALL,
)
