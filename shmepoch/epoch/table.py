"""The operation table in an epoch's memory: slots, how they are found, changed and given back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.feed import NO_SLOT, SegmentFeed
from shmepoch.epoch.operations import OperationSpec, OperationStatus
from shmepoch.epoch.slots import (
    FRESH,
    HEADER,
    LAST_VERSION,
    STATUSES,
    Detail,
    EncodedSpec,
    OperationView,
    Slot,
    detail_decoder,
    encode_detail,
    spec_decoder,
)
from shmepoch.epoch.words import Words
from shmepoch.errors import SegmentCorrupted
from shmepoch.ids import OperationId
from shmepoch.memory import layout as at
from shmepoch.memory.participants import slot_of
from shmepoch.memory.segment import Segment

T = TypeVar("T")


class OperationTable:
    """The slots of one segment.

    OPS-2: a slot holds an operation if its birth is at most `registrations`; the operation is
    terminal if `0 < terminal_seq <= watermark`, and nothing else says so.
    OPS-3: a terminal operation is retained while it is among the newest `max_completed`, was not
    collected, and its entry is in the feed, which is where its outcome is kept.
    OPS-6: the slot of an operation that has ended is not given to another while it is watched.
    Before its entry is dropped from the feed, the entry is moved into the slot, and what does not
    fit there into slots that are free. Registrations come first: they take the oldest of those
    slots if there is no other.
    """

    def __init__(self, segment: Segment, feed: SegmentFeed) -> None:
        self._segment = segment
        self._memory = segment.memory
        self._layout = segment.layout
        self._feed = feed
        assert segment.layout.config is not None
        self._config = segment.layout.config
        # Specs never change, and decoding one is the dearest part of a look at an operation.
        self._specs: dict[int, OperationSpec] = {}

    def words(self) -> Words:
        """What is committed now."""
        return Words.load(self._memory, self._segment.name)

    # --- reading, without a lock or as of words that were read under it ---------------------------

    def floor(self, words: Words) -> int:
        """The sequence up to which terminal operations are not retained any more."""
        return words.floor(self._config.max_completed)

    def find(self, id: OperationId, words: Words | None = None) -> Slot | None:
        """The slot of an operation that the registry holds."""
        words, key = words or self.words(), id.bytes
        for index in self._with_fingerprint(id.fingerprint):
            slot = self.slot(index, words)
            if slot.id == key and self._is_held(slot, words):
                return slot
        return None

    def _with_fingerprint(self, fingerprint: int) -> Iterator[int]:
        """The slots that have this fingerprint, each as it is looked for; 0 has those that are
        free."""
        find, layout, index = self._memory.find, self._layout, -1
        while (index := find(layout.fingerprints, layout.slots, fingerprint, index + 1)) >= 0:
            yield index

    def slot(self, index: int, words: Words | None = None) -> Slot:
        """The fixed part of a slot, without what was not committed. Whole only under the writer
        lock; its birth tells which operation it is about."""
        words = words or self.words()
        return self._raw(index).as_of(words)

    def _raw(self, index: int) -> Slot:
        """A slot's words, each within its bounds, though they may be of different moments."""
        raw = self._memory.read(self._layout.slot(index), HEADER.size)
        slot = Slot(index, *HEADER.unpack(raw))
        wrong = slot.out_of_bounds(self._layout.max_participants)
        if wrong is not None:
            field, most, actual = wrong
            raise self._corrupted(f"slot[{index}].{field}", f"at most {most}", actual)
        return slot

    def whole(self, index: int) -> Slot:
        """The fixed part of a slot, of one moment unless it `is_passing`."""
        offset = self._layout.slot(index)
        while True:
            slot = self.slot(index)
            if self._memory.load(offset) == slot.word:
                return slot

    def kept(self, slot: Slot) -> CompletionEntry | None:
        """The entry that is kept in a slot for its watchers, or None if it is there no more."""
        if not slot.is_kept:
            return None
        memory, offset = self._memory, self._layout.slot(slot.number)
        first = memory.read(offset + at.SLOT_KEPT, at.KEPT_LIMIT)
        length = int.from_bytes(first[: at.WORD], sys.byteorder)
        pieces = {0: first[at.WORD :]}
        for piece in self._pieces(slot):
            kept_at = self._layout.slot(piece.number) + at.SLOT_KEPT
            pieces[piece.elapsed_ms] = memory.read(kept_at, at.KEPT_LIMIT)
        if memory.load(offset) != slot.word:
            return None
        data = b"".join(pieces[number] for number in sorted(pieces))[:length]
        return self._feed.decode(data, slot.terminal_seq)

    def _pieces(self, slot: Slot) -> Iterator[Slot]:
        """The other slots that hold a part of what is kept in `slot`: they have its fingerprint and
        its sequence, and no birth, so they hold no operation."""
        for index in self._with_fingerprint(OperationId.from_bytes(slot.id).fingerprint):
            piece = self._raw(index)
            if piece.birth == 0 and piece.terminal_seq == slot.terminal_seq:
                yield piece

    def view(self, slot: Slot) -> OperationView | None:
        """The whole of the operation in `slot`, or None if the slot has passed to another.

        The slot is copied and its word looked at again: the word changes before anything it covers
        is overwritten, so an equal word means that the copy is of one moment.
        """
        memory, offset = self._memory, self._layout.slot(slot.number)
        while True:
            now = self.slot(slot.number)
            if now.birth != slot.birth or now.status is OperationStatus.ABSENT:
                return None
            copy = self._copy(now)
            if memory.load(offset) == now.word:
                break
        if now.terminal_seq:
            # Stored before terminal_seq, but it may have been copied before, too.
            now = replace(now, elapsed_ms=memory.load(offset + at.SLOT_ELAPSED_MS))
        return self._decode(now, *copy)

    def view_locked(self, slot: Slot) -> OperationView:
        """Like `view`, of a slot that was found under the writer lock: it cannot change."""
        return self._decode(slot, *self._copy(slot))

    def watchers(self, slot: Slot) -> int:
        """How many watch the operation in `slot`, over all participants."""
        lanes = self._memory.read(
            self._layout.slot(slot.number) + at.SLOT_WATCHERS, 2 * self._layout.max_participants
        )
        return sum(memoryview(lanes).cast("H"))

    def held(self, words: Words | None = None) -> Iterator[Slot]:
        """Every slot whose operation the registry holds, in no order."""
        words = words or self.words()
        for slot in self._used():
            slot = slot.as_of(words)
            if self._is_held(slot, words):
                yield slot

    def _used(self) -> Iterator[Slot]:
        """Every slot that has a fingerprint, as it stands."""
        layout = self._layout
        column = self._memory.load_column(layout.fingerprints, layout.slots, at.WORD)
        for index, fingerprint in enumerate(column):
            if fingerprint:
                yield self._raw(index)

    def _is_held(self, slot: Slot, words: Words) -> bool:
        return slot.birth > 0 and not 0 < slot.terminal_seq <= self.floor(words)

    def _copy(self, slot: Slot) -> tuple[OperationSpec | bytes, bytes]:
        """The spec if it is known already, else encoded, and the encoded detail."""
        memory, offset = self._memory, self._layout.slot(slot.number)
        spec: OperationSpec | bytes | None = self._specs.get(slot.birth)
        if spec is None:
            spec = memory.read(offset + at.SLOT_SPEC, slot.spec_length)
        detail = memory.read(
            offset + at.SLOT_DETAIL + slot.buffer * at.DETAIL_LIMIT, slot.detail_length
        )
        return spec, detail

    def _decode(self, slot: Slot, spec: OperationSpec | bytes, detail: bytes) -> OperationView:
        if isinstance(spec, bytes):
            spec = self.remember(slot.birth, self._decoded(slot.number, spec_decoder, spec))
        if spec.id.bytes != slot.id:
            raise self._corrupted(f"slot[{slot.number}].id", spec.id.bytes.hex(), slot.id.hex())
        return OperationView(slot, spec, self.detail(slot.number, detail))

    def detail(self, number: int, data: bytes) -> Detail:
        """The detail that was read from a slot."""
        return self._decoded(number, detail_decoder, data) if data else FRESH

    def _decoded(self, number: int, decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
        try:
            return decoder.decode(data)
        except (msgspec.DecodeError, ValueError) as error:
            raise self._corrupted(f"slot[{number}]", "a decodable operation", str(error)) from error

    def spec(self, number: int, birth: int) -> OperationSpec:
        """The spec of the operation in a slot, under the writer lock."""
        return self._specs.get(birth) or self.view_locked(self.slot(number)).spec

    def remember(self, birth: int, spec: OperationSpec) -> OperationSpec:
        """Keep the spec of a registration that is committed, so that it need not be decoded."""
        if len(self._specs) >= self._layout.slots:
            self._specs.clear()
        self._specs[birth] = spec
        return spec

    # --- the writer's side: all of it under the segment's writer lock -------------------------

    def free_slots(self, count: int) -> list[int]:
        """The indices of so many slots that hold nothing.

        There always are: the table has a slot for each operation that is admitted and for each that
        is retained. What is kept for watchers in more slots than that gives way (OPS-6).
        """
        free = self._free(count)
        if len(free) < count:
            self._give_way(count)
            free = self._free(count)
        if len(free) < count:
            raise self._corrupted("free slots", f"at least {count}", len(free))
        return free

    def _free(self, most: int) -> list[int]:
        return list(islice(self._with_fingerprint(0), most))

    def _give_way(self, count: int) -> None:
        reclaimed = self._memory.load(at.RECLAIMED_AT)
        kept = [slot for slot in self._used() if slot.birth and 0 < slot.terminal_seq <= reclaimed]
        self._memory.store(at.INTENT_AT, 1)
        for slot in sorted(kept, key=lambda slot: slot.terminal_seq):
            if len(self._free(count)) == count:
                break
            self._give_back(slot)
        self._memory.store(at.INTENT_AT, 0)

    def _give_back(self, slot: Slot) -> None:
        """Free the slot of an operation that has ended, and those with what is kept of it."""
        memory, layout = self._memory, self._layout
        if slot.is_kept:
            passing = self._next_word(slot.word, OperationStatus.ABSENT, 0)
            memory.store(layout.slot(slot.number), passing)
        for piece in self._pieces(slot):
            memory.store(layout.fingerprint(piece.number), 0)
        memory.store(layout.fingerprint(slot.number), 0)

    def fill(
        self, index: int, birth: int, spec: EncodedSpec, created_at_ms: int, created_mono_ns: int
    ) -> None:
        """Prepare a free slot for a new operation, which registration `birth` will commit."""
        memory, offset = self._memory, self._layout.slot(index)
        key = spec.spec.id.bytes
        word = self._next_word(memory.load(offset), OperationStatus.ABSENT, 0)
        memory.store(offset, word)  # readers of what was here before see that it is going
        header = HEADER.pack(
            word,
            birth,
            0,
            key,
            self._segment.participant,
            created_at_ms,
            created_mono_ns,
            0,
            len(spec.data),
            0,
            0,
        )
        lanes = bytes(at.SLOT_SPEC - HEADER.size)
        memory.write(offset + at.SLOT_BIRTH, header[at.SLOT_BIRTH :] + lanes + spec.data)
        memory.store(self._layout.fingerprint(index), spec.spec.id.fingerprint)
        memory.store(offset, self._next_word(word, OperationStatus.PROVISIONING, 0))

    def change(self, slot: Slot, status: OperationStatus, detail: Detail | None) -> None:
        """Give a live operation another status and, unless it is None, another detail: one store
        of the slot's word makes both true."""
        memory, offset = self._memory, self._layout.slot(slot.number)
        buffer = slot.buffer
        if detail is not None:
            data = encode_detail(detail)
            buffer ^= 1
            memory.write(offset + at.SLOT_DETAIL + buffer * at.DETAIL_LIMIT, data)
            memory.store(offset + at.SLOT_DETAIL_LENGTH + buffer * at.WORD, len(data))
        memory.store(offset, self._next_word(slot.word, status, buffer))

    def end(self, slot: Slot, seq: int, elapsed_ms: int) -> None:
        """Say which sequence ends the operation; true once the watermark reaches it."""
        offset = self._layout.slot(slot.number)
        self._memory.store(offset + at.SLOT_ELAPSED_MS, elapsed_ms)
        self._memory.store(offset + at.SLOT_TERMINAL_SEQ, seq)

    def count_watcher(self, slot: Slot, participant: int, by: int) -> None:
        """Add to the watchers that a participant has on an operation."""
        offset = self._layout.slot(slot.number) + at.SLOT_WATCHERS
        lane = slot_of(participant)
        word_at = offset + lane // 4 * at.WORD
        shift = 16 * (lane % 4)
        word = self._memory.load(word_at)
        count = min(max((word >> shift & 0xFFFF) + by, 0), 0xFFFF)
        self._memory.store(word_at, word & ~(0xFFFF << shift) | count << shift)

    def unwatch(self, slot: Slot, participant: int, words: Words, by: int = 1) -> None:
        """Take watchers of a participant from an operation, if its slot has not passed on; the last
        one that watched what is not retained gives the slot back. With an intent."""
        now = self._raw(slot.number)
        if now.birth != slot.birth:
            return
        self.count_watcher(now, participant, -by)
        if self._is_left_over(now, words):
            self._give_back(now)

    def _is_left_over(self, slot: Slot, words: Words) -> bool:
        ended = slot.birth > 0 and 0 < slot.terminal_seq <= self.floor(words)
        return ended and not self.watchers(slot)

    def forget_watchers(self, participant: int) -> None:
        """Drop the watchers that a dead participant had."""
        words = self.words()
        self._memory.store(at.INTENT_AT, 1)
        for slot in self._used():
            if slot.birth:
                self.unwatch(slot, participant, words, 0xFFFF)
        self._memory.store(at.INTENT_AT, 0)

    def keep(self, after: CompletionSeq, through: CompletionSeq) -> None:
        """Keep what is still watched of entries that the feed is about to drop. With an intent."""
        for seq in range(after + 1, through + 1):
            slot = self._watched(seq)
            if slot is not None and not slot.is_kept:
                self._keep(slot, self._feed.encoded(seq))

    def is_any_watched(self, after: CompletionSeq, through: CompletionSeq) -> bool:
        """Whether an operation is still watched that one of these entries ended."""
        return any(self._watched(seq) is not None for seq in range(after + 1, through + 1))

    def _watched(self, seq: CompletionSeq) -> Slot | None:
        slot = self._ended_by(seq)
        return slot if slot is not None and self.watchers(slot) else None

    def _ended_by(self, seq: CompletionSeq) -> Slot | None:
        """The slot of the operation that an entry ended, unless it has passed on."""
        index = self._feed.slot_of(seq)
        if index == NO_SLOT:
            return None
        if index >= self._layout.slots:
            raise self._corrupted(f"feed[{seq}].slot", f"below {self._layout.slots}", index)
        slot = self._raw(index)
        return slot if slot.terminal_seq == seq else None

    def _keep(self, slot: Slot, data: bytes) -> None:
        memory, layout = self._memory, self._layout
        data = len(data).to_bytes(at.WORD, sys.byteorder) + data
        first, *others = (
            data[begin : begin + at.KEPT_LIMIT] for begin in range(0, len(data), at.KEPT_LIMIT)
        )
        free = self._free(len(others))
        if len(free) < len(others):
            return  # the table is full: its watchers find the outcome gone
        fingerprint = memory.load(layout.fingerprint(slot.number))
        for number, (index, piece) in enumerate(zip(free, others, strict=True), 1):
            offset = layout.slot(index)
            word = self._next_word(memory.load(offset), OperationStatus.ABSENT, 1)
            memory.store(offset, word)
            memory.store(offset + at.SLOT_BIRTH, 0)
            memory.store(offset + at.SLOT_TERMINAL_SEQ, slot.terminal_seq)
            memory.store(offset + at.SLOT_ELAPSED_MS, number)
            memory.write(offset + at.SLOT_KEPT, piece)
            memory.store(layout.fingerprint(index), fingerprint)
        offset = layout.slot(slot.number)
        passing = self._next_word(slot.word, OperationStatus.ABSENT, 0)
        memory.store(offset, passing)  # readers of the spec and the detail see that they are going
        memory.write(offset + at.SLOT_KEPT, first)
        memory.store(offset, self._next_word(passing, OperationStatus.ABSENT, 1))

    def reclaim(self, words: Words) -> None:
        """Give back the slots of operations that are not retained any more."""
        memory = self._memory
        done, floor = words.reclaimed, self.floor(words)
        for seq in range(done + 1, floor + 1):
            slot = self._ended_by(seq)
            if slot is not None and not self.watchers(slot):
                memory.store(self._layout.fingerprint(slot.number), 0)
        if floor > done:
            memory.store(at.RECLAIMED_AT, floor)

    def repair(self, words: Words) -> None:
        """Undo what a writer that was killed had prepared and not committed."""
        memory, layout = self._memory, self._layout
        for index in range(layout.slots):
            slot = self._raw(index)
            if slot.birth > words.registrations:
                memory.store(layout.fingerprint(index), 0)
                memory.store(layout.slot(index) + at.SLOT_BIRTH, 0)
            elif slot.terminal_seq > words.watermark:
                memory.store(layout.slot(index) + at.SLOT_TERMINAL_SEQ, 0)
        for slot in list(self._used()):
            if slot.birth and slot.is_emptied and slot.terminal_seq > words.dropped:
                # Its spec is gone, so it can only be kept, and its entry dropped.
                self.keep(words.dropped, slot.terminal_seq)
                self._feed.drop_through(slot.terminal_seq)
            if self._is_left_over(slot, words):
                self._give_back(slot)

    def _corrupted(self, field: str, expected: object, actual: object) -> SegmentCorrupted:
        return SegmentCorrupted(self._segment.name, field, expected, actual)

    @staticmethod
    def _next_word(word: int, status: OperationStatus, buffer: int) -> int:
        version = (word >> 16) + 1 & LAST_VERSION
        return version << 16 | buffer << 8 | STATUSES.index(status)

    # --- audit --------------------------------------------------------------------------------

    def check(self) -> None:
        """Verify every slot against the words that commit it, and the counts against each other."""
        memory, layout = self._memory, self._layout
        self._specs.clear()  # what is remembered cannot vouch for what is there
        words = self.words()
        watermark, floor = words.watermark, self.floor(words)
        live, seen = 0, set()
        for slot in self.held(words):
            view = self.view(slot)
            field = f"slot[{slot.number}]"
            if view is None:
                raise self._corrupted(f"{field}.word", "of an operation", slot.word)
            if slot.id in seen:
                raise self._corrupted(f"{field}.id", "held once", slot.id.hex())
            seen.add(slot.id)
            fingerprint = OperationId.from_bytes(slot.id).fingerprint
            if memory.load(layout.fingerprint(slot.number)) != fingerprint:
                raise self._corrupted(f"{field}.fingerprint", "that of its id", "another")
            uncommitted = self._raw(slot.number).terminal_seq
            if uncommitted > watermark:
                raise self._corrupted(f"{field}.terminal_seq", f"at most {watermark}", uncommitted)
            if not slot.terminal_seq:
                live += 1
                continue
            entry = self._feed.entry(slot.terminal_seq)
            if slot.terminal_seq > floor and (entry is None or entry.operation_id.bytes != slot.id):
                raise self._corrupted(f"{field}.terminal_seq", "its own entry", entry)
            if self._feed.slot_of(slot.terminal_seq) != slot.number:
                raise self._corrupted(
                    f"feed[{slot.terminal_seq}].slot",
                    slot.number,
                    self._feed.slot_of(slot.terminal_seq),
                )
        for slot in self._used():
            if slot.birth and slot.is_kept and self.kept(slot) is None:
                raise self._corrupted(f"slot[{slot.number}].kept", "an entry", None)
        if live != words.active:
            raise self._corrupted("registrations", f"{live} operations live", words.active)
