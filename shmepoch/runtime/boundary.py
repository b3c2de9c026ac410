"""The agent boundary: the notices for the agent's next model call."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Self, TypeAlias

from shmepoch._native import AGENT_BYTE
from shmepoch.arguments import require
from shmepoch.epoch.bindings import History, SessionRuntimeBindings
from shmepoch.epoch.completions import CompletionEntry, CompletionFeedGap, CompletionSeq
from shmepoch.epoch.operations import OperationKind
from shmepoch.epoch.persisted import SkippedRange
from shmepoch.errors import AgentAlreadyActive, BoundaryClosed, EpochSealed
from shmepoch.events import Event, about
from shmepoch.memory.participants import Role
from shmepoch.runtime.ahead import CursorsAhead
from shmepoch.timeouts import deadline_after

_log = logging.getLogger(__name__)

Notice: TypeAlias = CompletionFeedGap | CompletionEntry
"""A notice for the agent: a completion, or before these a gap of completions that are lost."""


class Drain:
    """The notices of one turn. As a context manager it commits on a clean exit. After an exception
    the cursor does not move, and the same notices come again."""

    def __init__(
        self, boundary: AgentBoundary, notices: Sequence[Notice], watermark: CompletionSeq
    ) -> None:
        self._session_id: Final = boundary.session_id
        self._boundary: Final = weakref.ref(boundary)
        #: Keeps the boundary, and so the agent's claim, during the turn.
        self._turn: AgentBoundary | None = boundary
        self.notices: Final = tuple(notices)
        self.watermark: Final = watermark

    def commit(self) -> None:
        """Move the cursor past the notices, which are in the agent's context now, and past the
        entries of other kinds between them.

        Raises `EpochSealed`, and `BoundaryClosed` after the boundary was closed: then the next
        agent gets the notices again.
        """
        boundary = self._boundary()
        if boundary is None:
            raise BoundaryClosed(self._session_id)
        boundary.apply(self.watermark)

    def __iter__(self) -> Iterator[Notice]:
        return iter(self.notices)

    def __len__(self) -> int:
        return len(self.notices)

    def __enter__(self) -> Drain:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self._turn = None


class AgentBoundary:
    """One agent's access to an epoch. Made by `AgentFactory.build`.

    AGENT-1: a session has one live agent, or several that all agreed to share it. A boundary is the
    agent until it is closed or collected, its bindings are closed, or its process ends. In a forked
    child it is not the agent.
    """

    def __init__(
        self,
        bindings: SessionRuntimeBindings,
        history: History | None = None,
        *,
        sharing: bool = False,
    ) -> None:
        require(SessionRuntimeBindings, bindings, "AgentBoundary", "bindings")
        self.bindings: Final = bindings
        self.session_id: Final = bindings.session_id
        self._cursor = bindings.cursor_state.agent_applied_cursor
        self._feed = bindings.ops_lifecycle.completion_feed()
        self._history = history or bindings.history
        self._ahead = CursorsAhead(bindings)
        #: How far the gaps reach that were logged: a drain that is not committed tells them again.
        self._logged_gap: CompletionSeq = 0
        claim = bindings.claim(AGENT_BYTE, shared=sharing)
        if claim is None:
            pid = bindings.claimed_by(AGENT_BYTE, Role.AGENT)
            raise AgentAlreadyActive(bindings.session_id, pid)
        self._claim: Final = claim
        # A runtime that hosts its agent keeps its role.
        if bindings.role is not Role.RUNTIME:
            bindings.announce(Role.AGENT)

    def close(self) -> None:
        """Stop being the agent, so that another can be built. The bindings stay open."""
        if self._claim.held:
            self._claim.release()
            if self.bindings.role is Role.AGENT and not self.bindings.has_claimed(AGENT_BYTE):
                self.bindings.announce(Role.WORKER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        agent = f"applied={self._cursor.load()}" if self._claim.held else "closed"
        return f"AgentBoundary(session_id={self.session_id!r}, {agent})"

    def apply(self, watermark: CompletionSeq) -> None:
        """Move the agent's cursor to `watermark`; for `Drain.commit`."""
        self._require_agent()
        self._cursor.advance(watermark)

    def _require_agent(self) -> None:
        if not self._claim.held:
            if self.bindings.sealed:
                raise EpochSealed(self.bindings.epoch_id)
            raise BoundaryClosed(self.session_id)

    def wait(self, timeout: float | None = None) -> Drain:
        """Block until there are notices, and drain them.

        Raises `TimeoutError` after `timeout` seconds, what `drain` does, and `EpochSealed` or
        `EpochGone` when the epoch ends.
        """
        deadline = deadline_after(timeout, "wait")
        drained = self.drain()
        while not drained:
            left = None if deadline is None else deadline - time.monotonic()
            self._feed.wait_for_advance(drained.watermark, left)
            drained = self.drain()
        return drained

    async def notified(self) -> Drain:
        """Like `wait`, without blocking the event loop."""
        drained = self.drain()
        while not drained:
            await self._feed.advanced(drained.watermark)
            drained = self.drain()
        return drained

    def drain(self) -> Drain:
        """The new notices for the agent: the `background_tool_op` completions since its cursor.

        BOUNDARY-1: a gap is never silent. Completions that the feed has dropped are read from the
        history. Those that the history does not have are reported as gaps, in front of the notices.

        Raises `EpochSealed` or `BoundaryClosed` after this has stopped being the agent.
        """
        self._require_agent()
        applied = self._cursor.load()
        batch = self._feed.list_since(applied)
        self._ahead.check("agent_applied_cursor", applied, batch.watermark)
        gap = batch.gap_after(applied)
        entries: list[CompletionEntry] = []
        skipped = [self.bindings.skipped]
        notices: list[Notice] = []
        if gap is not None:
            if self._history is not None:
                epoch_id = self.bindings.epoch_id
                entries += self._history.list_entries(epoch_id, gap.after_seq, gap.dropped_through)
                skipped += self._history.list_skipped(epoch_id)
            missing = list(_missing(gap, entries, skipped))
            self._log_gaps(missing)
            notices += missing
        entries += batch.entries
        notices += (entry for entry in entries if entry.kind is OperationKind.BACKGROUND_TOOL_OP)
        return Drain(self, notices, batch.watermark)

    def _log_gaps(self, gaps: Sequence[CompletionFeedGap]) -> None:
        if gaps and gaps[-1].dropped_through > self._logged_gap:
            through = self._logged_gap = gaps[-1].dropped_through
            count = sum(gap.missing for gap in gaps)
            _log.warning(
                "session %s: %d completions through %d were dropped before its agent was told of "
                "them; it is told of a gap",
                self.session_id,
                count,
                through,
                extra=about(
                    Event.AGENT_GAP,
                    session=self.session_id,
                    epoch=self.bindings.epoch_id,
                    seq=through,
                    completions=count,
                ),
            )


def _missing(
    gap: CompletionFeedGap, found: Sequence[CompletionEntry], skipped: Sequence[SkippedRange]
) -> Iterator[CompletionFeedGap]:
    """The parts of `gap` without the found entries and the sequences that recoveries skipped."""
    after, through = gap.after_seq, gap.dropped_through
    for begin, end in sorted([*((e.seq - 1, e.seq) for e in found), *skipped, (through, through)]):
        if after < min(begin, through):
            yield CompletionFeedGap(after, min(begin, through))
        after = max(after, end)
