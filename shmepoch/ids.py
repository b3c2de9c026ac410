"""Identifiers: typed, time-ordered names for sessions, epochs, operations, runs and waits.

An identifier keeps the sixteen bytes of its UUID: that is what shared memory holds. The text and
the `uuid.UUID` are made on request. In JSON it is the plain text, written by
`msgspec.json.encode(value, enc_hook=enc_hook)` or `json.dumps(value, default=str)`, and read by
`msgspec.json.decode(data, type=..., dec_hook=dec_hook)` or `SessionId.parse(text)`; alone or as
part of a record of the user's own.
"""

from __future__ import annotations

import re
import uuid
from typing import Final, Self

from uuid_utils import uuid7

from shmepoch._native import Identifier, encode

__all__ = [
    "OperationId",
    "RunId",
    "RuntimeEpochId",
    "SessionId",
    "WaitRequestId",
    "dec_hook",
    "enc_hook",
]

_TEXT: Final = re.compile(r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}")


class _Id(Identifier):
    """What every identifier has in common; never instantiated itself."""

    __slots__ = ()

    @classmethod
    def new(cls) -> Self:
        """A fresh identifier (UUID v7: later ones sort after earlier ones)."""
        return cls(uuid7().bytes)

    @classmethod
    def from_uuid(cls, value: uuid.UUID) -> Self:
        """The identifier that names the same thing as `value`; `TypeError` for anything else."""
        if not isinstance(value, uuid.UUID):
            raise TypeError(f"{cls.__name__}.from_uuid takes a uuid.UUID, not {value!r}")
        return cls(value.bytes)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the hyphenated UUID text; `ValueError` that shows the text for anything else.

        `uuid.UUID` alone would also take braces, a URN or misplaced hyphens, and then one
        identifier would have many texts.
        """
        if not isinstance(text, str) or not _TEXT.fullmatch(text):
            raise ValueError(
                f"not a {cls.__name__}: {text!r}; "
                "it is written as a hyphenated UUID, such as 0190b6c8-4f1e-7cc2-9d3a-1f2e3d4c5b6a"
            )
        return cls(bytes.fromhex(text.replace("-", "")))

    @property
    def uuid(self) -> uuid.UUID:
        """The same name as a `uuid.UUID`."""
        return uuid.UUID(bytes=self.bytes)

    def __str__(self) -> str:
        digits = self.bytes.hex()
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self}')"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.bytes,)


class SessionId(_Id):
    """Names one conversation or job of an agent."""

    __slots__ = ()


class RuntimeEpochId(_Id):
    """Names one continuous async-ordering domain of a session.

    Stable across rebuilds and recovery; rotated on reset, and on a restart that could not
    recover.
    """

    __slots__ = ()


class OperationId(_Id):
    """Names one background operation."""

    __slots__ = ()


class RunId(_Id):
    """Names one run of an agent: the turn on whose behalf a barrier is waited for."""

    __slots__ = ()


class WaitRequestId(_Id):
    """Names one satisfied `wait_all`."""

    __slots__ = ()


def enc_hook(value: object) -> object:
    """For msgspec's JSON encoders: the text of an identifier, and other numbers as plain ones.

    Raises `NotImplementedError` for anything else, which msgspec says of it then.
    """
    plain = encode(value)
    return str(value) if isinstance(value, Identifier) else plain


def dec_hook(kind: type, value: object) -> object:
    """For msgspec's JSON decoders: the identifier of a `kind` that has this text.

    Raises `ValueError` for what is no such text, and `NotImplementedError` for what is no kind of
    identifier.
    """
    if not issubclass(kind, _Id):
        raise NotImplementedError(f"{kind.__name__} is no kind of identifier")
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return kind.parse(value)
