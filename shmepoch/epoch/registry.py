"""The operation registry over an epoch's memory, with all verbs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Self

import msgspec

from shmepoch._native import SPEC_LIMIT, Refused
from shmepoch.arguments import described, require, require_each
from shmepoch.config import RECORD_ROOM, OpsLifecycleConfig
from shmepoch.epoch.audit import Audit
from shmepoch.epoch.codec import cut
from shmepoch.epoch.completions import CompletionBatch, CompletionEntry, CompletionSeq
from shmepoch.epoch.cursors import CursorState, EpochCursorState
from shmepoch.epoch.encoding import (
    Detail,
    EncodedSpec,
    check_peer_handle,
    check_progress,
    decode_outcome,
    encode_detail,
    encode_outcome,
    encode_spec,
)
from shmepoch.epoch.feed import SegmentFeed
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
)
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.epoch.reading import OperationReader
from shmepoch.epoch.recovery import (
    require_room,
    restore_completions,
    room_for,
    unfinished_operations,
)
from shmepoch.epoch.table import STATUSES, OperationTable, OperationView
from shmepoch.epoch.waits import OperationCompletionWatch, Pending, Place, WaitAll, Watching
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
)
from shmepoch.ids import OperationId, RunId, RuntimeEpochId
from shmepoch.lazy import lazy
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.segment import Segment
from shmepoch.timeouts import limit_s

#: For each action, the statuses in which it is allowed, as bits.
_ALLOWED: Final = {
    action: sum(1 << STATUSES.index(status) for status in allowed)
    for action, (allowed, _) in TRANSITIONS.items()
}
_PROVISIONING: Final = STATUSES.index(OperationStatus.PROVISIONING)
_RUNNING: Final = STATUSES.index(OperationStatus.RUNNING)
_SAME_STATUS: Final = 0


class RuntimeOpsLifecycleRegistry(OpsLifecycleRegistry):
    """The `OpsLifecycleRegistry` of one segment, shared or private.

    Each transition is one call of the native `Epoch`, which takes the writer lock itself. The
    arguments are encoded before the call, and a refusal becomes an error after it.
    """

    def __init__(self, segment: Segment | None = None) -> None:
        """The registry of `segment`; without it, a standalone registry in private memory."""
        #: Whether it is standalone: it belongs to no particular session.
        self._is_alone = segment is None
        if not isinstance(segment, Segment):
            require(Segment | None, segment, "RuntimeOpsLifecycleRegistry", "segment")
            segment = Segment.private(OpsLifecycleConfig())
        if segment.layout.config is None:
            raise CursorsOnly
        self._segment = segment
        self._epoch = segment.epoch
        self._config = segment.layout.config
        self._feed = SegmentFeed(segment)
        self._table = OperationTable(segment)
        self._wait_all = WaitAll()
        #: Watches that are over and still counted.
        self._unwatched: deque[Watching] = deque()

    @classmethod
    def with_config(cls, config: OpsLifecycleConfig) -> Self:
        """A standalone registry of the given size."""
        require(OpsLifecycleConfig, config, "with_config", "config")
        self = cls(Segment.private(config))
        self._is_alone = True
        return self

    @classmethod
    def from_recovered(
        cls, snapshot: PersistedOpsSnapshot, config: OpsLifecycleConfig | None = None
    ) -> Self:
        """A standalone registry that continues a stored epoch.

        Operations that had not ended are dropped: their processes are gone. The registry is larger
        than `config` if a stored completion would not fit its feed otherwise. Raises
        `RecordInvalid` if the snapshot is not the history of one epoch.
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
        self._register([self._encode(spec)], wall_ms())

    def register_operations(self, specs: Iterable[OperationSpec]) -> None:
        require(Iterable, specs, "register_operations", "specs")
        self._register([self._encode(spec) for spec in specs], wall_ms())

    def _encode(self, spec: OperationSpec) -> EncodedSpec:
        session_id = self._segment.session_id
        encoded = encode_spec(spec, session_id)
        owner = encoded.spec.owner_session_id
        if owner != session_id and owner is not None and not self._is_alone:
            raise BindingsMismatch(owner, session_id, registering=spec.id)
        return encoded

    def _register(self, encoded: Sequence[EncodedSpec], created_ms: int) -> None:
        entrants = tuple([(each.spec.id, each.head, each.rest) for each in encoded])
        try:
            first = self._epoch.register(entrants, created_ms, time.monotonic_ns())
        except Refused as refused:
            reason, _, index, _, _, actual = refused.args
            if reason == "already_registered":
                raise AlreadyRegistered(encoded[index].spec.id) from None
            if reason == "limit":
                raise self._too_many(actual, len(encoded)) from None
            raise self._segment.refusal(refused) from None
        for birth, each in enumerate(encoded, first):
            self._table.remember(birth, each.spec)

    def _too_many(self, active: int, entering: int) -> MaxConcurrentExceeded:
        limit, setting = self._config.max_concurrent, "max_concurrent"
        if limit is None or active + entering <= limit:
            limit, setting = self._config.max_operations, "max_operations"
        return MaxConcurrentExceeded(limit, active, entering=entering, setting=setting)

    # --- transitions that do not end an operation ---------------------------------------------

    def provisioning_succeeded(self, id: OperationId) -> None:
        if not isinstance(id, OperationId):
            require(OperationId, id, "provisioning_succeeded", "id")
        self._start((id,))

    def start_operations(self, ids: Iterable[OperationId]) -> None:
        self._start(tuple(require_each(OperationId, ids, "start_operations", "ids")))

    def _start(self, ids: tuple[OperationId, ...]) -> None:
        try:
            self._epoch.start(ids, wall_ms())
        except Refused as refused:
            raise self._refusal(refused, ids, Action.PROVISIONING_SUCCEEDED) from None

    def peer_ready(self, id: OperationId, handle: OperationPeerHandle) -> None:
        check_peer_handle(handle)

        def ready(view: OperationView) -> Detail:
            if view.detail.peer_handle is not None:
                raise AlreadyPeerReady(id)
            return msgspec.structs.replace(view.detail, peer_handle=handle)

        self._change_detail(id, Action.PEER_READY, ready)

    def report_progress(self, id: OperationId, update: OperationProgressUpdate) -> None:
        check_progress(update)

        def reported(view: OperationView) -> Detail:
            count = view.detail.progress_count + 1
            return msgspec.structs.replace(view.detail, progress_count=count, last_progress=update)

        self._change_detail(id, Action.REPORT_PROGRESS, reported)

    def request_retire(self, id: OperationId) -> None:
        action = Action.REQUEST_RETIRE
        require(OperationId, id, action, "id")
        _, target = TRANSITIONS[action]
        assert target is not None
        try:
            self._epoch.change(id, _ALLOWED[action], STATUSES.index(target), 0, None)
        except Refused as refused:
            raise self._refusal(refused, (id,), action) from None

    def _change_detail(
        self, id: OperationId, action: Action, make: Callable[[OperationView], Detail]
    ) -> None:
        """Replace a detail by a new one that `make` returns; try again if another change was
        faster."""
        require(OperationId, id, action, "id")
        while True:
            self._segment.require_writable()
            view = self._require(id)
            if action is Action.PEER_READY and view.spec.kind is not OperationKind.MOB_MEMBER_CHILD:
                raise PeerNotExpected(id)
            allowed, _ = TRANSITIONS[action]
            if view.status not in allowed:
                raise InvalidTransition(id, view.status, action)
            detail = encode_detail(make(view))
            try:
                self._epoch.change(id, _ALLOWED[action], _SAME_STATUS, view.word, detail)
                return
            except Refused as refused:
                if refused.args[0] != "changed":
                    raise self._refusal(refused, (id,), action) from None

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
        seq = self._end(id, Action.COMPLETE_OPERATION, outcome)
        if durable:
            self._await_durable(seq, limit)

    def _await_durable(self, seq: CompletionSeq, limit: float | None) -> None:
        """Wait until a store has the completion that was just committed."""
        began = time.monotonic()
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
        require(Iterable, results, "complete_operations", "results")
        completed = [_completed(result) for result in results]
        self._end_all(
            tuple([(outcome.result.id, encode_outcome(outcome)) for outcome in completed]),
            Action.COMPLETE_OPERATION,
        )

    def fail_operation(self, id: OperationId, error: str) -> None:
        self._end(id, Action.FAIL_OPERATION, Failed(error))

    def cancel_operation(self, id: OperationId, reason: str | None = None) -> None:
        self._end(id, Action.CANCEL_OPERATION, Cancelled(reason))

    def mark_retired(self, id: OperationId) -> None:
        self._end(id, Action.MARK_RETIRED, Retired())

    def terminate_owner(self, reason: str) -> None:
        self._terminate(reason, None)

    def terminate_and_seal(self, reason: str) -> None:
        """End every operation as `terminate_owner` does, and then the epoch, under one hold of the
        writer lock: no operation is registered in between.

        A process that is killed between the two leaves an open epoch in which every operation has
        ended. The next runtime continues it, and the call may be repeated.
        """
        self._terminate(reason, None, seal=True)

    def terminate_where(
        self, ended: Callable[[int], bool], reason: str, *, dead: Iterable[int] = ()
    ) -> int:
        """End the live operations whose participant has ended, as `Terminated` and in one commit.
        `ended` takes a participant's key. Also remove the watchers of the `dead` participants.
        Returns how many operations it ended.

        It does not wait: it raises `WriterBusy` while another transition is in progress, and
        `StoreBehind` if it would have to wait for the store.
        """
        runners = {view.participant for view in self._table.live()}
        gone = tuple(runner for runner in runners if ended(runner))
        return self._terminate(reason, gone, dead=tuple(dead), waits=False)

    def _terminate(
        self,
        reason: str,
        participants: tuple[int, ...] | None,
        *,
        dead: tuple[int, ...] = (),
        seal: bool = False,
        waits: bool = True,
    ) -> int:
        encode_outcome(Terminated(reason))  # refuses a reason that is not valid
        room = self._reason_room(1)

        def terminate(waits_for_store: bool) -> int:
            outcome = encode_outcome(Terminated(cut(reason, room)))
            now_ms, now_ns = wall_ms(), time.monotonic_ns()
            return self._epoch.terminate(
                outcome, participants, dead, now_ms, now_ns, waits_for_store, seal, waits
            )

        while True:
            try:
                ended = self._with_store(terminate, waits)
                break
            except Refused as refused:
                why, _, together, *_ = refused.args
                if why != "too_large" or self._reason_room(together) >= room:
                    raise self._segment.refusal(refused) from None
                room = self._reason_room(together)
        if ended or seal:
            self._segment.waiters.notify()
        return ended

    def _reason_room(self, operations: int) -> int:
        """FEED-3: the longest reason with which so many operations can end in one commit.

        A configuration gives the feed room for two specs for each operation of a full table. A
        record without its detail and its reason takes little more than one spec.
        """
        return self._config.feed_bytes // operations - SPEC_LIMIT - RECORD_ROOM

    def _end(
        self, id: OperationId, action: Action, outcome: OperationTerminalOutcome
    ) -> CompletionSeq:
        if not isinstance(id, OperationId):
            require(OperationId, id, action, "id")
        return self._end_all(((id, encode_outcome(outcome)),), action)

    def _end_all(
        self, endings: tuple[tuple[OperationId, bytes], ...], action: Action
    ) -> CompletionSeq:
        """End them in one commit; returns the sequence of the first."""
        allowed = _ALLOWED[action]

        def end(waits_for_store: bool) -> CompletionSeq:
            now_ms, now_ns = wall_ms(), time.monotonic_ns()
            return self._epoch.end(endings, allowed, now_ms, now_ns, waits_for_store)

        try:
            first = self._with_store(end, True) if self._config.store_wait_ms else end(False)
        except Refused as refused:
            raise self._refusal(refused, [id for id, _ in endings], action) from None
        if endings:
            self._segment.waiters.notify()
        return first

    def _with_store(self, transition: Callable[[bool], int], waits: bool) -> int:
        """Make a transition. In an epoch whose writers wait for the store, wait first until a store
        has the entries that it would drop.

        DURABLE-1: a wait for a store does not hold the writer lock, so other transitions go on.
        """
        wait_ms = self._config.store_wait_ms if waits else 0
        deadline = time.monotonic() + wait_ms / 1000
        while True:
            try:
                return transition(self._config.store_wait_ms > 0)
            except Refused as refused:
                reason, *_, awaited = refused.args
                if reason != "store_behind":
                    raise
            try:
                self._feed.wait_durable(awaited, deadline - time.monotonic())
            except TimeoutError:
                raise self._store_behind(awaited, wait_ms) from None

    # --- refusals -----------------------------------------------------------------------------

    def _refusal(self, refused: Refused, ids: Sequence[OperationId], action: Action) -> Exception:
        """The error for a refused transition of these operations."""
        reason, _, index, _, _, actual = refused.args
        if reason == "too_large":
            together = f" of {len(ids)} operations together" if len(ids) > 1 else ""
            return PayloadTooLarge(
                actual, self._config.feed_bytes, what=f"the outcome{together}", setting="feed_bytes"
            )
        if reason not in ("not_found", "has_ended", "wrong_status", "twice"):
            return self._segment.refusal(refused)
        id = ids[index]
        if reason == "not_found":
            return NotFound(id)
        if reason == "wrong_status":
            return InvalidTransition(id, STATUSES[actual], action)
        if reason == "twice":
            _, target = TRANSITIONS[action]
            return InvalidTransition(id, target or OperationStatus.ABSENT, action)
        view = self._table.in_record(actual)
        return InvalidTransition(id, view.status, action) if view else NotFound(id)

    def _require(self, id: OperationId) -> OperationView:
        view = self._table.find(id)
        if view is None:
            raise NotFound(id)
        return view

    # --- reading, without a lock --------------------------------------------------------------

    @lazy
    def _reader(self) -> OperationReader:
        return OperationReader(self._segment, self._table, self._feed)

    def snapshot(self, id: OperationId) -> OperationLifecycleSnapshot | None:
        require(OperationId, id, "snapshot", "id")
        return self._reader.snapshot(id)

    def ended_by(self, entry: CompletionEntry) -> OperationView | None:
        """The operation that an entry of the feed ended; None if only its entry is still known."""
        return self._table.in_record(entry.seq, entry)

    def list_operations(self) -> list[OperationLifecycleSnapshot]:
        return self._reader.list()

    def active_count(self) -> int:
        """How many operations have not ended."""
        try:
            return self._epoch.active()
        except Refused as refused:
            raise self._segment.refusal(refused) from None

    def completion_feed(self) -> SegmentFeed:
        return self._feed

    def collect_completed(self) -> list[tuple[OperationId, OperationTerminalOutcome]]:
        while True:
            self._segment.require_writable()
            words = self._table.words()
            views = list(self._table.retained())
            try:
                self._epoch.collect(words.collected, words.watermark)
            except Refused as refused:
                if refused.args[0] != "changed":
                    raise self._segment.refusal(refused) from None
                continue
            return [
                (view.spec.id, view.entry.terminal_outcome)
                for view in views
                if view.entry is not None and view.entry.seq <= words.watermark
            ]

    # --- waiting ------------------------------------------------------------------------------

    @property
    def participant(self) -> int:
        """This process's participant key in the epoch, or 0."""
        return self._segment.participant

    def register_watcher(self, id: OperationId) -> OperationCompletionWatch:
        require(OperationId, id, "register_watcher", "id")
        if self._segment.read_only:  # an observer's watch is not counted
            return OperationCompletionWatch(self, self.locate(id))
        try:
            slot, birth, since = self._epoch.watch(id)
        except Refused as refused:
            if refused.args[0] != "has_ended":
                raise self._refusal(refused, (id,), Action.COMPLETE_OPERATION) from None
            return OperationCompletionWatch(self, self.locate(id))
        return OperationCompletionWatch(self, Pending(self, id, (slot, birth), since))

    def try_watch(self, places: Sequence[Place]) -> list[Watching] | None:
        """Watch those operations that have not ended. Returns None if it would have to wait for a
        transition, which an event loop must not do. An observer's watches are not counted."""
        if self._segment.read_only:
            return []
        try:
            counted = self._epoch.watch_each(tuple(places), True)
        except Refused as refused:
            if refused.args[0] == "busy":
                return None
            raise self._segment.refusal(refused) from None
        mine = self._segment.participant
        return [(place, mine) for place, watched in zip(places, counted, strict=True) if watched]

    def unwatch(self, watched: Iterable[Watching]) -> None:
        """Stop watching these. Never waits, and never fails: if the lock is busy, the next call
        stops these too, and after the epoch's end it is not needed."""
        if self._segment.read_only:
            return
        mine = self._segment.participant  # a forked child inherits its parent's watches
        self._unwatched.extend(watching for watching in watched if watching[1] == mine)
        over = []
        while self._unwatched:
            over.append(self._unwatched.popleft())
        places = tuple([place for place, participant in over if participant == mine])
        if not places:
            return
        try:
            self._epoch.watch_each(places, False)
        except Refused as refused:
            if refused.args[0] == "busy":
                self._unwatched.extend(over)
        except (ShmepochError, OSError):
            pass

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

    def locate(self, id: OperationId) -> Pending:
        """An operation to be waited for; `NotFound` if the registry does not hold it."""
        since = self._feed.watermark()  # first: so it is below the operation's end
        view = self._require(id)
        outcome = None if view.entry is None else view.entry.terminal_outcome
        return Pending(self, id, (view.slot, view.birth), since, outcome)

    def outcome_at(
        self, id: OperationId, place: Place, since: CompletionSeq
    ) -> OperationTerminalOutcome | None:
        """The outcome of the operation that was registered in a place, or None while it has not
        ended.

        `since` is a watermark at which it had not ended. Raises `OutcomeDropped` if retention has
        dropped its entry and did not keep the outcome.
        """
        slot, birth = place
        try:
            data = self._epoch.outcome(slot, birth, since)
        except Refused as refused:
            if refused.args[0] == "dropped":
                raise OutcomeDropped(id) from None
            raise self._segment.refusal(refused) from None
        if data is None:
            return None
        return self._table.decode(f"slot[{slot}].outcome", decode_outcome, data)

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
        """The result of `capture_persistence_snapshot`, and the batch that its entries came in."""
        return self._reader.capture(epoch_id, cursor_state, after_seq)

    def restore(
        self, snapshot: PersistedOpsSnapshot, *, skip: int = 0, unfinished: bool = False
    ) -> None:
        """Continue a stored epoch in this fresh one, which is not used yet.

        It skips `skip` sequences. With `unfinished`, operations that had not ended are registered
        as running, and the caller ends them; without it, they are dropped. Raises
        `RecoveryNeedsRoom` and `RecordInvalid`.
        """
        require_room(snapshot, self._config, unfinished=unfinished)
        restore_completions(self._segment, snapshot, skip=skip)
        if not unfinished:
            return
        for operation, spec in unfinished_operations(snapshot):
            self._register([encode_spec(spec, self._segment.session_id)], operation.created_at_ms)
            if operation.started_at_ms is not None:
                self._epoch.start((spec.id,), operation.started_at_ms)
            view = self._require(spec.id)
            statuses = 1 << _PROVISIONING | 1 << _RUNNING
            detail = encode_detail(Detail.of(operation))
            self._epoch.change(spec.id, statuses, _RUNNING, view.word, detail)

    def __repr__(self) -> str:
        return (
            f"RuntimeOpsLifecycleRegistry(epoch_id={self._segment.epoch_id!r}, "
            f"active={self._epoch.active()}, watermark={self._feed.watermark()})"
        )

    # --- audit --------------------------------------------------------------------------------

    def check(self) -> tuple[CursorAhead, ...]:
        """Verify every invariant of the epoch's memory. Returns warnings: cursors ahead of the
        feed.

        Takes the writer lock for a copy, and repairs first, as every transition does. Raises
        `SegmentCorrupted` that names the damaged field.
        """
        try:
            segment = self._segment.copy()
        except Refused as refused:
            raise self._segment.refusal(refused) from None
        cursors = EpochCursorState(segment).snapshot()
        watermark = SegmentFeed(segment).watermark()
        Audit(segment).check()
        return tuple(
            CursorAhead(self._segment.epoch_id, cursor, position, watermark)
            for cursor, position in msgspec.structs.asdict(cursors).items()
            if position > watermark
        )


def _completed(result: OperationResult) -> Completed:
    if not isinstance(result, OperationResult):
        raise RecordInvalid("OperationResult", f"it is {described(result)}")
    return Completed(result)
