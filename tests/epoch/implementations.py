"""The implementations of an epoch's protocols that one contract suite runs over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Final, TypeAlias, cast

from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.cursors import EpochCursorState
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.ids import SessionId
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import Segment, SharedSegment
from shmepoch.runtime.adapter import RuntimeSessionAdapter


@dataclass
class Epoch:
    """One epoch under test."""

    registry: RuntimeOpsLifecycleRegistry
    cursors: EpochCursorState
    segment: Segment

    def seal(self) -> None:
        self.segment.seal()

    def shared_segment(self) -> SharedSegment:
        assert isinstance(self.segment, SharedSegment)
        return self.segment


#: An implementation: from a namespace and a configuration to an epoch that lives for a `with`.
Implementation: TypeAlias = Callable[
    [str, OpsLifecycleConfig | None], AbstractContextManager[Epoch]
]


@contextmanager
def private(namespace: str, config: OpsLifecycleConfig | None) -> Iterator[Epoch]:
    """Private memory of this process."""
    bindings = SessionRuntimeBindings.standalone(SessionId.new(), config)
    yield Epoch(bindings.ops_lifecycle, bindings.cursor_state, bindings._segment)


@contextmanager
def shared(namespace: str, config: OpsLifecycleConfig | None) -> Iterator[Epoch]:
    """A segment, through the bindings that its runtime prepared."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        segment = bindings.shared_segment()
        try:
            yield Epoch(bindings.ops_lifecycle, bindings.cursor_state, segment)
        finally:
            segment.unlink()


@contextmanager
def attached_twice(namespace: str, config: OpsLifecycleConfig | None) -> Iterator[Epoch]:
    """A segment with two attachments that take turns: as good as two processes."""
    with shared(namespace, config) as first:
        segment = SharedSegment.attach(namespace, first.segment.session_id)
        segment.join(Role.WORKER)
        try:
            turns = _TakingTurns(first.registry, RuntimeOpsLifecycleRegistry(segment))
            yield Epoch(
                cast(RuntimeOpsLifecycleRegistry, turns), EpochCursorState(segment), segment
            )
        finally:
            segment.close()


class _TakingTurns:
    """Two registry handles of one epoch: each call goes to the other one than the call before.

    A barrier belongs to one handle, so barriers stay with the second.
    """

    def __init__(self, *handles: RuntimeOpsLifecycleRegistry) -> None:
        self._handles = handles
        self._turn = cycle(handles)

    def __getattr__(self, name: str) -> Any:
        if name in ("wait_all", "all_ended"):
            return getattr(self._handles[-1], name)
        return getattr(next(self._turn), name)


IMPLEMENTATIONS: Final[dict[str, Implementation]] = {
    "private": private,
    "shared": shared,
    "attached-twice": attached_twice,
}
