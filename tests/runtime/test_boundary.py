"""The agent boundary: the notices of the agent, and the moves of its cursor."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Sequence

import pytest

from shmepoch import (
    AgentBoundary,
    AgentFactory,
    CompletionEntry,
    CompletionFeedGap,
    CompletionSeq,
    Drain,
    EpochCursorSnapshot,
    EpochSealed,
    OperationKind,
    OpsLifecycleConfig,
    PersistedOpsSnapshot,
    RuntimeEpochId,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
)
from shmepoch.epoch.persisted import SkippedRange
from tests.runtime.completions import CHILD, TOOL, drop_through, end

SMALL = OpsLifecycleConfig(max_completed=2, max_operations=4, feed_bytes=8 * 1024)


class Kept:
    """A history that has some of the entries."""

    def __init__(
        self, entries: Sequence[CompletionEntry] = (), skipped: Sequence[SkippedRange] = ()
    ) -> None:
        self.entries = list(entries)
        self.skipped = skipped
        self.asked: list[tuple[RuntimeEpochId, int, int]] = []

    def list_entries(
        self, epoch_id: RuntimeEpochId, after_seq: CompletionSeq, through_seq: CompletionSeq
    ) -> Sequence[CompletionEntry]:
        self.asked.append((epoch_id, after_seq, through_seq))
        return [entry for entry in self.entries if after_seq < entry.seq <= through_seq]

    def list_skipped(self, epoch_id: RuntimeEpochId) -> Sequence[SkippedRange]:
        return self.skipped


def told(drain: Drain) -> list[int | tuple[int, int]]:
    """The notices: sequences of completions, and the bounds of gaps."""
    return [
        (notice.after_seq, notice.dropped_through)
        if isinstance(notice, CompletionFeedGap)
        else notice.seq
        for notice in drain
    ]


@pytest.fixture
def boundary(bindings: SessionRuntimeBindings) -> AgentBoundary:
    return AgentFactory().build(bindings.session_id, SessionOwned(bindings))


@pytest.fixture
def small() -> SessionRuntimeBindings:
    """Bindings of an epoch that soon drops completions."""
    return SessionRuntimeBindings.standalone(SessionId.new(), SMALL)


def test_the_agent_is_told_of_tools_and_not_of_children(
    bindings: SessionRuntimeBindings, boundary: AgentBoundary
) -> None:
    assert told(boundary.drain()) == []
    end(bindings, TOOL, CHILD, TOOL, CHILD)
    drain = boundary.drain()
    assert told(drain) == [1, 3]
    assert (len(drain), drain.watermark) == (2, 4)
    assert all(isinstance(notice, CompletionEntry) for notice in drain.notices)


def test_only_a_commit_moves_the_cursor_past_entries_of_other_kinds_too(
    bindings: SessionRuntimeBindings, boundary: AgentBoundary
) -> None:
    end(bindings, TOOL, CHILD)
    cursor = bindings.cursor_state.agent_applied_cursor
    drain = boundary.drain()
    assert told(boundary.drain()) == told(drain) == [1]
    assert cursor.load() == 0
    drain.commit()
    assert cursor.load() == 2
    assert told(boundary.drain()) == []


def test_what_ends_during_a_turn_is_told_in_the_next(
    bindings: SessionRuntimeBindings, boundary: AgentBoundary
) -> None:
    end(bindings, TOOL)
    with boundary.drain() as notices:
        end(bindings, TOOL)
        assert told(notices) == [1]
    with boundary.drain() as notices:
        assert told(notices) == [2]
    assert bindings.cursor_state.agent_applied_cursor.load() == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_after_an_exception_the_same_notices_come_again(
    bindings: SessionRuntimeBindings, boundary: AgentBoundary, error: type[BaseException]
) -> None:
    end(bindings, TOOL, TOOL)
    with pytest.raises(error), boundary.drain():
        raise error
    assert bindings.cursor_state.agent_applied_cursor.load() == 0
    with boundary.drain() as notices:
        assert told(notices) == [1, 2]


def test_an_older_commit_does_not_move_the_cursor_back(
    bindings: SessionRuntimeBindings, boundary: AgentBoundary
) -> None:
    end(bindings, TOOL)
    older = boundary.drain()
    end(bindings, TOOL)
    boundary.drain().commit()
    older.commit()
    assert bindings.cursor_state.agent_applied_cursor.load() == 2


def test_a_rebuilt_agent_goes_on_where_the_last_one_was(bindings: SessionRuntimeBindings) -> None:
    end(bindings, TOOL, TOOL)
    first = AgentFactory().build(bindings.session_id, SessionOwned(bindings))
    assert told(first.drain()) == [1, 2]  # the cursor is zero, which is a position
    first.drain().commit()
    first.close()
    end(bindings, TOOL)
    second = AgentFactory().build(bindings.session_id, SessionOwned(bindings))
    assert told(second.drain()) == [3]


def test_a_sealed_epoch_still_tells_and_takes_no_commit(
    bindings: SessionRuntimeBindings, boundary: AgentBoundary
) -> None:
    end(bindings, TOOL)
    bindings.shared_segment().seal()
    drain = boundary.drain()
    assert told(drain) == [1]
    with pytest.raises(EpochSealed):
        drain.commit()


# --- gaps -------------------------------------------------------------------------------------


def gap(after: int, through: int) -> list[tuple[int, int]]:
    """How `told` shows a gap, if there is one."""
    return [(after, through)] if after < through else []


def test_a_gap_is_in_front_of_the_notices(small: SessionRuntimeBindings) -> None:
    boundary = AgentBoundary(small)
    end(small, TOOL, TOOL)
    boundary.drain().commit()
    end(small, TOOL, TOOL)
    drop_through(small, 3)
    [last] = end(small, TOOL)
    dropped = small.ops_lifecycle.completion_feed().list_since(0).dropped_through
    still_there = [4] if dropped < 4 else []
    drain = boundary.drain()
    assert told(drain) == [(2, dropped), *still_there, last]
    drain.commit()
    assert told(boundary.drain()) == []


def test_what_was_applied_is_no_gap(small: SessionRuntimeBindings) -> None:
    boundary = AgentBoundary(small)
    end(small, TOOL)
    boundary.drain().commit()
    drop_through(small, 1)
    small.cursor_state.agent_applied_cursor.advance(drop_through(small, 1))
    assert told(boundary.drain()) == []


def test_the_history_fills_the_gap(small: SessionRuntimeBindings) -> None:
    end(small, TOOL, CHILD, TOOL)
    kept = Kept(small.ops_lifecycle.completion_feed().list_since(0).entries)
    boundary = AgentBoundary(small, kept)
    assert told(boundary.drain()) == [1, 3]
    assert kept.asked == [], "what the feed holds is not asked for"
    dropped = drop_through(small, 3)
    assert told(boundary.drain()) == [*gap(3, dropped), 1, 3]
    assert kept.asked == [(small.epoch_id, 0, dropped)]


def test_the_history_of_the_bindings_is_used(small: SessionRuntimeBindings) -> None:
    end(small, TOOL)
    small.history = Kept(small.ops_lifecycle.completion_feed().list_since(0).entries)
    dropped = drop_through(small, 1)
    assert told(AgentBoundary(small).drain()) == [*gap(1, dropped), 1]


@pytest.mark.parametrize("seed", range(30))
def test_every_sequence_is_told_or_in_a_gap_and_never_both(seed: int) -> None:
    """BOUNDARY-1, with a history that has lost some entries."""
    random_ = random.Random(seed)
    small = SessionRuntimeBindings.standalone(SessionId.new(), SMALL)
    feed = small.ops_lifecycle.completion_feed()
    entries: list[CompletionEntry] = []
    kinds = [random_.choice(list(OperationKind)) for _ in range(60)]
    for kind in kinds:
        end(small, kind, reason="x" * random_.randrange(900))
        entries += feed.list_since(len(entries)).entries
    dropped = feed.list_since(0).dropped_through
    assert dropped > 0
    applied = random_.randrange(dropped + 1)
    small.cursor_state.agent_applied_cursor.advance(applied)
    found = [entry for entry in entries if random_.random() < 0.7]
    bounds = sorted(random_.sample(range(70), 4))
    skipped = list(zip(bounds[::2], bounds[1::2], strict=True)) if seed % 2 else []
    left_out = {seq for after, through in skipped for seq in range(after + 1, through + 1)}
    found = [entry for entry in found if entry.seq not in left_out]
    notices = told(AgentBoundary(small, Kept(found, skipped)).drain())

    gaps = [notice for notice in notices if isinstance(notice, tuple)]
    missing = [seq for after, through in gaps for seq in range(after + 1, through + 1)]
    kept = {entry.seq for entry in found}
    lost = set(range(applied + 1, dropped + 1)) - kept - left_out
    assert missing == sorted(lost)
    assert all(after < through for after, through in gaps)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(gaps))
    due = [
        seq
        for seq, kind in enumerate(kinds, 1)
        if seq > applied and kind is TOOL and (seq in kept or seq > dropped)
    ]
    assert notices == gaps + due, "the gaps are in front"


def test_sequences_that_recovery_skipped_are_no_gap() -> None:
    stored = SessionRuntimeBindings.standalone(SessionId.new(), SMALL)
    end(stored, TOOL, TOOL)
    kept = stored.ops_lifecycle.completion_feed().list_since(0).entries
    recovered = SessionRuntimeBindings.standalone(stored.session_id, SMALL)
    recovered.ops_lifecycle.restore(
        PersistedOpsSnapshot(
            epoch_id=recovered.epoch_id, entries=kept, cursors=EpochCursorSnapshot()
        ),
        skip=10,
    )
    assert recovered.skipped == (2, 12)
    assert end(recovered, TOOL) == [13]
    boundary = AgentBoundary(recovered)
    assert told(boundary.drain()) == [1, 2, 13]
    dropped = drop_through(recovered, 13)
    after = told(boundary.drain())
    # No completion has a skipped sequence; the dropped sequences on both sides had completions.
    assert after[:2] == [(0, 2), (12, dropped)]


# --- waiting for notices --------------------------------------------------------------------------


async def notified(boundary: AgentBoundary, timeout: float | None = None) -> Drain:
    async with asyncio.timeout(timeout):
        return await boundary.notified()


Wait = Callable[..., Drain]


@pytest.fixture(params=["wait", "notified"])
def wait(request: pytest.FixtureRequest) -> Wait:
    """Both forms of waiting, with the boundary and a timeout."""
    if request.param == "wait":
        return AgentBoundary.wait
    return lambda boundary, timeout=None: asyncio.run(notified(boundary, timeout))


def test_waiting_gives_what_there_is(
    boundary: AgentBoundary, bindings: SessionRuntimeBindings, wait: Wait
) -> None:
    end(bindings, TOOL, CHILD, TOOL)
    with wait(boundary, 0) as notices:
        assert told(notices) == [1, 3]
    with pytest.raises(TimeoutError):
        wait(boundary, 0)


def test_waiting_passes_over_what_wakes_no_agent(
    boundary: AgentBoundary, bindings: SessionRuntimeBindings, wait: Wait
) -> None:
    end(bindings, CHILD)
    found: list[Drain] = []
    thread = threading.Thread(target=lambda: found.append(wait(boundary)))
    thread.start()
    end(bindings, CHILD)
    end(bindings, TOOL)
    thread.join(20)
    assert [told(drain) for drain in found] == [[3]]


def test_waiting_ends_with_the_epoch(
    boundary: AgentBoundary, bindings: SessionRuntimeBindings, wait: Wait
) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            wait(boundary)
        except EpochSealed as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    bindings._segment.seal()
    thread.join(20)
    assert [type(error) for error in raised] == [EpochSealed]


def test_a_notice_has_a_sentence_for_the_agent(
    boundary: AgentBoundary, bindings: SessionRuntimeBindings
) -> None:
    with bindings.operation("index") as operation:
        operation.complete("1,204 files")
    with bindings.operation("index") as operation:
        operation.complete("no such folder", is_error=True)
    with bindings.operation("index"):
        pass
    end(bindings, TOOL, reason="too late")
    assert [notice.text for notice in boundary.drain()] == [
        "index completed: 1,204 files",
        "index completed with an error: no such folder",
        "index completed",
        "work cancelled: too late",
    ]
    assert CompletionFeedGap(3, 5).text == "completions 4 to 5 cannot be had any more"
