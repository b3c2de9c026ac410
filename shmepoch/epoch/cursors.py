"""Cursors: how far each consumer of an epoch's feed has come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, Self, runtime_checkable

from shmepoch.epoch.codec import Record
from shmepoch.lazy import lazy
from shmepoch.memory import layout as at
from shmepoch.memory._native import Cell
from shmepoch.memory.layout import Layout
from shmepoch.memory.segment import Segment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class EpochCursorSnapshot(Record, frozen=True, gc=False):
    """The three cursors as they stood at one instant.

    A snapshot may be stale when it is used; that repeats a notice and never loses one.
    """

    agent_applied_cursor: int = 0
    runtime_observed_seq: int = 0
    runtime_last_injected_seq: int = 0


class CursorCell(Protocol):
    """One cursor: an unsigned 64-bit position that never moves backwards."""

    def load(self) -> int:
        """The position."""
        ...

    def advance(self, value: int, /) -> bool:
        """CURSOR-1: become the larger of the position and `value`; whether this call moved it.

        Lock-free. Raises `OverflowError` outside 0..2**64-1, `TypeError` for what is no integer,
        and `EpochSealed`.
        """
        ...

    def compare_and_swap(self, expected: int, new: int, /) -> bool:
        """Become `new` if the position is `expected`; whether it was.

        Raises `ValueError` for a `new` below `expected`, and what `advance` raises.
        """
        ...


@runtime_checkable
class CursorState(Protocol):
    """The cursors of one epoch, wherever they are kept."""

    @property
    def agent_applied_cursor(self) -> CursorCell:
        """Advanced by the agent boundary once the notices up to it are in the agent's context."""
        ...

    @property
    def runtime_observed_seq(self) -> CursorCell:
        """Advanced by the runtime loop once it has dealt with a batch of the feed."""
        ...

    @property
    def runtime_last_injected_seq(self) -> CursorCell:
        """Advanced by the runtime loop once a continuation was accepted."""
        ...

    def snapshot(self) -> EpochCursorSnapshot:
        """All three as they stood at one instant."""
        ...


class EpochCursorState:
    """The three cursors of an epoch, as lock-free words in its memory."""

    def __init__(self, segment: Segment) -> None:
        memory = segment.memory

        def cell(index: int) -> Cell:
            return Cell(memory, Layout.cursor(index), at.STATE_AT, segment.closed_error)

        self._memory: Final = memory
        self.agent_applied_cursor: Final = cell(0)
        self.runtime_observed_seq: Final = cell(1)
        self.runtime_last_injected_seq: Final = cell(2)
        #: All three as they stood at one instant; in one native call, which makes the record, too.
        self.snapshot: Final = memory.snapshots(
            at.CURSORS_AT, at.CURSORS, at.LINE, EpochCursorSnapshot
        ).take

    @lazy
    def values(self) -> NDArray[np.uint64]:
        """The cursors as a read-only array, for monitors.

        Each element is whole, but they are not of one instant; `snapshot` is.
        """
        import numpy as np  # half the import time of the whole library, and only monitors need it

        return np.ndarray(
            shape=(at.CURSORS,),
            dtype=np.uint64,
            buffer=memoryview(self._memory),
            offset=at.CURSORS_AT,
            strides=(at.LINE,),
        )

    @classmethod
    def new(cls) -> Self:
        """Fresh cursors, all zero, in private memory of their own."""
        return cls(Segment.private(None))

    @classmethod
    def from_recovered(
        cls, agent_applied_cursor: int, runtime_observed_seq: int, runtime_last_injected_seq: int
    ) -> Self:
        """Cursors at recovered positions, in private memory of their own."""
        self = cls.new()
        self.advance_all(
            EpochCursorSnapshot(
                agent_applied_cursor=agent_applied_cursor,
                runtime_observed_seq=runtime_observed_seq,
                runtime_last_injected_seq=runtime_last_injected_seq,
            )
        )
        return self

    def advance_all(self, positions: EpochCursorSnapshot) -> None:
        """Advance every cursor to at least its recovered position."""
        self.agent_applied_cursor.advance(positions.agent_applied_cursor)
        self.runtime_observed_seq.advance(positions.runtime_observed_seq)
        self.runtime_last_injected_seq.advance(positions.runtime_last_injected_seq)

    def __repr__(self) -> str:
        now = self.snapshot()
        return (
            f"EpochCursorState(agent_applied_cursor={now.agent_applied_cursor}, "
            f"runtime_observed_seq={now.runtime_observed_seq}, "
            f"runtime_last_injected_seq={now.runtime_last_injected_seq})"
        )
