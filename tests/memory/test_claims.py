"""Claims: which claim of a process holds a byte, and when the kernel's lock is held."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator

import pytest

from shmepoch import BindingsClosed, EpochSealed, RuntimeEpochId, SessionId
from shmepoch import _native as at
from shmepoch._native import is_locked
from shmepoch.memory.claims import Claim, Listed, lose_claims
from shmepoch.memory.segment import Segment, SharedSegment

BYTE = at.AGENT_BYTE
#: Whether the first claim shares, whether the second does, and whether the second is granted.
PAIRS = [(False, False, False), (False, True, False), (True, False, False), (True, True, True)]


@pytest.fixture
def shared(namespace: str) -> Iterator[SharedSegment]:
    segment = SharedSegment.allocate(
        namespace, None, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.publish()
    yield segment
    segment.path.unlink()
    segment.close()


@pytest.fixture
def other(shared: SharedSegment) -> Iterator[SharedSegment]:
    """Another attachment with its own descriptor, like another process."""
    other = SharedSegment.attach(shared.namespace, shared.session_id)
    yield other
    other.close()


@pytest.fixture(params=["private", "shared"])
def segment(request: pytest.FixtureRequest) -> Segment:
    if request.param == "private":
        return Segment.private(None)
    segment: SharedSegment = request.getfixturevalue("shared")
    return segment


def taken(segment: Segment, *, shared: bool = False) -> Claim:
    claim = segment.claim(BYTE, shared=shared)
    assert claim is not None
    assert claim.held
    return claim


@pytest.mark.parametrize(("first", "second", "granted"), PAIRS)
def test_in_one_process(segment: Segment, first: bool, second: bool, granted: bool) -> None:
    one = taken(segment, shared=first)
    two = segment.claim(BYTE, shared=second)
    assert (two is not None) == granted
    assert segment.claim(at.LOOP_BYTE) is not None, "the bytes have nothing to do with each other"
    one.release()
    if two is not None:
        assert segment.claim(BYTE) is None, "the second one still holds it"
        two.release()
    taken(segment)


@pytest.mark.parametrize(("first", "second", "granted"), PAIRS)
def test_across_attachments(
    shared: SharedSegment, other: SharedSegment, first: bool, second: bool, granted: bool
) -> None:
    one = taken(shared, shared=first)
    two = other.claim(BYTE, shared=second)
    assert (two is not None) == granted
    one.release()
    if two is not None:
        assert shared.claim(BYTE) is None
        two.release()
    taken(shared)


def test_the_lock_is_given_up_with_the_last_claim(
    shared: SharedSegment, other: SharedSegment
) -> None:
    one, two = taken(shared, shared=True), taken(shared, shared=True)
    assert shared.claim(BYTE) is None
    one.release()
    one.release()
    assert is_locked(other.fd, BYTE), "a refused claim and the first of two change nothing"
    two.release()
    assert not is_locked(other.fd, BYTE)
    assert shared.claims == []


def test_a_refused_claim_takes_no_lock(shared: SharedSegment, other: SharedSegment) -> None:
    one = taken(shared)
    assert other.claim(BYTE) is None
    one.release()
    assert not is_locked(shared.fd, BYTE)
    assert other.claims == []


def test_leaving_loses_every_claim(shared: SharedSegment, other: SharedSegment) -> None:
    claims = [taken(other, shared=True), taken(other, shared=True)]
    other.close()
    assert not any(claim.held for claim in claims)
    again = taken(shared)
    claims[0].release()
    assert again.held
    assert shared.claim(BYTE) is None, "a claim that was lost gives up nothing"


def test_a_descriptor_that_was_given_up_is_not_used(
    shared: SharedSegment, other: SharedSegment
) -> None:
    """Its number may belong to another file now."""
    claim = taken(other)
    number = other.fd
    other.close()
    third = SharedSegment.attach(shared.namespace, shared.session_id)
    try:
        assert third.fd == number
        again = taken(third)
        claim.release()
        assert again.held
        assert is_locked(shared.fd, BYTE)
        with pytest.raises(BindingsClosed):
            other.claim(at.LOOP_BYTE)
        assert not is_locked(shared.fd, at.LOOP_BYTE)
    finally:
        third.close()


def test_an_ended_epoch_that_was_left_says_so(other: SharedSegment) -> None:
    other.seal()
    other.close()
    with pytest.raises(EpochSealed):
        other.claim(BYTE)
    assert other.claims == []


def test_one_of_many_threads_has_it(segment: Segment) -> None:
    barrier = threading.Barrier(8)
    granted: list[Claim] = []

    def claim() -> None:
        for _ in range(100):
            barrier.wait()
            found = segment.claim(BYTE)
            if found is not None:
                granted.append(found)
            barrier.wait()
            if found is not None:
                found.release()

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 100
    assert segment.claims == []


def interrupt(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call `act` in the middle of the next claim, while the lock is held."""
    lock = Listed.lock

    def interrupted(listed: Listed) -> bool:
        monkeypatch.setattr(Listed, "lock", lock)
        act()
        return lock(listed)

    monkeypatch.setattr(Listed, "lock", interrupted)


