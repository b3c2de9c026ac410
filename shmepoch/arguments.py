"""Checks of the arguments of public calls, with errors in the caller's terms."""

from __future__ import annotations

import contextlib
import operator
import uuid
from collections.abc import Callable, Iterable
from types import UnionType
from typing import (
    Annotated,
    Any,
    Final,
    SupportsIndex,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
)

from shmepoch.errors import ArgumentInvalid
from shmepoch.ids import SessionId

T = TypeVar("T")

#: How a session is named in a call: `uuid.UUID` and text are for programs that keep ids of theirs.
SessionIdLike: TypeAlias = SessionId | uuid.UUID | str

#: A longer value is not shown: it is not more useful, and a token is a secret.
_SHOWN: Final = 40
_POSITIONS: Final = range(2**64)


def require(
    kind: type[Any] | UnionType, value: object, call: str, argument: str, *, hint: str = ""
) -> None:
    """Raise `ArgumentInvalid` unless `value` is an instance of `kind`; `hint` says what to write.

    A class is refused: it has the methods of a protocol, but is not an instance of it.
    """
    if not isinstance(value, kind) or isinstance(value, type):
        raise ArgumentInvalid(call, argument, named(kind), described(value), hint)


def require_each(kind: type[T], values: Iterable[T], call: str, argument: str) -> list[T]:
    """The values of an iterable, or `ArgumentInvalid` unless each is an instance of `kind`."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ArgumentInvalid(call, argument, f"several {named(kind)}", described(values))
    listed = list(values)
    for value in listed:
        if not isinstance(value, kind):
            raise ArgumentInvalid(call, argument, f"several {named(kind)}", described(value))
    return listed


def session_id_of(value: object, call: str) -> SessionId:
    """The session that a call was given: a `SessionId`, or its `uuid.UUID` or text."""
    if isinstance(value, SessionId):
        return value
    if isinstance(value, uuid.UUID):
        return SessionId.from_uuid(value)
    with contextlib.suppress(ValueError):
        if isinstance(value, str):
            return SessionId.parse(value)
    expected = "a SessionId, or its uuid.UUID or text,"
    raise ArgumentInvalid(call, "session_id", expected, described(value))


def require_callable(value: Callable[..., object], call: str, argument: str) -> None:
    """Raise `ArgumentInvalid` unless `value` can be called."""
    if not callable(value):
        raise ArgumentInvalid(call, argument, "a function", described(value))


def require_position(value: SupportsIndex, call: str, argument: str) -> int:
    """A position of the feed as an int, from any type of integer.

    Raises `ArgumentInvalid` for a value that is not an integer, and `OverflowError` outside
    0..2**64-1.
    """
    try:
        position = operator.index(value)
    except TypeError:
        raise ArgumentInvalid(call, argument, "an integer", described(value)) from None
    if position not in _POSITIONS:
        raise OverflowError(f"a position is 0 to 2**64-1, not {position}")
    return position


def named(kind: object) -> str:
    """The name of a type in messages; for a union, the names of its members."""
    if get_origin(kind) is Annotated:
        return named(get_args(kind)[0])
    kinds = get_args(kind)
    if kinds:
        return " or ".join("None" if each is type(None) else named(each) for each in kinds)
    return getattr(kind, "__name__", str(kind))


def described(value: object) -> str:
    """The text for a value in messages."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    kind, text = type(value).__name__, repr(value)
    return f"the {kind} {text}" if len(text) <= _SHOWN else f"a value of type {kind}"
