"""Waiting for operations to end: watchers, and barriers over several operations."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from shmepoch.epoch.operations import OperationTerminalOutcome, WaitAllResult, WaitAllSatisfied
from shmepoch.errors import DuplicateWaitOperation, WaitAlreadyActive
from shmepoch.ids import OperationId, RunId, WaitRequestId
from shmepoch.memory.waiting import deadline_after

if TYPE_CHECKING:
    from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
    from shmepoch.epoch.table import Slot


class _Pending:
    """An operation that had not ended when the feed stood at `since`."""

    def __init__(self, registry: RuntimeOpsLifecycleRegistry, slot: Slot, since: int) -> None:
        self._registry = registry
        self._feed = registry.completion_feed()
        self._slot = slot
        self._since = since

    def wait(self, deadline: float | None) -> OperationTerminalOutcome:
        while True:
            watermark = self._feed.watermark()  # before the look: an end after it raises this
            outcome = self._registry.outcome_at(self._slot, self._since)
            if outcome is not None:
                return outcome
            self._feed.wait_for_advance(watermark, _remaining(deadline))

    async def wait_async(self) -> OperationTerminalOutcome:
        while True:
            watermark = self._feed.watermark()
            outcome = self._registry.outcome_at(self._slot, self._since)
            if outcome is not None:
                return outcome
            await self._feed.advanced(watermark)


class OperationCompletionWatch:
    """One watcher of an operation; every watcher of it gets the same outcome.

    It counts as a watcher until it is resolved or closed, or its process ends.
    """

    def __init__(
        self,
        registry: RuntimeOpsLifecycleRegistry,
        id: OperationId,
        slot: Slot,
        since: int,
        outcome: OperationTerminalOutcome | None,
    ) -> None:
        self.id = id
        self._registry = registry
        self._slot = slot
        self._pending = _Pending(registry, slot, since)
        self._outcome = outcome
        self._counted = outcome is None

    def wait(self, timeout: float | None = None) -> OperationTerminalOutcome:
        """Block until the operation has ended; its outcome.

        Raises `TimeoutError` after `timeout` seconds, `EpochSealed` when the epoch ends, and
        `NotFound` if the outcome was dropped from the feed before this looked.
        """
        deadline = deadline_after(timeout)
        if self._outcome is None:
            self._resolve(self._pending.wait(deadline))
        assert self._outcome is not None
        return self._outcome

    def __await__(self) -> Generator[object, None, OperationTerminalOutcome]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> OperationTerminalOutcome:
        if self._outcome is None:
            self._resolve(await self._pending.wait_async())
        assert self._outcome is not None
        return self._outcome

    def _resolve(self, outcome: OperationTerminalOutcome) -> None:
        self._outcome = outcome
        self._counted = False  # nobody counts the watchers of an operation that has ended

    def close(self) -> None:
        """Stop watching."""
        if self._counted:
            self._counted = False
            self._registry.unregister_watcher(self._slot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class WaitAll:
    """The one barrier of a registry handle, which it does not hold: a handle that is let go of
    goes at once, with the mapping that it keeps."""

    def __init__(self) -> None:
        #: By process: in a forked child, the parent's barrier is of a thread that does not exist.
        self._active: dict[int, object] = {}

    def wait(
        self,
        registry: RuntimeOpsLifecycleRegistry,
        run_id: RunId,
        ids: Sequence[OperationId],
        timeout: float | None,
    ) -> WaitAllResult:
        deadline = deadline_after(timeout)
        with self._one_at_a_time():
            outcomes = [pending.wait(deadline) for pending in _locate(registry, ids)]
        return _satisfied(run_id, ids, outcomes)

    async def wait_async(
        self, registry: RuntimeOpsLifecycleRegistry, run_id: RunId, ids: Sequence[OperationId]
    ) -> WaitAllResult:
        with self._one_at_a_time():
            outcomes = [await pending.wait_async() for pending in _locate(registry, ids)]
        return _satisfied(run_id, ids, outcomes)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        pid, mine = os.getpid(), object()
        try:
            if self._active.setdefault(pid, mine) is not mine:
                raise WaitAlreadyActive
            yield
        finally:
            if self._active.get(pid) is mine:
                del self._active[pid]


def _locate(registry: RuntimeOpsLifecycleRegistry, ids: Sequence[OperationId]) -> list[_Pending]:
    seen: set[OperationId] = set()
    for id in ids:
        if id in seen:
            raise DuplicateWaitOperation(id)
        seen.add(id)
    # One that has ended already may lie anywhere in the feed should its slot pass on meanwhile.
    return [_Pending(registry, registry.locate(id), 0) for id in ids]


def _satisfied(
    run_id: RunId, ids: Sequence[OperationId], outcomes: list[OperationTerminalOutcome]
) -> WaitAllResult:
    return WaitAllResult(
        outcomes=tuple(zip(ids, outcomes, strict=True)),
        satisfied=WaitAllSatisfied(
            wait_request_id=WaitRequestId.new(), run_id=run_id, operation_ids=tuple(ids)
        ),
    )


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
