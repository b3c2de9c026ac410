"""The native type under every identifier, at its edges."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import pytest

from shmepoch._native import Identifier, decode, encode
from shmepoch.ids import OperationId, SessionId

RAW = bytes(range(16))


class Kind(Identifier):
    pass


def test_it_is_its_bytes() -> None:
    assert Kind(RAW).bytes is RAW
    assert encode(Kind(RAW)) is RAW
    assert decode(Kind, RAW) == Kind(RAW)
    assert type(decode(OperationId, RAW)) is OperationId
    assert hash(Kind(RAW)) == hash(RAW)


def test_its_fingerprint_is_its_random_half() -> None:
    assert Kind(RAW).fingerprint == int.from_bytes(RAW[8:], sys.byteorder)
    assert Kind(RAW[:8] + b"\xff" * 8).fingerprint == 2**64 - 1
    assert Kind(RAW[:8] + bytes(8)).fingerprint == 1, "0 marks a free slot"


@pytest.mark.parametrize("raw", [None, 5, "0123456789abcdef", bytearray(RAW), [*RAW]], ids=repr)
def test_other_than_bytes_is_refused_and_shown(raw: Any) -> None:
    for make in (Kind, partial(decode, Kind)):
        with pytest.raises(TypeError, match="Kind takes bytes, not: ") as refused:
            make(raw)
        assert repr(raw) in str(refused.value)


@pytest.mark.parametrize("raw", [b"", RAW[1:], RAW + b"x"])
def test_another_length_is_refused_and_shown(raw: bytes) -> None:
    with pytest.raises(ValueError, match=f"Kind takes 16 bytes, not {len(raw)}: ") as refused:
        decode(Kind, raw)
    assert repr(raw) in str(refused.value)


@pytest.mark.parametrize("arguments", [(), (RAW, RAW)])
def test_it_takes_one_argument(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        Kind(*arguments)
    with pytest.raises(TypeError):
        decode(*arguments)
    with pytest.raises(TypeError):
        Kind(raw=RAW)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [RAW, "text", None, Identifier], ids=repr)
def test_what_is_no_identifier_is_not_encoded(value: object) -> None:
    with pytest.raises(NotImplementedError, match="is not part of a record: ") as refused:
        encode(value)
    assert repr(value) in str(refused.value)
    assert type(value).__name__ in str(refused.value)


@pytest.mark.parametrize("kind", [bytes, object, RAW, None], ids=repr)
def test_what_is_no_kind_is_not_decoded(kind: Any) -> None:
    with pytest.raises(TypeError, match="no kind of identifier"):
        decode(kind, RAW)


def test_bytes_that_compare_in_their_own_way_do_not_count() -> None:
    class Odd(bytes):
        def __eq__(self, other: object) -> bool:
            return False

        def __hash__(self) -> int:
            return 1

    assert type(Kind(Odd(RAW)).bytes) is bytes
    assert Kind(Odd(RAW)) == Kind(RAW)
    assert hash(Kind(Odd(RAW))) == hash(RAW)


def test_it_cannot_be_changed() -> None:
    id = OperationId(RAW)
    with pytest.raises(AttributeError):
        id.bytes = RAW  # type: ignore[misc]
    with pytest.raises(TypeError):
        Identifier.bytes = None  # type: ignore[method-assign,assignment]


def test_a_session_is_never_an_operation() -> None:
    one: object = SessionId(RAW)
    assert one != OperationId(RAW)
    assert one != Identifier(RAW)
    assert one == SessionId(RAW)


def test_nothing_is_leaked() -> None:
    refused: list[tuple[Any, ...]] = [(Kind, b"short"), (Kind, 5), (bytes, RAW), (Kind,)]

    def everything() -> None:
        id = decode(Kind, bytes(bytearray(RAW)))
        assert {id: 1}[Kind(encode(id))]
        assert id < Kind(b"\xff" * 16)
        assert id.fingerprint > 1
        for arguments in refused:
            with suppress(TypeError, ValueError):
                decode(*arguments)
        with suppress(NotImplementedError):
            encode(RAW)

    counted = (RAW, Kind, Identifier, *refused[0])
    for _ in range(100):
        everything()
    gc.collect()
    blocks, references = sys.getallocatedblocks(), [sys.getrefcount(one) for one in counted]
    for _ in range(1000):
        everything()
    gc.collect()
    # A leak in any one call would be a thousand.
    assert sys.getallocatedblocks() - blocks < 500
    for one, before in zip(counted, references, strict=True):
        assert sys.getrefcount(one) - before < 500


def test_a_decoder_names_the_field_of_one_that_is_wrong() -> None:
    class Named(msgspec.Struct):
        id: OperationId

    decoder = msgspec.msgpack.Decoder(Named, dec_hook=decode)
    for wrong in (b"short", 5, "text"):
        with pytest.raises(msgspec.ValidationError, match=r"\$\.id"):
            decoder.decode(msgspec.msgpack.encode({"id": wrong}))
