"""Several users of one machine, all in one namespace."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings
from shmepoch.errors import SegmentForeign
from shmepoch.memory.doorbells import Doorbells, doorbells_path
from shmepoch.memory.namespaces import list_sessions, segment_path
from shmepoch.memory.removal import remove_unused
from shmepoch.memory.segment import SharedSegment
from tests.processes.children import Channel, start, wait_until
from tests.runtime.completions import TOOL, end

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")

FIRST, SECOND = 65001, 65002


def as_user(
    _: SessionRuntimeBindings | None, test: Channel, uid: int, act: Callable[..., Any], *args: Any
) -> Any:
    os.setgid(uid)
    os.setuid(uid)
    return act(test, *args)


async def wait_for_one(bindings: SessionRuntimeBindings, meanwhile: Callable[[], object]) -> None:
    feed = bindings.ops_lifecycle.completion_feed()
    waiting = asyncio.ensure_future(feed.advanced(feed.watermark()))
    await asyncio.sleep(0)
    wait_until(lambda: Doorbells.of(bindings.shared_segment().namespace)._fd is not None)
    meanwhile()
    end(bindings, TOOL)
    await asyncio.wait_for(waiting, 30)


def use(test: Channel, namespace: str) -> list[SessionId]:
    """Await and end operations while the other users do the same; returns the sessions that this
    user sees."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())

        def meet() -> None:
            test.say(bindings.session_id)
            test.hear()

        asyncio.run(wait_for_one(bindings, meet))
        seen = list(list_sessions(namespace))
        test.say(seen)
        test.hear()
        adapter.unregister_session(bindings.session_id)
        Doorbells.of(namespace).stop()  # a forked child ends without the functions that run at exit
        assert not doorbells_path(namespace).exists()
    return seen


def test_users_of_one_namespace_do_not_meet(namespace: str) -> None:
    with (
        start(as_user, None, FIRST, use, namespace) as first,
        start(as_user, None, SECOND, use, namespace) as second,
    ):
        children = (first, second)
        sessions = [child.hear() for child in children]
        for child in children:
            child.say("both listen")
        for child, session in zip(children, sessions, strict=True):
            assert child.hear() == [session]
        for child in children:
            child.say("both have looked")
        for child in children:
            child.result()


def meet_a_foreign_segment(test: Channel, namespace: str, session: SessionId) -> list[str]:
    """The error of each call about a segment of another user."""

    def prepare() -> None:
        with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
            adapter.prepare_bindings(session)

    said = []
    for call in (
        lambda: SharedSegment.attach(namespace, session),
        lambda: remove_unused(namespace, session),
        prepare,
    ):
        with pytest.raises(SegmentForeign) as refused:
            call()
        said.append(str(refused.value))
    return said


def test_a_segment_of_another_user_is_named_and_left_alone(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    session = bindings.session_id
    with start(as_user, None, FIRST, meet_a_foreign_segment, namespace, session) as child:
        said = child.result()
    for each in said:
        assert segment_path(namespace, session).name in each
        assert f"owner is 0, not {FIRST}" in each
    end(bindings, TOOL)


def meet_an_unreadable_segment(test: Channel, namespace: str, session: SessionId) -> str:
    path = segment_path(namespace, session)
    path.touch(0o000)
    try:
        with pytest.raises(SegmentForeign) as refused:
            SharedSegment.attach(namespace, session)
        return str(refused.value)
    finally:
        path.unlink()


def test_a_segment_that_its_own_user_may_not_read_is_named(namespace: str) -> None:
    args = FIRST, meet_an_unreadable_segment, namespace, SessionId.new()
    with start(as_user, None, *args) as child:
        assert "its mode is 0o0, not 0o600" in child.result()
