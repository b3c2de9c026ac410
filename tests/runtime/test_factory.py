"""The agent factory: it consumes bindings, and makes none for a session with a runtime."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import shmepoch.memory.doorbells
import shmepoch.memory.files
import shmepoch.memory.namespaces
from shmepoch import (
    AgentFactory,
    BindingsMismatch,
    BindingsNotTransferable,
    EpochSealed,
    Role,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    StandaloneEphemeral,
)
from tests.runtime.completions import TOOL, end


def test_a_build_with_bindings_uses_them(bindings: SessionRuntimeBindings) -> None:
    boundary = AgentFactory().build(bindings.session_id, SessionOwned(bindings))
    assert boundary.bindings is bindings
    assert boundary.session_id == bindings.session_id


def test_bindings_of_another_session_are_refused(bindings: SessionRuntimeBindings) -> None:
    other = SessionId.new()
    with pytest.raises(BindingsMismatch) as mismatch:
        AgentFactory().build(other, SessionOwned(bindings))
    assert mismatch.value.expected == other
    assert mismatch.value.actual == bindings.session_id
    for session_id in (other, bindings.session_id):
        assert str(session_id) in str(mismatch.value)


def test_bindings_of_a_sealed_epoch_are_refused(adapter: RuntimeSessionAdapter) -> None:
    session_id = SessionId.new()
    old = adapter.prepare_bindings(session_id)
    new = adapter.reset_session(session_id)
    with pytest.raises(EpochSealed) as sealed:
        AgentFactory().build(session_id, SessionOwned(old))
    assert sealed.value.epoch_id == old.epoch_id
    AgentFactory().build(session_id, SessionOwned(new))
    adapter.unregister_session(session_id)
    with pytest.raises(EpochSealed):
        AgentFactory().build(session_id, SessionOwned(new))


def test_a_build_in_the_runtime_leaves_it_the_runtime(bindings: SessionRuntimeBindings) -> None:
    AgentFactory().build(bindings.session_id, SessionOwned(bindings))
    [me] = bindings.participants()
    assert (bindings.role, me.role) == (Role.RUNTIME, Role.RUNTIME)


def test_a_standalone_build_starts_at_its_watermark() -> None:
    session_id = SessionId.new()
    boundary = AgentFactory().build(session_id, StandaloneEphemeral())
    assert boundary.session_id == boundary.bindings.session_id == session_id
    assert len(boundary.drain()) == 0
    end(boundary.bindings, TOOL, TOOL)
    assert [notice.seq for notice in boundary.drain()] == [1, 2]  # type: ignore[union-attr]


def test_standalone_builds_have_nothing_in_common() -> None:
    session_id = SessionId.new()
    first, second = (
        AgentFactory().build(session_id, StandaloneEphemeral()).bindings for _ in range(2)
    )
    end(first, TOOL)
    assert first.epoch_id != second.epoch_id
    assert second.ops_lifecycle.list_operations() == []


def test_standalone_bindings_cannot_leave_the_process() -> None:
    bindings = AgentFactory().build(SessionId.new(), StandaloneEphemeral()).bindings
    for leave in (pickle.dumps, SessionRuntimeBindings.to_token):
        with pytest.raises(BindingsNotTransferable, match="prepare_bindings"):
            leave(bindings)
    assert bindings.handle is None
    assert bindings.participants() == []
    assert bindings.role is None


def test_a_standalone_build_works_without_shared_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (shmepoch.memory.files, shmepoch.memory.namespaces, shmepoch.memory.doorbells):
        monkeypatch.setattr(module, "SHM_DIR", tmp_path / "there is none")
    with (
        RuntimeSessionAdapter.ephemeral(namespace="none") as adapter,
        pytest.raises(FileNotFoundError),
    ):
        adapter.prepare_bindings(SessionId.new())
    boundary = AgentFactory().build(SessionId.new(), StandaloneEphemeral())
    end(boundary.bindings, TOOL)
    with boundary.drain() as notices:
        assert len(notices) == 1
    boundary.bindings.ops_lifecycle.check()
    boundary.bindings.close()


def test_build_modes_show_no_key(bindings: SessionRuntimeBindings) -> None:
    owned = SessionOwned(bindings)
    assert repr(owned) == f"SessionOwned({bindings.session_id}, {bindings.epoch_id})"
    assert owned == SessionOwned(bindings)
    assert hash(owned) == hash(SessionOwned(bindings))
    assert StandaloneEphemeral() == StandaloneEphemeral() != owned
    assert len({StandaloneEphemeral(), StandaloneEphemeral()}) == 1
    assert repr(StandaloneEphemeral()) == "StandaloneEphemeral()"
