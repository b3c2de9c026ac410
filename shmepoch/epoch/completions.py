"""Completions: the entries of the feed, and the protocol of every feed."""

from __future__ import annotations

import operator
from datetime import datetime
from typing import Annotated, Protocol, TypeAlias, runtime_checkable

from msgspec import Meta

from shmepoch.epoch.codec import Record
from shmepoch.epoch.operations import (
    Completed,
    Count,
    OperationKind,
    OperationTerminalOutcome,
    status_of,
)
from shmepoch.ids import OperationId
from shmepoch.memory.clock import moment

CompletionSeq: TypeAlias = int
"""A position in the completion feed: unsigned 64 bit, the first completion is 1."""


class CompletionEntry(Record, kw_only=True, frozen=True):
    """One operation's end; `(epoch_id, seq)` recognises a duplicate."""

    seq: Annotated[CompletionSeq, Meta(ge=1)]
    operation_id: OperationId
    kind: OperationKind
    display_name: str
    terminal_outcome: OperationTerminalOutcome
    completed_at_ms: Count

    @property
    def completed_at(self) -> datetime:
        """When it ended, in UTC; `OverflowError` for no year of a calendar."""
        return moment(self.completed_at_ms)

    @property
    def text(self) -> str:
        """A sentence for an agent: the name, how it ended, and what there is to read of that."""
        outcome = self.terminal_outcome
        status = str(status_of(outcome))
        if isinstance(outcome, Completed) and not outcome.ok:
            status = "completed with an error"
        return f"{self.display_name} {status}" + (f": {outcome.text}" if outcome.text else "")


class CompletionFeedGap(Record, frozen=True):
    """Completions that retention dropped before this consumer read them.

    It stands for every sequence above `after_seq` up to and including `dropped_through`.
    """

    after_seq: CompletionSeq
    dropped_through: CompletionSeq

    @property
    def missing(self) -> int:
        """How many completions are lost to this consumer."""
        return self.dropped_through - self.after_seq

    @property
    def text(self) -> str:
        """A sentence for an agent."""
        return f"completions {self.after_seq + 1} to {self.dropped_through} cannot be had any more"


class CompletionBatch(Record, kw_only=True, frozen=True):
    """The retained entries above a position, and the feed's state at the same instant.

    FEED-1: no entry is above `watermark`. Every entry between `dropped_through` and `watermark` is
    there.
    """

    entries: tuple[CompletionEntry, ...]
    watermark: CompletionSeq
    dropped_through: CompletionSeq = 0

    def gap_after(self, after_seq: CompletionSeq) -> CompletionFeedGap | None:
        """The gap for a consumer at `after_seq`: completions that it can no longer read. None if
        there is no gap."""
        after_seq = operator.index(after_seq)
        if after_seq < self.dropped_through:
            return CompletionFeedGap(after_seq, self.dropped_through)
        return None


@runtime_checkable
class CompletionFeed(Protocol):
    """An epoch's append-only sequence of terminal outcomes; reading it takes no lock."""

    def watermark(self) -> CompletionSeq:
        """The highest committed sequence; 0 before the first."""
        ...

    def list_since(self, after_seq: CompletionSeq) -> CompletionBatch:
        """The retained entries with `seq > after_seq`, in order, with the watermark."""
        ...

    def wait_for_advance(
        self, after_seq: CompletionSeq, timeout: float | None = None
    ) -> CompletionSeq:
        """Block until the watermark is above `after_seq` and return it.

        Raises `TimeoutError` after `timeout` seconds and `EpochSealed` when the epoch ends.
        """
        ...

    async def advanced(self, after_seq: CompletionSeq) -> CompletionSeq:
        """Like `wait_for_advance`, without blocking the event loop."""
        ...

    def durable_through(self) -> CompletionSeq:
        """Every completion up to this one is in a store, unless it was dropped before."""
        ...

    def wait_durable(self, seq: CompletionSeq, timeout: float | None = None) -> None:
        """Block until a store has every completion up to `seq`.

        Raises `TimeoutError` after `timeout` seconds, always if nothing persists the epoch, and
        `EpochSealed` when the epoch ends before.
        """
        ...

    async def durable(self, seq: CompletionSeq) -> None:
        """Like `wait_durable`, without blocking the event loop."""
        ...