@pytest.mark.parametrize("how", ["claim", "refused", "leave"])
def test_what_is_released_while_another_thread_has_the_lock_is_dropped_by_that_thread(
    shared: SharedSegment, other: SharedSegment, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A finalizer runs at any point, and must not wait."""
    claim, elsewhere = taken(shared), Segment.private(None)

    def release() -> None:
        thread = threading.Thread(target=claim.release)
        thread.start()
        thread.join()
        assert not claim.held
        assert is_locked(other.fd, BYTE)

    if how == "leave":
        elsewhere.claims.append(Releasing(elsewhere, BYTE, release))
        lose_claims(elsewhere)
    else:
        interrupt(monkeypatch, release)
        if how == "refused":
            assert other.claim(BYTE) is None
        else:
            taken(elsewhere)
    assert not is_locked(other.fd, BYTE)


class Releasing(Listed):
    """Calls something when it is lost."""

    def __init__(self, segment: Segment, byte: int, act: Callable[[], object]) -> None:
        super().__init__(segment, byte, False)
        self._act = act

    def __setattr__(self, name: str, value: object) -> None:
        if name == "held" and not value:
            self._act()
        super().__setattr__(name, value)


def test_a_release_in_the_middle_of_a_claim(
    shared: SharedSegment, other: SharedSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finalizer enters the lock again: in the end the claimed byte is locked."""
    before = taken(shared, shared=True)
    interrupt(monkeypatch, before.release)
    claim = taken(shared, shared=True)
    assert shared.claims == [claim._listed]
    assert is_locked(other.fd, BYTE)
    claim.release()
    assert not is_locked(other.fd, BYTE)


def test_a_claim_in_the_middle_of_a_claim(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler enters the lock again: its claim is the second one."""
    inner: list[Claim | None] = []
    interrupt(monkeypatch, lambda: inner.append(segment.claim(BYTE)))
    taken(segment)
    assert inner == [None]


def test_an_interrupt_in_the_middle_of_a_claim(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The byte is free afterwards."""

    def raise_it() -> None:
        raise KeyboardInterrupt

    interrupt(monkeypatch, raise_it)
    with pytest.raises(KeyboardInterrupt):
        segment.claim(BYTE)
    gc.collect()  # the traceback had it
    taken(segment)


def test_a_claim_that_is_collected_is_given_up(shared: SharedSegment, other: SharedSegment) -> None:
    claim = taken(shared)
    assert other.claim(BYTE) is None
    del claim
    taken(other)


def test_leaving_in_the_middle_of_a_claim(
    shared: SharedSegment, other: SharedSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, other.close)
    with pytest.raises(BindingsClosed):
        other.claim(BYTE)
    assert not is_locked(shared.fd, BYTE)
