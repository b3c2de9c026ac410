"""The agent boundary: what the agent has to be told before its next model call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, TypeAlias

from shmepoch.epoch.bindings import History, SessionRuntimeBindings
from shmepoch.epoch.completions import CompletionEntry, CompletionFeedGap, CompletionSeq
from shmepoch.epoch.cursors import CursorCell
from shmepoch.epoch.operations import OperationKind
from shmepoch.epoch.persisted import SkippedRange

Notice: TypeAlias = CompletionFeedGap | CompletionEntry
"""What an agent is told: completions, and before them what cannot be had any more."""


class Drain:
    """The notices of one turn. As a context manager it commits on a clean exit; after an exception
    the cursor is where it was, and the same notices come again."""

    def __init__(
        self, cursor: CursorCell, notices: Sequence[Notice], watermark: CompletionSeq
    ) -> None:
        self._cursor: Final = cursor
        self.notices: Final = tuple(notices)
        self.watermark: Final = watermark

    def commit(self) -> None:
        """The notices are in the agent's context: move the cursor past them, and past the entries
        of other kinds between them."""
        self._cursor.advance(self.watermark)

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
        if kind is None:
            self.commit()


class AgentBoundary:
    """One agent's end of an epoch. Made by `AgentFactory.build`."""

    def __init__(self, bindings: SessionRuntimeBindings, history: History | None = None) -> None:
        self.bindings: Final = bindings
        self.session_id: Final = bindings.session_id
        self._cursor = bindings.cursor_state.agent_applied_cursor
        self._feed = bindings.ops_lifecycle.completion_feed()
        self._history = history or bindings.history

    def drain(self) -> Drain:
        """What the agent has not been told: the `background_tool_op` completions since its cursor.

        BOUNDARY-1: a gap is never silent. What the feed has dropped is read from the history, and
        what that does not have either is reported in front of the notices.
        """
        applied = self._cursor.load()
        batch = self._feed.list_since(applied)
        gap = batch.gap_after(applied)
        entries: list[CompletionEntry] = []
        skipped = [self.bindings.skipped]
        notices: list[Notice] = []
        if gap is not None:
            if self._history is not None:
                epoch_id = self.bindings.epoch_id
                entries += self._history.list_entries(epoch_id, gap.after_seq, gap.dropped_through)
                skipped += self._history.list_skipped(epoch_id)
            notices += _missing(gap, entries, skipped)
        entries += batch.entries
        notices += (entry for entry in entries if entry.kind is OperationKind.BACKGROUND_TOOL_OP)
        return Drain(self._cursor, notices, batch.watermark)


def _missing(
    gap: CompletionFeedGap, found: Sequence[CompletionEntry], skipped: Sequence[SkippedRange]
) -> Iterator[Notice]:
    """The parts of `gap` that no found entry fills, and that no recovery left out."""
    after, through = gap.after_seq, gap.dropped_through
    for begin, end in sorted([*((e.seq - 1, e.seq) for e in found), *skipped, (through, through)]):
        if after < min(begin, through):
            yield CompletionFeedGap(after, min(begin, through))
        after = max(after, end)
