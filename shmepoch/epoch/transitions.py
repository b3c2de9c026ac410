"""The transitions that every operation goes through, in native code as long as all is in order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from shmepoch.epoch.codec import to_wire
from shmepoch.epoch.completions import CompletionSeq
from shmepoch.epoch.feed import encode_entry
from shmepoch.epoch.operations import TRANSITIONS, Action, OperationStatus
from shmepoch.epoch.slots import STATUSES, Detail, EncodedSpec
from shmepoch.epoch.table import OperationTable
from shmepoch.ids import OperationId
from shmepoch.memory import layout as at
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.layout import Layout
from shmepoch.memory.segment import Segment

_PROVISIONING: Final = STATUSES.index(OperationStatus.PROVISIONING)
_RUNNING: Final = STATUSES.index(OperationStatus.RUNNING)
#: For each action, the statuses it is allowed in, as bits.
_ALLOWED: Final = {
    action: sum(1 << STATUSES.index(status) for status in allowed)
    for action, (allowed, _) in TRANSITIONS.items()
}


class CommonTransitions:
    """Registering, starting and ending one operation, each in one or two native calls.

    Under the writer lock. What returns False has stored nothing: it is not the common case. Then
    the registry does the transition word by word, repairs what has to be repaired, and raises what
    has to be raised. The two make the same stores in the same order.
    """

    def __init__(self, segment: Segment, table: OperationTable) -> None:
        config = segment.layout.config
        assert config is not None
        self._segment = segment
        self._table = table
        self._limit: Final = config.max_concurrent or config.max_operations
        self._native: Final = segment.memory.transitions(**facts(segment.layout))

    def register(self, encoded: EncodedSpec) -> bool:
        """Enter an operation; whether it was done."""
        id = encoded.spec.id
        birth = self._native.register(
            id.fingerprint,
            id.bytes,
            self._segment.participant,
            wall_ms(),
            time.monotonic_ns(),
            encoded.data,
            _PROVISIONING,
            self._limit,
        )
        if birth is None:
            return False
        self._table.remember(birth, encoded.spec)
        return True

    def register_all(self, encoded: Sequence[EncodedSpec]) -> bool:
        """Enter operations in one commit; whether it was done."""
        ids = [each.spec.id for each in encoded]
        if len(set(ids)) < len(ids):
            return False
        first = self._native.register_all(
            tuple([(each.spec.id.fingerprint, each.spec.id.bytes, each.data) for each in encoded]),
            self._segment.participant,
            wall_ms(),
            time.monotonic_ns(),
            _PROVISIONING,
            self._limit,
        )
        if first is None:
            return False
        for birth, each in enumerate(encoded, first):
            self._table.remember(birth, each.spec)
        return True

    def start(self, id: OperationId) -> bool:
        """The operation runs from now on; whether it was done."""
        now_ms = wall_ms()
        return self._start(id, now_ms, to_wire(Detail(started_at_ms=now_ms)))

    def start_all(self, ids: Sequence[OperationId]) -> bool:
        """The operations run from now on; whether it was done."""
        now_ms = wall_ms()
        for id in ids:
            found = self._native.look(
                id.fingerprint, id.bytes, _ALLOWED[Action.PROVISIONING_SUCCEEDED]
            )
            if found is None:
                return False
            *_, created_ms, _, _ = found
            if created_ms > now_ms:
                return False
        if len(set(ids)) < len(ids):
            return False
        started = to_wire(Detail(started_at_ms=now_ms))
        return all(self._start(id, now_ms, started) for id in ids)

    def _start(self, id: OperationId, now_ms: int, detail: bytes) -> bool:
        started = self._native.start(
            id.fingerprint, id.bytes, _PROVISIONING, _RUNNING, now_ms, detail
        )
        return bool(started)

    def end(self, id: OperationId, action: Action, outcome: msgspec.Raw) -> CompletionSeq:
        """End an operation; its sequence if it was done, else 0."""
        found = self._native.look(id.fingerprint, id.bytes, _ALLOWED[action])
        if found is None:
            return 0
        seq, slot, birth, created_ms, created_mono_ns, detail = found
        started_ms = self._table.detail(slot, detail).started_at_ms or created_ms
        spec = self._table.spec(slot, birth)
        if spec.id != id:
            return 0
        data = encode_entry(seq, spec, outcome, started_ms)
        elapsed_ns = max(0, time.monotonic_ns() - created_mono_ns)
        return seq if self._native.end(seq, slot, elapsed_ns // 1_000_000, data) else 0

    def end_all(self, outcomes: Sequence[tuple[OperationId, msgspec.Raw]], action: Action) -> bool:
        """End operations in one commit; whether it was done."""
        now_ns, endings, first = time.monotonic_ns(), [], 0
        for ahead, (id, outcome) in enumerate(outcomes):
            found = self._native.look(id.fingerprint, id.bytes, _ALLOWED[action])
            if found is None:
                return False
            first, slot, birth, created_ms, created_mono_ns, detail = found
            started_ms = self._table.detail(slot, detail).started_at_ms or created_ms
            spec = self._table.spec(slot, birth)
            if spec.id != id:
                return False
            data = encode_entry(first + ahead, spec, outcome, started_ms)
            endings.append((slot, max(0, now_ns - created_mono_ns) // 1_000_000, data))
        if len({slot for slot, _, _ in endings}) < len(endings):
            return False
        return bool(self._native.end_all(first, tuple(endings)))


def facts(layout: Layout) -> Any:
    """What the native transitions need to know of a layout."""
    config = layout.config
    assert config is not None
    return {
        "ring": layout.ring,
        "state": at.STATE_AT,
        "origin": at.ORIGIN_AT,
        "skipped": at.SKIPPED_AT,
        "watermark": at.WATERMARK_AT,
        "dropped": at.DROPPED_AT,
        "intent": at.INTENT_AT,
        "registrations": at.REGISTRATIONS_AT,
        "collected": at.COLLECTED_AT,
        "reclaimed": at.RECLAIMED_AT,
        "fingerprints": layout.fingerprints,
        "slots": layout.slots,
        "slots_at": layout.slots_at,
        "slot_size": at.SLOT_SIZE,
        "birth": at.SLOT_BIRTH,
        "terminal_seq": at.SLOT_TERMINAL_SEQ,
        "id": at.SLOT_ID,
        "participant": at.SLOT_PARTICIPANT,
        "created_ms": at.SLOT_CREATED_MS,
        "created_mono": at.SLOT_CREATED_MONO,
        "elapsed_ms": at.SLOT_ELAPSED_MS,
        "spec_length": at.SLOT_SPEC_LENGTH,
        "detail_length": at.SLOT_DETAIL_LENGTH,
        "watchers": at.SLOT_WATCHERS,
        "lanes": -(-2 * layout.max_participants // at.WORD) * at.WORD,
        "spec": at.SLOT_SPEC,
        "detail": at.SLOT_DETAIL,
        "detail_limit": at.DETAIL_LIMIT,
        "max_operations": config.max_operations,
        "max_completed": config.max_completed,
    }
