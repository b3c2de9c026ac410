"""Filters and sort keys of epochs: the meaning of `--filter` and `--sort`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Final, NamedTuple, TypeAlias

from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import ShmepochError
from shmepoch.memory.participants import Role
from shmepoch.monitoring.epochs import EpochState, EpochSummary

#: A field's value in an epoch, at a time in milliseconds; None where it is not known.
Value: TypeAlias = Callable[[EpochSummary, int], str | int | None]
Condition: TypeAlias = Callable[[EpochSummary, int], bool]

#: The statuses of operations that have not ended.
UNFINISHED: Final = (
    OperationStatus.PROVISIONING,
    OperationStatus.RUNNING,
    OperationStatus.RETIRING,
)

_SECOND_MS: Final = 1000
_DURATIONS: Final = {
    "": _SECOND_MS,
    "s": _SECOND_MS,
    "m": 60 * _SECOND_MS,
    "h": 3600 * _SECOND_MS,
    "d": 86400 * _SECOND_MS,
}
_SIZES: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_COUNTS: Final = {"": 1}

_FILTER: Final = re.compile(r"(?P<field>\w+)(?P<operator>[=<>])(?P<value>.*)", re.DOTALL)
_NUMBER: Final = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[A-Za-z]?)")


class FilterInvalid(ShmepochError, ValueError):
    """A filter names an unknown field, or its value is not valid for the field."""

    text: str
    reason: str
    message = "the filter {text!r} {reason}; a filter is FIELD=VALUE, FIELD>N or FIELD<N"


class SortKeyInvalid(ShmepochError, ValueError):
    """A sort key is not a field of an epoch."""

    key: str
    keys: tuple[str, ...]

    def _text(self) -> str:
        return (
            f"epochs are not sorted by {self.key!r}; the keys are {', '.join(self.keys)}, and with "
            "a hyphen in front the largest comes first"
        )


class Field(NamedTuple):
    """A field by which epochs are filtered and sorted."""

    value: Value
    units: dict[str, int] | None = None
    """The units in which a number is written; None if the value is text."""
    prefix: bool = False
    """Whether a text matches all values that begin with it, with hyphens or without."""
    choices: tuple[str, ...] = ()
    """The possible texts, if they are few."""


def _of_role(role: Role) -> Field:
    return Field(lambda epoch, _: _known(epoch, epoch.participants.get(role, 0)), _COUNTS)


def _of_status(status: OperationStatus) -> Field:
    return Field(lambda epoch, _: _known(epoch, epoch.operations.get(status, 0)), _COUNTS)


def _of_lag(cursor: str) -> Field:
    return Field(lambda epoch, _: _known(epoch, epoch.lags[cursor]), _COUNTS)


def _known(epoch: EpochSummary, value: int) -> int | None:
    return None if epoch.state is EpochState.DAMAGED else value


def _idle(epoch: EpochSummary, now_ms: int) -> int:
    """The time since a process had it attached; 0 while one has."""
    return 0 if epoch.state is EpochState.OPEN else now_ms - epoch.alive_at_ms


#: Every field by its name.
FIELDS: Final = {
    "namespace": Field(lambda epoch, _: epoch.namespace),
    "session": Field(lambda epoch, _: epoch.session_id.bytes.hex(), prefix=True),
    "epoch": Field(
        lambda epoch, _: None if epoch.epoch_id is None else epoch.epoch_id.bytes.hex(),
        prefix=True,
    ),
    "state": Field(lambda epoch, _: epoch.state.value, choices=tuple(EpochState)),
    "age": Field(lambda epoch, now: _known(epoch, now - epoch.created_at_ms), _DURATIONS),
    "idle": Field(_idle, _DURATIONS),
    "bytes": Field(lambda epoch, _: epoch.bytes, _SIZES),
    **{role.value: _of_role(role) for role in Role},
    "dead": Field(lambda epoch, _: _known(epoch, epoch.dead), _COUNTS),
    **{status.value: _of_status(status) for status in UNFINISHED},
    "ended": Field(lambda epoch, _: _known(epoch, epoch.ended), _COUNTS),
    "watermark": Field(lambda epoch, _: _known(epoch, epoch.watermark), _COUNTS),
    "repairs": Field(lambda epoch, _: _known(epoch, epoch.repairs), _COUNTS),
    "lag": Field(lambda epoch, _: _known(epoch, max(epoch.lags.values())), _COUNTS),
    "applied_lag": _of_lag("agent_applied_cursor"),
    "observed_lag": _of_lag("runtime_observed_seq"),
    "injected_lag": _of_lag("runtime_last_injected_seq"),
}


def condition(text: str) -> Condition:
    """The condition that a filter means, at a time in milliseconds; `FilterInvalid`.

    An epoch whose field is not known does not pass.
    """
    found = _FILTER.fullmatch(text)
    if found is None:
        raise FilterInvalid(text, "is none")
    name, operator, value = found["field"], found["operator"], found["value"]
    field = FIELDS.get(name)
    if field is None:
        raise FilterInvalid(text, f"names no field; the fields are {', '.join(FIELDS)}")
    if field.units is not None:
        return _numeric(field.value, operator, _number(text, value, field.units))
    if operator != "=":
        raise FilterInvalid(text, f"compares text; write {name}=")
    if field.choices and value not in field.choices:
        raise FilterInvalid(text, f"has no value of {name}; these are {', '.join(field.choices)}")
    return _textual(field, value)


def _number(text: str, value: str, units: dict[str, int]) -> float:
    found = _NUMBER.fullmatch(value)
    if found is None or found["unit"] not in units:
        named = ", ".join(filter(None, units))
        with_unit = f", which may be followed by one of {named}" if named else ""
        raise FilterInvalid(text, f"has no number from 0 on as its value{with_unit}")
    return float(found["number"]) * units[found["unit"]]


def _numeric(value: Value, operator: str, wanted: float) -> Condition:
    def holds(epoch: EpochSummary, now_ms: int) -> bool:
        found = value(epoch, now_ms)
        if not isinstance(found, int):
            return False
        if operator == "=":
            return found == wanted
        return found > wanted if operator == ">" else found < wanted

    return holds


def _textual(field: Field, wanted: str) -> Condition:
    if not field.prefix:
        return lambda epoch, now_ms: field.value(epoch, now_ms) == wanted
    beginning = wanted.replace("-", "").lower()
    return lambda epoch, now_ms: str(field.value(epoch, now_ms) or "").startswith(beginning)


def order(text: str) -> Callable[[Iterable[EpochSummary], int], list[EpochSummary]]:
    """The order for a key, from the largest if a hyphen is in front; `SortKeyInvalid`.

    Epochs whose field is not known come last. Equal ones are in the order of their sessions.
    """
    field = FIELDS.get(text.removeprefix("-"))
    if field is None:
        raise SortKeyInvalid(text, tuple(FIELDS))
    value = field.value

    def ordered(epochs: Iterable[EpochSummary], now_ms: int) -> list[EpochSummary]:
        by_session = sorted(epochs, key=lambda epoch: (epoch.session_id, epoch.namespace))
        valued = [(value(epoch, now_ms), epoch) for epoch in by_session]
        known = [one for one in valued if one[0] is not None]
        known.sort(key=itemgetter(0), reverse=text.startswith("-"))
        unknown = [one for one in valued if one[0] is None]
        return [epoch for _, epoch in known + unknown]

    return ordered


def matching(
    epochs: Iterable[EpochSummary], conditions: Sequence[Condition], now_ms: int
) -> list[EpochSummary]:
    """The epochs that meet every condition."""
    return [epoch for epoch in epochs if all(holds(epoch, now_ms) for holds in conditions)]
