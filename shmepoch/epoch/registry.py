"""The operation registry over an epoch's memory: every transition of every operation."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Self, TypeAlias

import msgspec

from shmepoch.arguments import described, require, require_each
from shmepoch.epoch.codec import cut, wire_decoder
from shmepoch.epoch.completions import CompletionBatch, CompletionSeq
from shmepoch.epoch.cursors import CursorState, EpochCursorState
from shmepoch.epoch.feed import SegmentFeed, encode_entry
from shmepoch.epoch.lifecycle import OpsLifecycleRegistry
from shmepoch.epoch.operations import (
    TRANSITIONS,
    Aborted,
    Action,
    Cancelled,
    Completed,
    Failed,
    OperationKind,
    OperationLifecycleSnapshot,
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationResult,
    OperationSpec,
    OperationStatus,
    OperationTerminalOutcome,
    Retired,
    Terminated,
    WaitAllResult,
    status_of,
)
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.reading import OperationReader
from shmepoch.epoch.recovery import (
    require_room,
    restore_completions,
    room_for,
    unfinished_operations,
)
from shmepoch.epoch.slots import (
    Detail,
    EncodedSpec,
    OperationView,
    Slot,
    encode_checked,
    encode_peer_handle,
    encode_spec,
)
from shmepoch.epoch.table import OperationTable
from shmepoch.epoch.transitions import CommonTransitions
from shmepoch.epoch.waits import OperationCompletionWatch, WaitAll, Watching
from shmepoch.epoch.words import Words
from shmepoch.errors import (
    AlreadyPeerReady,
    AlreadyRegistered,
    BindingsMismatch,
    CursorAhead,
    CursorsOnly,
    EpochSealed,
    InvalidTransition,
    MaxConcurrentExceeded,
    NotFound,
    OutcomeDropped,
    PayloadTooLarge,
    PeerNotExpected,
    RecordInvalid,
    ShmepochError,
    StoreBehind,
    WriterBusy,
)
from shmepoch.ids import OperationId, RunId, RuntimeEpochId
from shmepoch.lazy import lazy
from shmepoch.memory import layout as at
from shmepoch.memory._native import Memory
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.layout import OpsLifecycleConfig
from shmepoch.memory.segment import Segment
from shmepoch.timeouts import limit_s

_outcome_decoder: Final[msgspec.msgpack.Decoder[OperationTerminalOutcome]] = wire_decoder(
    OperationTerminalOutcome  # type: ignore[arg-type] # a union is no class
)
#: An operation that is to end, and the outcome that it is to have.
_Ending: TypeAlias = tuple[OperationView, msgspec.Raw]
#: What an entry takes at most besides what its operation's spec takes, and its reason.
_ENTRY_ROOM: Final = 64
_progress_decoder: Final = wire_decoder(OperationProgressUpdate)


def _nothing_more() -> None:
    pass


class RuntimeOpsLifecycleRegistry(OpsLifecycleRegistry):
    """The `OpsLifecycleRegistry` of one segment, shared or private.

    OPS-4: a transition becomes true by exactly one atomic store: of the watermark for those that
    end operations, of `registrations` for a registration, of the slot's word for the rest. The
    first two prepare several words; an intent word says so. The next writer that finds it
    undoes what was not committed.
    """

    def __init__(self, segment: Segment | None = None) -> None:
        """A registry that stands alone, in private memory of its own, unless `segment` is given."""
        #: Whether it is of no session in particular.
        self._is_alone = segment is None
        if not isinstance(segment, Segment):
            require(Segment | None, segment, "RuntimeOpsLifecycleRegistry", "segment")
            segment = Segment.private(OpsLifecycleConfig())
        if segment.layout.config is None:
            raise CursorsOnly
        self._segment = segment
        self._memory = segment.memory
        self._config = segment.layout.config
        self._feed = SegmentFeed(segment)
        self._table = OperationTable(segment, self._feed)
        self._wait_all = WaitAll()
        #: Watches that are over and still counted.
        self._unwatched: deque[Watching] = deque()

    @classmethod
    def with_config(cls, config: OpsLifecycleConfig) -> Self:
        """A registry that stands alone, of the given size."""
        require(OpsLifecycleConfig, config, "with_config", "config")
        self = cls(Segment.private(config))
        self._is_alone = True
        return self

    @classmethod
    def from_recovered(
        cls, snapshot: PersistedOpsSnapshot, config: OpsLifecycleConfig | None = None
    ) -> Self:
        """A registry that stands alone and continues a stored epoch.

        Operations that had not ended are dropped: their processes are gone. The registry is larger
        than `config` where a stored completion would not fit its feed otherwise. Raises
        `RecordInvalid` for what is no history of one epoch.
        """
        require(PersistedOpsSnapshot, snapshot, "from_recovered", "snapshot")
        require(OpsLifecycleConfig | None, config, "from_recovered", "config")
        config = room_for(snapshot, config or OpsLifecycleConfig(), unfinished=False)
        self = cls(Segment.private(config, epoch_id=snapshot.epoch_id))
        self._is_alone = True
        self.restore(snapshot)
        return self

    # --- registration -------------------------------------------------------------------------

    def register_operation(self, spec: OperationSpec) -> None:
        encoded = self._encode(spec)
        with self._segment.writer:
            if self._is_native and self._common.register(encoded):
                return
            self._register([encoded])

    def register_operations(self, specs: Iterable[OperationSpec]) -> None:
        require(Iterable, specs, "register_operations", "specs")
        encoded = [self._encode(spec) for spec in specs]
        with self._segment.writer:
            if self._is_native and self._common.register_all(encoded):
                return
            self._register(encoded)

    def _encode(self, spec: OperationSpec) -> EncodedSpec:
        session_id = self._segment.session_id
        encoded = encode_spec(spec, session_id)
        owner = encoded.spec.owner_session_id
        if owner != session_id and owner is not None and not self._is_alone:
            raise BindingsMismatch(owner, session_id, registering=spec.id)
        return encoded

    def _register(self, encoded: Sequence[EncodedSpec]) -> None:
        words = self._begin()
        seen: set[OperationId] = set()
        for each in encoded:
            id = each.spec.id
            if id in seen or self._table.find(id, words) is not None:
                raise AlreadyRegistered(id)
            seen.add(id)
        self._admit(words.active, len(encoded))
        self._enter(encoded, words, wall_ms())

    def _admit(self, active: int, entering: int) -> None:
        config = self._config
        for setting, limit in (
            ("max_concurrent", config.max_concurrent),
            ("max_operations", config.max_operations),
        ):
            if limit is not None and active + entering > limit:
                raise MaxConcurrentExceeded(limit, active, entering=entering, setting=setting)

    def _enter(self, encoded: Sequence[EncodedSpec], words: Words, created_ms: int) -> None:
        memory, births, now_ns = self._memory, words.registrations, time.monotonic_ns()
        self._table.reclaim(words)
        slots = self._table.free_slots(len(encoded))
        memory.store(at.INTENT_AT, 1)
        for birth, (slot, each) in enumerate(zip(slots, encoded, strict=True), births + 1):
            self._table.fill(slot, birth, each, created_ms, now_ns)
        memory.store(at.REGISTRATIONS_AT, births + len(encoded))
        memory.store(at.INTENT_AT, 0)
        for birth, each in enumerate(encoded, births + 1):
            self._table.remember(birth, each.spec)

    # --- transitions that do not end an operation ---------------------------------------------

    def provisioning_succeeded(self, id: OperationId) -> None:
        if not isinstance(id, OperationId):
            require(OperationId, id, "provisioning_succeeded", "id")
        with self._segment.writer:
            if self._is_native and self._common.start(id):
                return
        self._change(id, Action.PROVISIONING_SUCCEEDED, _started)

    def provisionings_succeeded(self, ids: Iterable[OperationId]) -> None:
        action = Action.PROVISIONING_SUCCEEDED
        ids = require_each(OperationId, ids, "provisionings_succeeded", "ids")
        with self._segment.writer:
            if self._is_native and self._common.start_all(ids):
                return
            for view in self._require_all(ids, action, self._begin()):
                self._table.change(view.slot, OperationStatus.RUNNING, _started(view))

    def peer_ready(self, id: OperationId, handle: OperationPeerHandle) -> None:
        encode_peer_handle(handle)

        def ready(view: OperationView) -> Detail:
            if view.detail.peer_handle is not None:
                raise AlreadyPeerReady(id)
            return msgspec.structs.replace(view.detail, peer_handle=handle)

        self._change(id, Action.PEER_READY, ready)

    def report_progress(self, id: OperationId, update: OperationProgressUpdate) -> None:
        encode_checked(update, _progress_decoder)

        def reported(view: OperationView) -> Detail:
            count = view.detail.progress_count + 1
            return msgspec.structs.replace(view.detail, progress_count=count, last_progress=update)

        self._change(id, Action.REPORT_PROGRESS, reported)

    def request_retire(self, id: OperationId) -> None:
        self._change(id, Action.REQUEST_RETIRE, lambda view: view.detail)

    def _change(
        self, id: OperationId, action: Action, detail: Callable[[OperationView], Detail]
    ) -> None:
        require(OperationId, id, action, "id")
        with self._segment.writer:
            view = self._require(id, self._begin())
            if action is Action.PEER_READY and view.spec.kind is not OperationKind.MOB_MEMBER_CHILD:
                raise PeerNotExpected(id)
            status = self._guard(view, action)
            self._table.change(view.slot, status or view.slot.status, detail(view))

    # --- transitions that end operations ------------------------------------------------------

    def provisioning_failed(self, id: OperationId, error: str) -> None:
        self._end(id, Action.PROVISIONING_FAILED, Failed(error))

    def abort_provisioning(self, id: OperationId, reason: str | None = None) -> None:
        self._end(id, Action.ABORT_PROVISIONING, Aborted(reason))

    def complete_operation(
        self,
        id: OperationId,
        result: OperationResult,
        *,
        durable: bool = False,
        timeout: float | None = 10.0,
    ) -> None:
        limit = limit_s(timeout, "complete_operation") if durable else None
        outcome = _completed(result)
        if result.id != id:
            raise RecordInvalid(
                "OperationResult", f"its id is {result.id} and the operation's is {id}"
            )
        self._end(id, Action.COMPLETE_OPERATION, outcome)
        if durable:
            self._await_durable(id, limit)

    def _await_durable(self, id: OperationId, limit: float | None) -> None:
        """Wait, with no lock, until a store has the completion that was just committed."""
        began = time.monotonic()
        slot = self._table.find(id)
        # One that is not retained any more is below the watermark.
        seq = (slot and slot.terminal_seq) or self._feed.watermark()
        try:
            self._feed.wait_durable(seq, limit)
        except (TimeoutError, EpochSealed) as error:
            waited_ms = round((time.monotonic() - began) * 1000)
            raise self._store_behind(seq, waited_ms, completed=True) from error

    def _store_behind(
        self, awaited: CompletionSeq, waited_ms: int, *, completed: bool = False
    ) -> StoreBehind:
        return StoreBehind(
            self._segment.epoch_id,
            durable_seq=self._feed.durable_through(),
            awaited_seq=awaited,
            watermark=self._feed.watermark(),
            waited_ms=waited_ms,
            completed=completed,
        )

    def complete_operations(self, results: Iterable[OperationResult]) -> None:
        action = Action.COMPLETE_OPERATION
        require(Iterable, results, "complete_operations", "results")
        completed = [_completed(result) for result in results]
        outcomes = [(outcome.result.id, _encode_outcome(outcome)) for outcome in completed]
        if self._is_native and not self._config.store_wait_ms:
            with self._segment.writer:
                ended = self._common.end_all(outcomes, action)
            if ended:
                self._segment.waiters.notify()
                return
        self._end_those(outcomes, action)

    def fail_operation(self, id: OperationId, error: str) -> None:
        self._end(id, Action.FAIL_OPERATION, Failed(error))

    def cancel_operation(self, id: OperationId, reason: str | None = None) -> None:
        self._end(id, Action.CANCEL_OPERATION, Cancelled(reason))

    def mark_retired(self, id: OperationId) -> None:
        self._end(id, Action.MARK_RETIRED, Retired())

    def terminate_owner(self, reason: str) -> None:
        self._terminate(lambda _: True, reason)

    def terminate_and_seal(self, reason: str) -> None:
        """End every operation as `terminate_owner` does, and then the epoch, under one hold of the
        writer lock: no operation is registered in between.

        A process that is killed between the two leaves an open epoch in which every operation has
        ended. The next runtime goes on with it, and the call may be made again.
        """
        self._terminate(lambda _: True, reason, then=self._segment.seal_held)

    def terminate_where(
        self, ended: Callable[[int], bool], reason: str, *, dead: Iterable[int] = ()
    ) -> int:
        """End, as `Terminated` and in one commit, the operations that have not ended and whose
        participant has: `ended` says so of its key. Forget what the `dead` participants watched.
        How many operations there were.

        It waits for nothing: it raises `WriterBusy` while another transition is in progress, and
        `StoreBehind` where others would wait for the store.
        """

        def forget_watchers() -> None:
            for participant in dead:
                self._table.forget_watchers(participant)

        return self._terminate(ended, reason, then=forget_watchers, waits=False)

    def _terminate(
        self,
        whose: Callable[[int], bool],
        reason: str,
        *,
        then: Callable[[], None] = _nothing_more,
        waits: bool = True,
    ) -> int:
        _encode_outcome(Terminated(reason))  # refuses what is no reason, before the lock is taken

        def find(words: Words) -> list[_Ending]:
            live = self._live(words, whose)
            if not live:
                return []
            outcome = _encode_outcome(Terminated(cut(reason, self._reason_room(len(live)))))
            return [(view, outcome) for view in live]

        return self._end_all(find, then=then, waits=waits)

    def _reason_room(self, operations: int) -> int:
        """FEED-3: how long a reason may be that so many operations end with in one commit.

        A configuration gives each operation of a full table at least two specs' room in the feed,
        and an entry without its reason takes little more than one.
        """
        return self._feed.payload_limit // operations - at.WORD - at.SPEC_LIMIT - _ENTRY_ROOM

    def _live(self, words: Words, whose: Callable[[int], bool]) -> list[OperationView]:
        live = [
            slot
            for slot in self._table.held(words)
            if not slot.terminal_seq and whose(slot.participant)
        ]
        live.sort(key=lambda slot: slot.birth)
        return [self._table.view_locked(slot) for slot in live]

    def _end(self, id: OperationId, action: Action, outcome: OperationTerminalOutcome) -> None:
        if not isinstance(id, OperationId):
            require(OperationId, id, action, "id")
        encoded = _encode_outcome(outcome)
        if self._is_native and not self._config.store_wait_ms:
            with self._segment.writer:
                ended = self._common.end(id, action, encoded)
            if ended:
                self._segment.waiters.notify()
                return
        self._end_those([(id, encoded)], action)

    def _end_those(
        self, outcomes: Sequence[tuple[OperationId, msgspec.Raw]], action: Action
    ) -> None:
        def allowed(words: Words) -> list[_Ending]:
            views = self._require_all([id for id, _ in outcomes], action, words)
            return [(view, outcome) for view, (_, outcome) in zip(views, outcomes, strict=True)]

        self._end_all(allowed)

    def _end_all(
        self,
        find: Callable[[Words], Sequence[_Ending]],
        *,
        then: Callable[[], None] = _nothing_more,
        waits: bool = True,
    ) -> int:
        """End, in one commit, what `find` finds under the writer lock, and do `then` before it is
        released; how many there were.

        DURABLE-1: no wait for a store holds the writer lock, so that others go on; what was found
        is found anew afterwards.
        """
        segment = self._segment
        wait_ms = self._config.store_wait_ms if waits else 0
        deadline = time.monotonic() + wait_ms / 1000
        while True:
            with segment.writer if waits else segment.writer_if_free():
                words = self._begin()
                endings = find(words)
                awaited = self._commit(endings, words)
                if not awaited:
                    then()
            if not awaited:
                break
            self._await_store(awaited, deadline, wait_ms)
        if endings or segment.sealed:
            segment.waiters.notify()
        return len(endings)

    def _await_store(self, seq: CompletionSeq, deadline: float, wait_ms: int) -> None:
        try:
            self._feed.wait_durable(seq, deadline - time.monotonic())
        except TimeoutError:
            raise self._store_behind(seq, wait_ms) from None

    def _commit(self, endings: Sequence[_Ending], words: Words) -> CompletionSeq:
        """End all of `endings` by one store of the watermark: 0. Or else, with nothing done, the
        sequence up to which a store has to come first."""
        if not endings:
            return 0
        memory, now_ns = self._memory, time.monotonic_ns()
        first, last = words.watermark + 1, words.watermark + len(endings)
        encoded = [
            encode_entry(
                seq, view.spec, outcome, view.detail.started_at_ms or view.slot.created_at_ms
            )
            for seq, (view, outcome) in enumerate(endings, first)
        ]
        size = sum(map(len, encoded)) + len(encoded) * at.WORD
        if size > self._feed.payload_limit:
            together = f" of {len(endings)} operations together" if len(endings) > 1 else ""
            raise PayloadTooLarge(
                size, self._feed.payload_limit, what=f"the outcome{together}", setting="feed_bytes"
            )
        position, dropped = self._feed.find_room([len(data) for data in encoded])
        if self._config.store_wait_ms:
            awaited = self._awaited(dropped, last, words)
            if awaited > self._feed.durable_through():
                return awaited
        if self._table.is_any_watched(words.dropped, dropped):
            memory.store(at.INTENT_AT, 1)
            self._table.keep(words.dropped, dropped)
        self._feed.drop_through(dropped)
        memory.store(at.INTENT_AT, 1)
        for seq, ((view, _), data) in enumerate(zip(endings, encoded, strict=True), first):
            position = self._feed.put(seq, position, data, view.slot.number)
            elapsed_ns = max(0, now_ns - view.slot.created_mono_ns)
            self._table.end(view.slot, seq, elapsed_ns // 1_000_000)
        memory.store(at.WATERMARK_AT, last)
        memory.store(at.INTENT_AT, 0)
        return 0

    @staticmethod
    def _awaited(dropped: CompletionSeq, last: CompletionSeq, words: Words) -> CompletionSeq:
        """What a store has to have before a commit that ends at `last` and drops up to `dropped`.

        DURABLE-2: nothing is dropped that no store has, and no more is committed beyond the store
        than a recovery leaves out, so that no sequence comes again after a reboot.
        """
        ahead = min(last - at.RECOVERY_SKIP, words.watermark)
        return max(ahead, dropped if dropped > words.dropped else 0)

    @lazy
    def _common(self) -> CommonTransitions:
        return CommonTransitions(self._segment, self._table)

    @property
    def _is_native(self) -> bool:
        """Not for a stand-in of the memory, which sees every store of a transition."""
        return isinstance(self._memory, Memory)

    # --- guards, under the writer lock --------------------------------------------------------

    def _begin(self) -> Words:
        """What every transition does first: nothing on a sealed epoch, and repair before all."""
        if self._segment.ended:
            raise self._segment.closed_error()
        return self._repair()

    def _repair(self) -> Words:
        words = self._table.words()
        words.check(self._segment.layout, self._segment.name)
        if words.intent:
            self._table.repair(words)
            self._memory.store(at.INTENT_AT, 0)
            words = self._table.words()
        return words

    def _require(self, id: OperationId, words: Words) -> OperationView:
        return self._table.view_locked(self.locate(id, words))

    def _require_all(
        self, ids: Sequence[OperationId], action: Action, words: Words
    ) -> list[OperationView]:
        """Several that `action` is allowed for, before any is changed."""
        views: dict[OperationId, OperationView] = {}
        for id in ids:
            view = self._require(id, words)
            target = self._guard(view, action)
            if id in views:  # refused as if the first time had been done already
                raise InvalidTransition(id, target or view.slot.status, action)
            views[id] = view
        return list(views.values())

    def _guard(self, view: OperationView, action: Action) -> OperationStatus | None:
        """OPS-1: the status that `action` leads to; `InvalidTransition` where it is not allowed."""
        allowed, target = TRANSITIONS[action]
        if view.slot.terminal_seq:
            entry = self._feed.entry(view.slot.terminal_seq)
            status = status_of(entry.terminal_outcome) if entry else OperationStatus.ABSENT
        else:
            status = view.slot.status
        if status not in allowed:
            raise InvalidTransition(view.spec.id, status, action)
        return target

    # --- reading, without a lock --------------------------------------------------------------

    @lazy
    def _reader(self) -> OperationReader:
        return OperationReader(self._segment, self._table, self._feed)

    def snapshot(self, id: OperationId) -> OperationLifecycleSnapshot | None:
        require(OperationId, id, "snapshot", "id")
        slot = self._table.find(id)
        return self._reader.snapshot(slot) if slot else None

    def list_operations(self) -> list[OperationLifecycleSnapshot]:
        return self._reader.list()

    def active_count(self) -> int:
        """How many operations have not ended."""
        while True:
            words = self._table.words()
            # Else some may have been registered and have ended since that was read.
            if self._memory.load(at.REGISTRATIONS_AT) == words.registrations:
                words.check_active(self._segment.layout, self._segment.name)
                return words.active

    def completion_feed(self) -> SegmentFeed:
        return self._feed

    def collect_completed(self) -> list[tuple[OperationId, OperationTerminalOutcome]]:
        with self._segment.writer:
            words = self._begin()
            floor = self._table.floor(words)
            retained = {slot.terminal_seq for slot in self._table.held(words)}
            batch = self._feed.list_since(floor)
            self._memory.store(at.COLLECTED_AT, batch.watermark)
        return [
            (entry.operation_id, entry.terminal_outcome)
            for entry in batch.entries
            if entry.seq in retained
        ]

    # --- waiting ------------------------------------------------------------------------------

    @property
    def participant(self) -> int:
        """This process's participant key in the epoch, or 0."""
        return self._segment.participant

    def register_watcher(self, id: OperationId) -> OperationCompletionWatch:
        require(OperationId, id, "register_watcher", "id")
        if self._segment.read_only:  # an observer watches without being counted
            since = self._feed.watermark()
            slot = self.locate(id)
            return OperationCompletionWatch(self, id, slot, since, self.outcome_at(slot, since))
        with self._segment.writer:
            words = self._begin()
            view = self._require(id, words)
            since = words.watermark
            outcome = self.outcome_at(view.slot, since)
            if outcome is None:
                self._table.count_watcher(view.slot, self._segment.participant, 1)
        return OperationCompletionWatch(self, id, view.slot, since, outcome)

    def try_watch(self, slots: Iterable[Slot]) -> list[Watching] | None:
        """Watch those operations in `slots` that have not ended; None if that has to wait for a
        transition, which an event loop must not. An observer watches without being counted."""
        if self._segment.read_only:
            return []
        watched = list[Watching]()
        try:
            with self._segment.writer_if_free():
                words = self._begin()
                for slot in slots:
                    now = self._table.slot(slot.number, words)
                    if now.birth == slot.birth and not now.terminal_seq:
                        self._table.count_watcher(now, self._segment.participant, 1)
                        watched.append((now, self._segment.participant))
        except WriterBusy:
            return None
        return watched

    def unwatch(self, watched: Iterable[Watching]) -> None:
        """Watch these no longer. Never waits, and never fails: what cannot be done at once is done
        with the next ones, and what the epoch's end prevents is not needed."""
        if self._segment.read_only:
            return
        mine = self._segment.participant  # a forked child inherits those of its parent
        self._unwatched.extend(watching for watching in watched if watching[1] == mine)
        if not self._unwatched:
            return
        with contextlib.suppress(ShmepochError, OSError), self._segment.writer_if_free():
            words = self._repair()
            self._memory.store(at.INTENT_AT, 1)
            while self._unwatched:
                slot, participant = self._unwatched.popleft()
                if participant == self._segment.participant:
                    self._table.unwatch(slot, participant, words)
            self._memory.store(at.INTENT_AT, 0)

    def wait_all(
        self, run_id: RunId, ids: Sequence[OperationId], timeout: float | None = None
    ) -> WaitAllResult:
        require(RunId, run_id, "wait_all", "run_id")
        ids = require_each(OperationId, ids, "wait_all", "ids")
        return self._wait_all.wait(self, run_id, ids, timeout)

    async def all_ended(self, run_id: RunId, ids: Sequence[OperationId]) -> WaitAllResult:
        require(RunId, run_id, "all_ended", "run_id")
        ids = require_each(OperationId, ids, "all_ended", "ids")
        return await self._wait_all.wait_async(self, run_id, ids)

    def locate(self, id: OperationId, words: Words | None = None) -> Slot:
        """Where an operation lies; `NotFound` if the registry does not hold it."""
        slot = self._table.find(id, words)
        if slot is None:
            raise NotFound(id)
        return slot

    def outcome_at(self, slot: Slot, since: int) -> OperationTerminalOutcome | None:
        """How the operation that lay in `slot` ended, or None while it has not.

        `since` is a watermark at which it had not ended: should its slot have passed to another
        operation, its entry is looked for in the feed from there. Raises `OutcomeDropped` if
        retention has dropped that, too.
        """
        while True:
            now = self._table.whole(slot.number)
            if now.birth != slot.birth or now.is_passing:
                break
            if not now.terminal_seq:
                return None
            entry = self._feed.entry(now.terminal_seq) or self._table.kept(now)
            if entry is not None:
                return entry.terminal_outcome
            if self._table.whole(slot.number).word == now.word:
                break
        for entry in self._feed.list_since(since).entries:
            if entry.operation_id.bytes == slot.id:
                return entry.terminal_outcome
        raise OutcomeDropped(OperationId.from_bytes(slot.id))

    # --- persistence --------------------------------------------------------------------------

    def capture_persistence_snapshot(
        self,
        epoch_id: RuntimeEpochId,
        cursor_state: CursorState,
        *,
        after_seq: CompletionSeq = 0,
    ) -> PersistedOpsSnapshot:
        require(RuntimeEpochId, epoch_id, "capture_persistence_snapshot", "epoch_id")
        require(CursorState, cursor_state, "capture_persistence_snapshot", "cursor_state")
        return self.capture_news(epoch_id, cursor_state, after_seq)[0]

    def capture_news(
        self, epoch_id: RuntimeEpochId, cursor_state: CursorState, after_seq: CompletionSeq
    ) -> tuple[PersistedOpsSnapshot, CompletionBatch]:
        """What `capture_persistence_snapshot` gives, and the batch that its entries came in."""
        return self._reader.capture(epoch_id, cursor_state, after_seq)

    def restore(
        self, snapshot: PersistedOpsSnapshot, *, skip: int = 0, unfinished: bool = False
    ) -> None:
        """Continue a stored epoch in this fresh one, which is in no other use yet.

        `skip` leaves out that many sequences. With `unfinished`, operations that had not ended are
        entered as running, for the caller to end; without, they are dropped. Raises
        `RecoveryNeedsRoom` and `RecordInvalid`.
        """
        require_room(snapshot, self._config, unfinished=unfinished)
        restore_completions(self._segment, self._feed, self._table, snapshot, skip=skip)
        if not unfinished:
            return
        for operation, spec in unfinished_operations(snapshot):
            encoded = encode_spec(spec, self._segment.session_id)
            self._enter([encoded], self._table.words(), operation.created_at_ms)
            self._table.change(self.locate(spec.id), OperationStatus.RUNNING, Detail.of(operation))

    # --- audit --------------------------------------------------------------------------------

    def check(self) -> tuple[CursorAhead, ...]:
        """Verify every invariant of the epoch's memory against the others; what is no damage and
        yet needs a look.

        Takes the writer lock, and repairs first, as any transition would. Raises
        `SegmentCorrupted` that names what is wrong.
        """
        with self._segment.writer:
            cursors = EpochCursorState(self._segment).snapshot()
            words = self._repair()
            self._feed.check()
            self._table.check()
        return tuple(
            CursorAhead(self._segment.epoch_id, cursor, position, words.watermark)
            for cursor, position in msgspec.structs.asdict(cursors).items()
            if position > words.watermark
        )


def _started(view: OperationView) -> Detail:
    started_at_ms = max(wall_ms(), view.slot.created_at_ms)
    return msgspec.structs.replace(view.detail, started_at_ms=started_at_ms)


def _completed(result: OperationResult) -> Completed:
    if not isinstance(result, OperationResult):
        raise RecordInvalid("OperationResult", f"it is {described(result)}")
    return Completed(result)


def _encode_outcome(outcome: OperationTerminalOutcome) -> msgspec.Raw:
    data, _ = encode_checked(outcome, _outcome_decoder)
    return msgspec.Raw(data)
