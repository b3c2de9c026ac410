"""Finds the epoch that people mean: by its id or its session's id, or the beginning of one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple, TypeVar

from shmepoch import _native as at
from shmepoch.errors import SegmentForeign, ShmepochError
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.files import open_owned
from shmepoch.memory.namespaces import list_segments, segment_path

T = TypeVar("T")

#: The hexadecimal digits of an identifier.
DIGITS: Final = 2 * at.ID_SIZE
#: The number of other ids that an error names.
_NAMED: Final = 10
_SUGGESTED: Final = 3
#: The least similarity of an identifier to the written text. Any two identifiers share a quarter
#: of their digits.
_LIKENESS: Final = 0.75


class Candidate(NamedTuple):
    """A session whose epoch may be meant; `epoch_id` is None if its segment has none to read."""

    namespace: str
    session_id: SessionId
    epoch_id: RuntimeEpochId | None

    def __str__(self) -> str:
        epoch = "" if self.epoch_id is None else f", epoch {self.epoch_id}"
        return f"session {self.session_id}{epoch} (namespace {self.namespace})"


class EpochUnknown(ShmepochError, LookupError):
    """No epoch in shared memory has an id that is, or begins with, the written text."""

    text: str
    namespace: str | None
    nearest: tuple[str, ...]

    def _text(self) -> str:
        every = self.namespace is None
        where = "any namespace" if every else f"namespace {self.namespace!r}"
        meant = f"; the nearest: {', '.join(self.nearest)}" if self.nearest else ""
        others = "" if every else ", and with --all-namespaces those of all namespaces"
        return (
            f"no session or epoch in {where} has an id that begins with {self.text!r}{meant}. "
            f"'shmepoch ls' lists them{others}"
        )


class EpochAmbiguous(ShmepochError, LookupError):
    """Several epochs have ids that begin with the written text."""

    text: str
    candidates: tuple[Candidate, ...]

    def _text(self) -> str:
        named = "".join(f"\n  {candidate}" for candidate in self.candidates[:_NAMED])
        rest = len(self.candidates) - _NAMED
        more = f"\n  and {rest} more" if rest > 0 else ""
        return (
            f"{self.text!r} may be any of {len(self.candidates)} epochs; write more of the id, or "
            f"name the namespace:{named}{more}"
        )


def digits_of(text: str) -> str:
    """The digits of an id, or of its beginning, in lower case and without hyphens."""
    return text.strip().replace("-", "").lower()


def nearest(digits: str, known: Mapping[str, T]) -> tuple[T, ...]:
    """The values with the most similar beginnings of their keys. Of several keys with one
    beginning, the last counts."""
    beginnings = {name[: len(digits)]: value for name, value in known.items()}
    near = difflib.get_close_matches(digits, beginnings, _SUGGESTED, _LIKENESS)
    return tuple(beginnings[beginning] for beginning in near)


def select(text: str, namespace: str | None) -> tuple[str, SessionId]:
    """The namespace and the session of the epoch that is meant. None searches every namespace.

    `text` is the id of a session or of an epoch, or its beginning. Hyphens and capitals do not
    matter. Raises `EpochUnknown` and `EpochAmbiguous`.
    """
    digits = digits_of(text)
    found = list(list_segments(namespace))
    named = [one for one in found if digits and _hex(one[1]).startswith(digits)]
    if len(named) == 1 and len(digits) == DIGITS:
        return named[0]
    candidates = list(_candidates(found))
    meant = [
        candidate
        for candidate in candidates
        if digits and any(id.startswith(digits) for id in _ids(candidate))
    ]
    if not meant:
        raise EpochUnknown(text, namespace, nearest(digits, _names(candidates)))
    if len(meant) > 1:
        raise EpochAmbiguous(text, tuple(sorted(meant, key=str)))
    return meant[0].namespace, meant[0].session_id


def _candidates(found: Iterable[tuple[str, SessionId]]) -> Iterator[Candidate]:
    for namespace, session_id in found:
        try:
            opened = open_owned(segment_path(namespace, session_id))
        except FileNotFoundError:
            continue  # removed since
        except SegmentForeign:
            yield Candidate(namespace, session_id, None)
            continue
        try:
            raw = os.pread(opened.fileno(), at.ID_SIZE, at.EPOCH_ID_AT)
        finally:
            opened.close()
        # The rest of the header is not checked: its reader reports what is wrong with it.
        epoch_id = RuntimeEpochId.from_bytes(raw) if len(raw) == at.ID_SIZE else None
        yield Candidate(namespace, session_id, epoch_id)


def _ids(candidate: Candidate) -> Iterator[str]:
    yield _hex(candidate.session_id)
    if candidate.epoch_id is not None:
        yield _hex(candidate.epoch_id)


def _hex(id: SessionId | RuntimeEpochId) -> str:
    return id.bytes.hex()


def _names(candidates: Iterable[Candidate]) -> dict[str, str]:
    """The sessions and epochs by their digits, the sessions last."""
    sessions, epochs = dict[str, str](), dict[str, str]()
    for candidate in candidates:
        sessions[_hex(candidate.session_id)] = f"session {candidate.session_id}"
        if candidate.epoch_id is not None:
            epochs[_hex(candidate.epoch_id)] = f"epoch {candidate.epoch_id}"
    return epochs | sessions
