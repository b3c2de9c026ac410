"""One live agent for each session, unless all of them share it."""

from __future__ import annotations

import contextlib
import os
import pickle

import pytest

from shmepoch import (
    AgentAlreadyActive,
    AgentBoundary,
    AgentFactory,
    BindingsClosed,
    BoundaryClosed,
    Drain,
    EpochSealed,
    Role,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    StandaloneEphemeral,
)
from tests.processes.children import METHODS, Channel, start
from tests.runtime.completions import TOOL, end
from tests.support import eventually


def build(bindings: SessionRuntimeBindings, *, sharing: bool = False) -> AgentBoundary:
    return AgentFactory().build(bindings.session_id, SessionOwned(bindings), sharing=sharing)


def be_the_agent(bindings: SessionRuntimeBindings, test: Channel, sharing: bool) -> None:
    """Build an agent, and act on requests until the end."""
    boundary = build(bindings, sharing=sharing)
    test.say(os.getpid())
    while (told := test.hear()) != "end":
        if told == "close":
            boundary.close()
        elif told == "collect":
            del boundary
        elif told == "leave":
            bindings.close()
        test.say(told)


def refused(bindings: SessionRuntimeBindings, *, sharing: bool = False) -> AgentAlreadyActive:
    with pytest.raises(AgentAlreadyActive) as error:
        build(bindings, sharing=sharing)
    assert error.value.session_id == bindings.session_id
    return error.value


@pytest.fixture(params=["private", "shared"])
def bindings_(request: pytest.FixtureRequest) -> SessionRuntimeBindings:
    if request.param == "private":
        return SessionRuntimeBindings.standalone(SessionId.new())
    bindings: SessionRuntimeBindings = request.getfixturevalue("bindings")
    return bindings


# --- in one process ---------------------------------------------------------------------------


def test_a_second_one_is_refused_until_the_first_is_closed(
    bindings_: SessionRuntimeBindings,
) -> None:
    with build(bindings_) as first:
        error = refused(bindings_)
        assert error.pid == os.getpid()
        assert str(os.getpid()) in str(error)
        assert "sharing=True" in str(error)
        assert pickle.loads(pickle.dumps(error)).pid == error.pid
        refused(bindings_, sharing=True)
        assert len(first.drain()) == 0
    build(bindings_).close()


def test_a_boundary_without_the_factory_counts(bindings_: SessionRuntimeBindings) -> None:
    boundary = AgentBoundary(bindings_)
    refused(bindings_)
    boundary.close()


def test_a_boundary_that_is_collected_is_no_agent(bindings_: SessionRuntimeBindings) -> None:
    for _ in range(3):
        build(bindings_)
    boundary = build(bindings_)
    drain = boundary.drain()
    del boundary
    refused(bindings_)  # its turn goes on
    drain.commit()
    del drain
    build(bindings_)


@pytest.mark.parametrize("error", [None, ValueError("the turn failed")])
def test_after_its_turn_a_drain_holds_no_agent(
    bindings_: SessionRuntimeBindings, error: Exception | None
) -> None:
    end(bindings_, TOOL)
    with contextlib.suppress(ValueError), build(bindings_).drain() as notices:
        refused(bindings_)
        if error is not None:
            raise error
    applied = bindings_.cursor_state.agent_applied_cursor.load()
    assert applied == (1 if error is None else 0)
    with pytest.raises(BoundaryClosed):
        notices.commit()
    with build(bindings_) as boundary:
        drain = boundary.drain()
        with contextlib.suppress(ValueError), drain:
            raise ValueError("the turn failed, and was taken after all")
        drain.commit()
    assert bindings_.cursor_state.agent_applied_cursor.load() == 1


def test_those_that_share_are_all_agents(bindings_: SessionRuntimeBindings) -> None:
    with build(bindings_, sharing=True) as first, build(bindings_, sharing=True) as second:
        refused(bindings_)
        end(bindings_, TOOL)
        assert len(first.drain()) == len(second.drain()) == 1
        first.drain().commit()
        assert len(second.drain()) == 0
    build(bindings_)


def test_standalone_builds_are_agents_of_their_own() -> None:
    session_id = SessionId.new()
    first, second = (AgentFactory().build(session_id, StandaloneEphemeral()) for _ in range(2))
    refused(first.bindings)
    second.close()
    refused(first.bindings)


def test_a_refused_build_leaves_nothing(bindings: SessionRuntimeBindings) -> None:
    with build(bindings):
        refused(bindings)
        refused(bindings, sharing=True)
    assert bindings._segment.claims == []


# --- a closed boundary ------------------------------------------------------------------------


def test_a_closed_boundary_tells_nothing_and_commits_nothing(
    bindings_: SessionRuntimeBindings,
) -> None:
    end(bindings_, TOOL)
    boundary = build(bindings_)
    drain = boundary.drain()
    boundary.close()
    boundary.close()
    for call in (boundary.drain, drain.commit):
        with pytest.raises(BoundaryClosed) as error:
            call()
        assert error.value.session_id == bindings_.session_id
        assert "build the agent again" in str(error.value)
    assert bindings_.cursor_state.agent_applied_cursor.load() == 0
    assert [notice.seq for notice in build(bindings_).drain()] == [1]  # type: ignore[union-attr]


