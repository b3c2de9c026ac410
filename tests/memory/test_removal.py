"""Removals without the owner, while other processes come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shmepoch import RuntimeEpochId, SessionId
from shmepoch import _native as at
from shmepoch._native import is_locked, try_lock
from shmepoch.errors import SegmentForeign
from shmepoch.memory.doorbells import doorbells_path, has_listeners, remove_unused_doorbells
from shmepoch.memory.files import SHM_DIR, NewFile, open_owned
from shmepoch.memory.removal import abandon, is_held, remove_leftover, remove_unused
from shmepoch.memory.segment import SharedSegment


@pytest.fixture
def segment(namespace: str) -> Iterator[SharedSegment]:
    """A segment that no process has attached."""
    segment = SharedSegment.allocate(
        namespace, None, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.publish()
    segment.close()
    yield segment
    segment.path.unlink(missing_ok=True)


def test_it_is_asked_once_more_when_no_process_can_attach(segment: SharedSegment) -> None:
    answers = []

    def still() -> bool:
        opened = open_owned(segment.path)
        answers.append(try_lock(opened, at.PRESENCE_BYTE, True))
        opened.close()
        return False

    assert not remove_unused(segment.namespace, segment.session_id, still=still)
    assert answers == [False], "it was asked while a process could attach"
    assert not is_held(segment.path)
    assert remove_unused(segment.namespace, segment.session_id, still=lambda: True)
    assert not segment.path.exists()


def test_what_is_attached_is_not_asked_about(segment: SharedSegment) -> None:
    attached = SharedSegment.attach(segment.namespace, segment.session_id)
    assert is_held(segment.path)
    facts = segment.namespace, segment.session_id
    assert not remove_unused(*facts, still=lambda: pytest.fail("asked"))
    attached.close()


def test_a_failure_of_the_question_holds_nothing(segment: SharedSegment) -> None:
    def still() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        remove_unused(segment.namespace, segment.session_id, still=still)
    SharedSegment.attach(segment.namespace, segment.session_id).close()


def test_of_two_ways_to_remove_one_at_a_time(segment: SharedSegment) -> None:
    """The second would take the name from the segment that a runtime makes after the first."""
    facts = segment.namespace, segment.session_id
    assert not remove_unused(*facts, still=lambda: abandon(*facts))
    opened = open_owned(segment.path)
    assert try_lock(opened, at.RUNTIME_BYTE, False)  # as `abandon` does
    assert not remove_unused(*facts)
    opened.close()
    assert remove_unused(*facts)


def test_a_file_that_is_being_made_is_held(namespace: str) -> None:
    making = NewFile(SHM_DIR / f"shmepoch.{namespace}.some", at.PAGE)
    (path,) = SHM_DIR.glob(f"shmepoch.{namespace}.some.*")
    assert is_held(path)
    assert not remove_leftover(path)
    making.fd.close()  # as a killed creator does
    assert not is_held(path)
    assert remove_leftover(path)
    assert not remove_leftover(path)
    assert not path.exists()


def test_what_others_may_open_is_refused(segment: SharedSegment) -> None:
    segment.path.chmod(0o644)
    calls: list[Callable[[], object]] = [
        lambda: is_held(segment.path),
        lambda: remove_leftover(segment.path),
        lambda: remove_unused(segment.namespace, segment.session_id),
    ]
    for call in calls:
        with pytest.raises(SegmentForeign, match="mode"):
            call()
    assert segment.path.exists()


def test_doorbells_are_unused_when_no_process_listens(namespace: str) -> None:
    assert not remove_unused_doorbells(namespace)
    page = NewFile(doorbells_path(namespace), at.PAGE)
    page.publish()
    assert try_lock(page.fd, 0, True)  # as a listener does
    assert has_listeners(namespace)
    assert not remove_unused_doorbells(namespace)
    page.fd.close()
    assert not has_listeners(namespace)
    assert remove_unused_doorbells(namespace)
    assert not doorbells_path(namespace).exists()


def test_a_removal_leaves_no_lock(segment: SharedSegment) -> None:
    opened = open_owned(segment.path)
    assert not remove_unused(segment.namespace, segment.session_id, still=lambda: False)
    assert not any(is_locked(opened, byte) for byte in (at.PRESENCE_BYTE, at.RUNTIME_BYTE))
    opened.close()
