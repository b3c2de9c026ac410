"""Cursors: the position of each consumer of an epoch's feed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Final, Protocol, Self, TypeAlias, runtime_checkable

from msgspec import Meta, Struct
from msgspec.structs import asdict, astuple

from shmepoch import _native as at
from shmepoch._native import Memory
from shmepoch.arguments import require, require_each
from shmepoch.epoch.codec import Record, decode_json
from shmepoch.lazy import lazy
from shmepoch.memory.layout import Layout
from shmepoch.memory.segment import Segment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: CURSOR-2: the highest position of a cursor from which an epoch can be continued. A recovered feed
#: begins above every cursor, and needs room there.
LAST_CONTINUABLE: Final = 2**62

Position: TypeAlias = Annotated[int, Meta(ge=0)]
"""A sequence of the feed in a record; 0 is before the first."""


class EpochCursorSnapshot(Record, frozen=True, gc=False):
    """The three cursors as they stood at one instant.

    A snapshot may be stale when it is used: then a notice is repeated, and never lost. Its JSON has
    all three, each from 0 to 2**64-1.
    """

    agent_applied_cursor: Position = 0
    runtime_observed_seq: Position = 0
    runtime_last_injected_seq: Position = 0

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        decode_json(WrittenCursors, data, cls)
        return decode_json(cls, data)

    def continuable(self, last: int) -> EpochCursorSnapshot:
        """These positions, with `last`, the epoch's last sequence, in place of positions from which
        it cannot be continued: those above both 2**62 and `last`."""
        most = max(LAST_CONTINUABLE, last)
        if max(astuple(self)) <= most:
            return self
        return EpochCursorSnapshot(
            *(position if position <= most else last for position in astuple(self))
        )


class WrittenCursors(Struct):
    """The required fields in the JSON of an `EpochCursorSnapshot`: a missing field must not be read
    as position 0."""

    agent_applied_cursor: Position
    runtime_observed_seq: Position
    runtime_last_injected_seq: Position

    def __post_init__(self) -> None:
        for name, position in asdict(self).items():
            if position >= 2**64:
                raise ValueError(f"{name} is {position}, and a position is 0 to 2**64-1")


class CursorCell(Protocol):
    """One cursor: an unsigned 64-bit position that never moves backwards."""

    def load(self) -> int:
        """The position."""
        ...

    def advance(self, value: int, /) -> bool:
        """CURSOR-1: become the larger of the position and `value`; whether this call moved it.

        Lock-free. A position above the feed's watermark is accepted: the consumer then misses every
        completion up to there. An epoch cannot be continued from a position above 2**62: after a
        reboot such a position counts as the last sequence. Raises `OverflowError` outside
        0..2**64-1, `TypeError` for a value that is not an integer, and `EpochSealed`.
        """
        ...

    def compare_and_swap(self, expected: int, new: int, /) -> bool:
        """Become `new` if the position is `expected`; whether it was.

        Raises `ValueError` for a `new` below `expected`, and the errors of `advance`.
        """
        ...


@runtime_checkable
class CursorState(Protocol):
    """The cursors of one epoch, in any kind of memory."""

    @property
    def agent_applied_cursor(self) -> CursorCell:
        """Advanced by the agent boundary after the notices up to it are in the agent's context."""
        ...

    @property
    def runtime_observed_seq(self) -> CursorCell:
        """Advanced by the runtime loop after it has handled a batch of the feed."""
        ...

    @property
    def runtime_last_injected_seq(self) -> CursorCell:
        """Advanced by the runtime loop after a continuation was accepted."""
        ...

    def snapshot(self) -> EpochCursorSnapshot:
        """All three as they stood at one instant."""
        ...


class EpochCursorState:
    """The three cursors of an epoch, as lock-free words in its memory."""

    _memory: Memory
    agent_applied_cursor: CursorCell
    runtime_observed_seq: CursorCell
    runtime_last_injected_seq: CursorCell
    #: All three as they stood at one instant. One native call, which also makes the record.
    snapshot: Callable[[], EpochCursorSnapshot]

    def __init__(self, segment: Segment | None = None) -> None:
        """The cursors of `segment`; without it, fresh cursors, all zero, in private memory."""
        if not isinstance(segment, Segment):
            require(Segment | None, segment, "EpochCursorState", "segment")
            segment = Segment.private(None)
        memory = segment.memory

        def cell(index: int) -> CursorCell:
            return segment.cell(Layout.cursor(index))

        vars(self).update(
            _memory=memory,
            agent_applied_cursor=cell(0),
            runtime_observed_seq=cell(1),
            runtime_last_injected_seq=cell(2),
            snapshot=memory.snapshots(at.CURSORS_AT, at.CURSORS, at.LINE, EpochCursorSnapshot).take,
        )

    def __setattr__(self, name: str, value: object) -> None:
        # An assignment would change this object alone, and not the epoch's cursor.
        raise AttributeError(
            f"{name} of an EpochCursorState cannot be assigned to; move a cursor with its "
            "advance(position)"
        )

    @lazy
    def values(self) -> NDArray[np.uint64]:
        """The live words of the three cursors as a read-only array, for monitors.

        It follows the cursors, and keeps their memory as long as the array exists, also after the
        process left the epoch. Each element is whole, but the three may be of different instants,
        unlike those of `snapshot`.
        """
        import numpy as np  # half the import time of the whole library, and only monitors need it

        return np.ndarray(
            shape=(at.CURSORS,),
            dtype=np.uint64,
            buffer=memoryview(self._memory),
            offset=at.CURSORS_AT,
            strides=(at.LINE,),
        )

    @staticmethod
    def stacked(states: Iterable[EpochCursorState]) -> NDArray[np.uint64]:
        """The cursors of many epochs as they stand now, for dashboards: an array of a row for each
        epoch and a column for each cursor, in the order of `EpochCursorSnapshot`.

        Each row is of one instant. Unlike `values`, it is a copy. Raises `ArgumentInvalid`.
        """
        import numpy as np

        listed = require_each(EpochCursorState, states, "EpochCursorState.stacked", "states")
        rows = [astuple(state.snapshot()) for state in listed]
        return np.array(rows, dtype=np.uint64).reshape(len(rows), at.CURSORS)

    @classmethod
    def new(cls) -> Self:
        """Fresh cursors, all zero, in private memory of their own."""
        return cls()

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
        require(EpochCursorSnapshot, positions, "EpochCursorState.advance_all", "positions")
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