def test_closing_the_bindings_closes_it(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    bindings = adapter.prepare_bindings(session_id)
    boundary = build(bindings)
    adapter.close()
    with pytest.raises(BoundaryClosed):
        boundary.drain()
    with pytest.raises(BindingsClosed):
        build(bindings)
    with RuntimeSessionAdapter.ephemeral() as next_adapter:
        again = next_adapter.prepare_bindings(session_id)
        with build(again):
            boundary.close()  # it is closed already
            refused(again)
        next_adapter.unregister_session(session_id)


def test_after_a_reset_the_epoch_is_what_ended(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    boundary = build(adapter.prepare_bindings(session_id))
    new = adapter.reset_session(session_id)
    with pytest.raises(EpochSealed):
        boundary.drain()
    build(new).close()
    adapter.unregister_session(session_id)


def test_the_role_ends_with_the_boundary(bindings: SessionRuntimeBindings) -> None:
    with build(bindings, sharing=True), start(be_the_agent, bindings, True) as child:
        child.hear()
        child.say("close")
        child.hear()
        assert {one.pid: one.role for one in bindings.participants()}[child.pid] is Role.WORKER
        child.say("end")
        child.result()


# --- across processes -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_another_process_is_refused_until_the_first_is_killed(
    bindings: SessionRuntimeBindings, method: str
) -> None:
    with start(be_the_agent, bindings, False, method=method) as child:
        pid = child.hear()
        assert pid == child.pid
        assert refused(bindings).pid == pid
        assert refused(bindings, sharing=True).pid == pid
        child.kill()
        build(bindings)


@pytest.mark.parametrize("how", ["close", "collect", "leave"])
def test_another_process_gives_it_up(bindings: SessionRuntimeBindings, how: str) -> None:
    with start(be_the_agent, bindings, False) as child:
        child.hear()
        child.say(how)
        child.hear()
        build(bindings)
        child.say("end")
        child.result()


def test_a_runtime_that_hosts_its_agent_is_named(bindings: SessionRuntimeBindings) -> None:
    with build(bindings):
        assert bindings.role is Role.RUNTIME
        for method in METHODS:
            with start(be_the_agent, bindings, False, method=method) as child:
                with pytest.raises(AgentAlreadyActive) as error:
                    child.hear()
                assert error.value.pid == os.getpid()


def test_agents_of_several_processes_share(bindings: SessionRuntimeBindings) -> None:
    with (
        start(be_the_agent, bindings, True) as one,
        start(be_the_agent, bindings, True, method="spawn") as two,
    ):
        pids = {one.hear(), two.hear()}
        assert refused(bindings).pid in pids
        one.kill()
        assert refused(bindings).pid == two.pid
        with build(bindings, sharing=True):
            pass
        two.kill()
        build(bindings)


def test_one_of_many_processes_is_the_agent(bindings: SessionRuntimeBindings) -> None:
    children = [start(be_the_agent, bindings, False) for _ in range(4)]
    built = []
    for child in children:
        try:
            built.append(child.hear())
        except AgentAlreadyActive as error:
            assert error.pid in {0, *(child.pid for child in children)}
    assert len(built) == 1
    for child in children:
        child.__exit__()


def test_a_stopped_agent_stays_the_agent(bindings: SessionRuntimeBindings) -> None:
    with start(be_the_agent, bindings, False) as child:
        pid = child.hear()
        child.signal(19)
        eventually(child.stopped)
        assert refused(bindings).pid == pid


# --- forks ------------------------------------------------------------------------------------


def commit_what_was_inherited(bindings: SessionRuntimeBindings, test: Channel) -> None:
    """A child that was forked in the middle of a turn tries to build its own agent."""
    boundary, drain = _inherited
    for call in (boundary.drain, drain.commit):
        with pytest.raises(BoundaryClosed):
            call()
    boundary.close()
    if bindings.handle is not None:
        with pytest.raises(AgentAlreadyActive) as error:
            build(bindings)
        test.say(error.value.pid)


def test_a_forked_child_is_not_the_agent(bindings: SessionRuntimeBindings) -> None:
    global _inherited
    end(bindings, TOOL)
    boundary = build(bindings)
    with boundary.drain() as notices:
        _inherited = boundary, notices
        with start(commit_what_was_inherited, bindings) as child:
            assert child.hear() == os.getpid()
            child.result()
        assert bindings.cursor_state.agent_applied_cursor.load() == 0
    assert bindings.cursor_state.agent_applied_cursor.load() == 1
    refused(bindings)
    del _inherited


def test_a_forked_child_does_not_keep_its_parents_claim(bindings: SessionRuntimeBindings) -> None:
    boundary = build(bindings)
    with start(wait_to_end, bindings) as child:
        child.hear()
        boundary.close()
        with start(be_the_agent, bindings, False, method="spawn") as other:
            assert other.hear() == other.pid
        child.say("end")
        child.result()


def wait_to_end(bindings: SessionRuntimeBindings, test: Channel) -> None:
    test.say("started")
    test.hear()


_inherited: tuple[AgentBoundary, Drain]
