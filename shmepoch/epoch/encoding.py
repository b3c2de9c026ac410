"""How an operation is encoded for shared memory: its spec, its detail and what ends it.

A slot holds what the operation's feed entry will have of its spec, the head, and the rest. The
native module puts an entry together of a template, the head and the outcome. So it reads no
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
#: What an entry has before its sequence, its id, its head, its outcome and its time.
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
    """What changes of an operation while it lives, as its slot holds it."""

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
    """What an entry has of its operation's spec, besides the id."""

    kind: OperationKind
    display_name: str


class _Rest(msgspec.Struct, array_like=True):
    """What it does not have; the owner is None where it is the epoch's session."""

    owner_session_id: SessionId | None
    source_label: str
    child_session_id: SessionId | None
    expect_peer_channel: bool


class EncodedSpec(msgspec.Struct, frozen=True, gc=False):
    """A spec as its slot holds it, and as it will be read from there."""

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
    """A spec for its slot, of an operation that is this session's unless it says otherwise.

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
    """What comes between the template's parts for the head and for the outcome."""
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
    """The spec that was encoded. Raises `msgspec.DecodeError` or `ValueError`."""
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
    """What ends an operation; `RecordInvalid`."""
    return encode_checked(outcome, _outcome_decoder)[0]


def decode_outcome(data: bytes) -> OperationTerminalOutcome:
    """An outcome that was encoded. Raises `msgspec.DecodeError` or `ValueError`."""
    return _outcome_decoder.decode(data)


def check_peer_handle(handle: OperationPeerHandle) -> None:
    """Refuse a handle that cannot be held: `RecordInvalid`, `PayloadTooLarge`."""
    data, _ = encode_checked(handle, _peer_decoder)
    if len(data) > PEER_HANDLE_LIMIT:
        raise PayloadTooLarge(len(data), PEER_HANDLE_LIMIT, what="the peer handle")


def check_progress(update: OperationProgressUpdate) -> None:
    """Refuse an update that is none: `RecordInvalid`."""
    encode_checked(update, _progress_decoder)


def encode_detail(detail: Detail) -> bytes:
    """A detail for its slot. The last progress message is cut to the room that a peer handle
    leaves."""
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
    """The detail of a slot. Raises `msgspec.DecodeError` or `ValueError`."""
    return _detail_decoder.decode(data) if data else FRESH


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
