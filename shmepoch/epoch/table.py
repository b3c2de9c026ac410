"""The operations of an epoch, read from its memory without a lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeVar

import msgspec

from shmepoch import _native as at
from shmepoch._native import Refused
from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.encoding import (
    Detail,
    decode_detail,
    decode_outcome,
    decode_spec,
)
from shmepoch.epoch.operations import OperationSpec, OperationStatus, status_of
from shmepoch.ids import OperationId
from shmepoch.memory.segment import Segment

T = TypeVar("T")

#: The statuses, by the number in the status bits of a slot's word.
STATUSES: Final = (
    OperationStatus.ABSENT,
    OperationStatus.PROVISIONING,
    OperationStatus.RUNNING,
    OperationStatus.RETIRING,
)


class Words(NamedTuple):
    """The words that commit transitions, and values that follow from them."""

    registrations: int
    watermark: int
    origin: int
    skipped_after: int
    skipped_through: int
    dropped: int
    collected: int
    floor: int
    """The sequence up to which terminal operations are no longer retained."""


class RawSlot(NamedTuple):
    """The contents of a slot, not decoded; `terminal_seq` is 0 before the end."""

    word: int
    birth: int
    terminal_seq: CompletionSeq
    id: bytes
    participant: int
    created_at_ms: int
    created_mono_ns: int
    started: int
    head: bytes
    rest: bytes
    detail: bytes
    watchers: int


class RawRecord(NamedTuple):
    """The contents of a record, not decoded; `birth` is 0 if its operation is not held."""

    birth: int
    created_at_ms: int
    started: int
    completed_at_ms: int
    elapsed_ms: int
    id: bytes
    head: bytes
    outcome: bytes
    rest: bytes
    detail: bytes


class OperationView(msgspec.Struct, frozen=True, kw_only=True):
    """One whole operation as a reader found it; `entry` is its feed entry if it has ended."""

    spec: OperationSpec
    detail: Detail
    birth: int
    created_at_ms: int
    started_at_ms: int | None
    elapsed_ms: int | None = None
    entry: CompletionEntry | None = None
    #: The slot and its contents, while the operation has not ended.
    slot: int = -1
    word: int = 0
    participant: int = 0
    watchers: int = 0

    @property
    def status(self) -> OperationStatus:
        """Its place in its lifecycle."""
        if self.entry is not None:
            return status_of(self.entry.terminal_outcome)
        return STATUSES[self.word & at.STATUS_MASK]


class OperationTable:
    """The operations that one segment holds: those that have not ended, in slots, and those that
    are retained, in the records that ended them."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._epoch = segment.epoch
        # Specs never change, and decoding one is the slowest part of reading an operation.
        self._specs: dict[int, OperationSpec] = {}

    def find(self, id: OperationId) -> OperationView | None:
        """An operation that the registry holds."""
        while True:
            place = self.place(id)
            if place is None:
                return None
            slot, seq = place
            view = self.in_slot(slot) if slot >= 0 else self.in_record(seq)
            if view is not None and view.spec.id == id:
                return view
            # The operation has left that place since it was found.

    def place(self, id: OperationId) -> tuple[int, CompletionSeq] | None:
        """The slot of an operation and 0, or -1 and the sequence that ended it."""
        return self._read(self._epoch.find, id)

    def live(self) -> Iterator[OperationView]:
        """Every operation that has not ended, in no order."""
        for slot in self._epoch.used():
            view = self.in_slot(slot)
            if view is not None:
                yield view

    def slots(self) -> Iterator[RawSlot]:
        """The contents of each slot that is not free, not decoded."""
        for slot in self._epoch.used():
            found = self.slot(slot)
            if found is not None:
                yield found

    def retained(self, after_seq: CompletionSeq = 0) -> Iterator[OperationView]:
        """Every operation that ended above a sequence and is held, in the order in which they
        ended."""
        words = self.words()
        for seq in range(max(words.floor, after_seq) + 1, words.watermark + 1):
            view = self.in_record(seq)
            if view is not None:
                yield view

    def held(self) -> list[OperationView]:
        """Every operation that the registry holds, each once, in no order."""
        views = {view.birth: view for view in self.live()}
        # Read last: an operation that has ended meanwhile is here.
        views.update((view.birth, view) for view in self.retained())
        return list(views.values())

    def words(self) -> Words:
        """The words that commit, as they are now."""
        return Words(*self._read(self._epoch.words))

    def in_slot(self, slot: int) -> OperationView | None:
        """The operation in a slot, or None if it holds none or one that has ended."""
        found = self.slot(slot)
        if found is None or found.terminal_seq:
            return None
        field = f"slot[{slot}]"
        spec = self._specs.get(found.birth)
        if spec is None:
            spec = self.remember(found.birth, self._spec(field, found))
        if spec.id.bytes != found.id:
            raise self._segment.corrupted(f"{field}.id", spec.id.bytes.hex(), found.id.hex())
        return OperationView(
            spec=spec,
            detail=self.decode(field, decode_detail, found.detail),
            birth=found.birth,
            created_at_ms=found.created_at_ms,
            started_at_ms=_started_at_ms(found.started),
            slot=slot,
            word=found.word,
            participant=found.participant,
            watchers=found.watchers,
        )

    def in_record(
        self, seq: CompletionSeq, entry: CompletionEntry | None = None
    ) -> OperationView | None:
        """The operation that a sequence ended; None if its record was dropped, or the operation is
        not held. `entry` is its entry, if the caller has it."""
        found = self.record(seq)
        if found is None or not found.birth:
            return None
        field = f"feed[{seq}]"
        spec = self._spec(field, found)
        if entry is None:
            entry = CompletionEntry(
                seq=seq,
                operation_id=spec.id,
                kind=spec.kind,
                display_name=spec.display_name,
                terminal_outcome=self.decode(field, decode_outcome, found.outcome),
                completed_at_ms=found.completed_at_ms,
            )
        return OperationView(
            spec=spec,
            detail=self.decode(field, decode_detail, found.detail),
            birth=found.birth,
            created_at_ms=found.created_at_ms,
            started_at_ms=_started_at_ms(found.started),
            elapsed_ms=found.elapsed_ms,
            entry=entry,
        )

    def _spec(self, field: str, found: RawSlot | RawRecord) -> OperationSpec:
        session_id = self._segment.session_id
        return self.decode(field, decode_spec, found.id, found.head, found.rest, session_id)

    def slot(self, slot: int) -> RawSlot | None:
        """The contents of a slot, not decoded."""
        found = self._read(self._epoch.slot, slot)
        return None if found is None else RawSlot(*found)

    def record(self, seq: CompletionSeq) -> RawRecord | None:
        """The contents of a record, not decoded; None if it was dropped, or never existed."""
        found = self._read(self._epoch.record, seq)
        return None if found is None else RawRecord(*found)

    def outcome(self, slot: int, birth: int, since: CompletionSeq) -> bytes | None:
        """The encoded outcome of the operation of this birth; None if it has not ended, or if its
        outcome was dropped."""
        try:
            return self._epoch.outcome(slot, birth, since)
        except Refused as refused:
            if refused.args[0] == "dropped":
                return None
            raise self._segment.refusal(refused) from None

    def remember(self, birth: int, spec: OperationSpec) -> OperationSpec:
        """Cache the spec of a committed registration, so that it need not be decoded."""
        if len(self._specs) >= self._segment.layout.slots:
            self._specs.clear()
        self._specs[birth] = spec
        return spec

    def _read(self, read: Callable[..., T], *args: object) -> T:
        try:
            return read(*args)
        except Refused as refused:
            raise self._segment.refusal(refused) from None

    def decode(self, field: str, decode: Callable[..., T], *data: object) -> T:
        """Call `decode` on data that was read from `field`; `SegmentCorrupted` if it fails."""
        try:
            return decode(*data)
        except (msgspec.DecodeError, ValueError) as error:
            raise self._segment.corrupted(field, "a decodable operation", str(error)) from error


def _started_at_ms(started: int) -> int | None:
    return started - 1 if started else None
