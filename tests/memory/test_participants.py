"""The participant table: which processes are attached and alive, and which slots they hold."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig
from shmepoch.errors import ParticipantsExhausted, SegmentCorrupted
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.layout import Layout
from shmepoch.memory.participants import Role, slot_of
from shmepoch.memory.segment import SharedSegment

ROOM = 4

Attach = Callable[..., SharedSegment]


@pytest.fixture
def observer(namespace: str) -> Iterator[SharedSegment]:
    """An attachment that is not a participant, of a segment with few participant slots."""
    config = OpsLifecycleConfig(
        max_completed=1, max_operations=1, feed_bytes=8 * 1024, max_participants=ROOM
    )
    segment = SharedSegment.allocate(
        namespace, config, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.publish()
    yield segment
    segment.unlink()
    segment.close()


@pytest.fixture
def attach(namespace: str, observer: SharedSegment) -> Iterator[Attach]:
    """Makes participants, equivalent to other processes."""
    made: list[SharedSegment] = []

    def attach(role: Role = Role.WORKER) -> SharedSegment:
        made.append(SharedSegment.attach(namespace, observer.session_id))
        made[-1].join(role)
        return made[-1]

    yield attach
    for segment in made:
        segment.close()


def die(segment: SharedSegment) -> None:
    """End like a killed process: only its locks are released."""
    segment._descriptor.close()


def test_who_joins_is_seen(observer: SharedSegment, attach: Attach) -> None:
    assert observer.participants.list() == []
    joined = [attach(role) for role in (Role.RUNTIME, Role.AGENT, Role.OBSERVER)]
    found = observer.participants.list()
    assert [one.role for one in found] == [Role.RUNTIME, Role.AGENT, Role.OBSERVER]
    assert [one.key for one in found] == [segment.participant for segment in joined]
    assert {one.pid for one in found} == {os.getpid()}
    assert all(one.alive and not one.is_self for one in found)
    assert all(observer.participants.is_alive(one.key) for one in found)
    assert observer.participants.joined() == 3


def test_it_knows_itself(attach: Attach) -> None:
    me, other = attach(), attach()
    found = me.participants.list(me=me.participant)
    assert [(one.key, one.is_self, one.alive) for one in found] == [
        (me.participant, True, True),
        (other.participant, False, True),
    ]


def test_a_role_is_changed_in_place(observer: SharedSegment, attach: Attach) -> None:
    segment = attach(Role.WORKER)
    key = segment.participant
    segment.join(Role.AGENT)
    assert segment.participant == key
    [one] = observer.participants.list()
    assert (one.key, one.role) == (key, Role.AGENT)
    assert observer.participants.joined() == 1


def test_who_leaves_is_gone(observer: SharedSegment, attach: Attach) -> None:
    segment = attach()
    key = segment.participant
    segment.close()
    assert observer.participants.list() == []
    assert not observer.participants.is_alive(key)


def test_who_died_is_seen_as_dead_until_cleared(observer: SharedSegment, attach: Attach) -> None:
    dying, living = attach(), attach()
    die(dying)
    dead, alive = observer.participants.list()
    assert (dead.key, dead.alive) == (dying.participant, False)
    assert (alive.key, alive.alive) == (living.participant, True)
    assert not observer.participants.is_alive(dead.key)
    observer.participants.clear(dead)
    assert [one.key for one in observer.participants.list()] == [alive.key]
    observer.participants.clear(dead)


def test_the_living_are_not_cleared(observer: SharedSegment, attach: Attach) -> None:
    attach()
    [one] = observer.participants.list()
    observer.participants.clear(one)
    assert observer.participants.list() == [one]


def test_who_took_the_slot_since_is_not_cleared(observer: SharedSegment, attach: Attach) -> None:
    for _ in range(ROOM):
        last = attach()
    die(last)
    dead = observer.participants.list()[-1]
    heir = attach()
    assert slot_of(heir.participant) == dead.slot
    observer.participants.clear(dead)
    assert observer.participants.is_alive(heir.participant)
    die(heir)  # even if that one is dead, too: it was not cleared
    observer.participants.clear(dead)
    assert observer.participants.list()[-1].key == heir.participant


def test_a_full_table_refuses_the_living_and_gives_the_slots_of_the_dead(
    observer: SharedSegment, attach: Attach
) -> None:
    segments = [attach() for _ in range(ROOM)]
    with pytest.raises(ParticipantsExhausted) as full:
        attach()
    assert full.value.limit == ROOM
    assert "max_participants" in str(full.value)
    assert observer.name in str(full.value)
    die(segments[2])
    heir = attach()
    assert slot_of(heir.participant) == 2
    with pytest.raises(ParticipantsExhausted):
        attach()
    segments[0].close()
    assert slot_of(attach().participant) == 0


def test_a_free_slot_is_taken_before_a_dead_one_s(observer: SharedSegment, attach: Attach) -> None:
    """The supervisor clears the dead, and must see them before their slots are taken."""
    die(attach())
    assert [slot_of(attach().participant) for _ in range(ROOM)] == [1, 2, 3, 0]


def test_no_number_is_used_twice(observer: SharedSegment, attach: Attach) -> None:
    keys = []
    for turn in range(20):
        segment = attach()
        keys.append(segment.participant)
        if turn % 2:
            segment.close()
        else:
            die(segment)
    assert len(set(keys)) == len(keys) == observer.participants.joined()
    assert not any(observer.participants.is_alive(key) for key in keys)


def test_many_that_join_at_once_have_slots_of_their_own(
    observer: SharedSegment, namespace: str
) -> None:
    barrier, keys, refused = threading.Barrier(ROOM + 3), [], []
    segments = [SharedSegment.attach(namespace, observer.session_id) for _ in range(ROOM + 3)]

    def join(segment: SharedSegment) -> None:
        barrier.wait()
        try:
            segment.join(Role.WORKER)
            keys.append(segment.participant)
        except ParticipantsExhausted as error:
            refused.append(error)

    threads = [threading.Thread(target=join, args=(segment,)) for segment in segments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(slot_of, keys)) == list(range(ROOM))
    assert len(set(keys)) == ROOM
    assert len(refused) == 3
    for segment in segments:
        segment.close()


def test_a_role_that_nobody_knows_is_corruption(observer: SharedSegment, attach: Attach) -> None:
    attach()
    observer.memory.store(Layout.participant(0), 1 << 8 | 77)
    with pytest.raises(SegmentCorrupted, match=r"participants\[0\]") as corrupted:
        observer.participants.list()
    assert corrupted.value.actual == 77


def test_a_number_that_cannot_be_is_corruption(observer: SharedSegment, attach: Attach) -> None:
    observer.memory.store(at.JOINED_AT, 2**48)
    with pytest.raises(SegmentCorrupted, match="joined"):
        attach()
    assert observer.participants.list() == []
