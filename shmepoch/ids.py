"""Identifiers: typed, time-ordered names for sessions, epochs, operations, runs and waits.

An identifier keeps the sixteen bytes of its UUID, as in shared memory. The text and the `uuid.UUID`
are made on demand. In JSON it is plain text, alone or in a record of the user: written by
`msgspec.json.encode(value, enc_hook=enc_hook)` or `json.dumps(value, default=str)`, and read by
`msgspec.json.decode(data, type=..., dec_hook=dec_hook)` or `SessionId.parse(text)`.
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
    """The base class of all identifiers; never instantiated itself."""

    __slots__ = ()

    @classmethod
    def new(cls) -> Self:
        """A fresh identifier (UUID v7: later ones sort after earlier ones)."""
        return cls(uuid7().bytes)

    @classmethod
    def from_uuid(cls, value: uuid.UUID) -> Self:
        """The identifier with the UUID `value`; `TypeError` if it is not a `uuid.UUID`."""
        if not isinstance(value, uuid.UUID):
            raise TypeError(f"{cls.__name__}.from_uuid takes a uuid.UUID, not {value!r}")
        return cls(value.bytes)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the hyphenated UUID text; for any other text, `ValueError` that shows it.

        `uuid.UUID` alone would also accept braces, a URN or misplaced hyphens; then one identifier
        would have several texts.
        """
        if not isinstance(text, str) or not _TEXT.fullmatch(text):
            raise ValueError(
                f"not a {cls.__name__}: {text!r}; "
                "it is written as a hyphenated UUID, such as 0190b6c8-4f1e-7cc2-9d3a-1f2e3d4c5b6a"
            )
        return cls(bytes.fromhex(text.replace("-", "")))

    @property
    def uuid(self) -> uuid.UUID:
        """The identifier as a `uuid.UUID`."""
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

    It stays the same across rebuilds and recovery. A reset makes a new one, and so does a restart
    that could not recover.
    """

    __slots__ = ()


class OperationId(_Id):
    """Names one background operation."""

    __slots__ = ()


class RunId(_Id):
    """Names one run of an agent: the turn that waits at a barrier."""

    __slots__ = ()


class WaitRequestId(_Id):
    """Names one satisfied `wait_all`."""

    __slots__ = ()


def enc_hook(value: object) -> object:
    """For msgspec's JSON encoders: an identifier becomes its text, and other types of numbers plain
    ones.

    Raises `NotImplementedError` for anything else, as msgspec expects.
    """
    plain = encode(value)
    return str(value) if isinstance(value, Identifier) else plain


def dec_hook(kind: type, value: object) -> object:
    """For msgspec's JSON decoders: the identifier of this `kind` with this text.

    Raises `ValueError` if the text is not an identifier, and `NotImplementedError` if `kind` is not
    a kind of identifier.
    """
    if not issubclass(kind, _Id):
        raise NotImplementedError(f"{kind.__name__} is no kind of identifier")
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return kind.parse(value)
