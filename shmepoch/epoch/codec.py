"""The encoding of records: JSON for people and stores, MessagePack for shared memory.

The two differ only in identifiers: text in JSON, sixteen bytes in MessagePack.
"""

from __future__ import annotations

from typing import Final, Self, TypeVar

import msgspec

from shmepoch._native import decode, encode
from shmepoch.errors import RecordInvalid
from shmepoch.ids import dec_hook, enc_hook

T = TypeVar("T")

_CUT: Final = "\N{HORIZONTAL ELLIPSIS}"

_json_encoder = msgspec.json.Encoder(enc_hook=enc_hook)
_wire_encoder = msgspec.msgpack.Encoder(enc_hook=encode)

#: Encodes a record for shared memory.
to_wire = _wire_encoder.encode


def wire_decoder(kind: type[T]) -> msgspec.msgpack.Decoder[T]:
    """A decoder for records of a `kind` that `to_wire` encoded."""
    return msgspec.msgpack.Decoder(kind, dec_hook=decode)


class Record(msgspec.Struct, frozen=True):
    """An immutable value with fields, equal by value, written as JSON."""

    def to_json(self) -> bytes:
        """The record as one JSON object; identifiers are their text."""
        return _json_encoder.encode(self)

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """Read a record that `to_json` wrote; `RecordInvalid` names the field that is wrong."""
        return decode_json(cls, data)


def decode_json(kind: type[T], data: bytes | str, named: type | None = None) -> T:
    """Read one JSON value of type `kind`; `RecordInvalid` names the wrong field, and the record by
    the name of `named` if given."""
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=dec_hook)
    except (msgspec.DecodeError, ValueError) as error:
        name = getattr(named or kind, "__name__", str(kind))
        raise RecordInvalid(name, str(error)) from error


def cut(text: str, size: int) -> str:
    """`text` if its UTF-8 takes at most `size` bytes, else its beginning and an ellipsis."""
    data = text.encode()
    if len(data) <= size:
        return text
    return data[: max(0, size - len(_CUT.encode()))].decode(errors="ignore") + _CUT
