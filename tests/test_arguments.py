"""A call with a wrong type, None, or a class instead of an instance says what it takes."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from shmepoch import (
    AgentBoundary,
    AgentFactory,
    ArgumentInvalid,
    BindingsMismatch,
    EpochCursorSnapshot,
    EpochCursorState,
    EpochHandle,
    InMemoryRuntimeStore,
    OperationId,
    OperationPeerHandle,
    OperationProgressUpdate,
    OperationResult,
    OperationSpec,
    OpsLifecycleConfig,
    PersistedOpsSnapshot,
    PersistenceChannel,
    RecordInvalid,
    Role,
    RunId,
    RuntimeEpochId,
    RuntimeLoop,
    RuntimeOpsLifecycleRegistry,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    StandaloneEphemeral,
    TrustedPeerSpec,
    observe_session,
    remove_unused,
)
from tests.support import spec


class Given:
    """The valid objects that the calls need besides the wrong value."""

    def __init__(self) -> None:
        self.session_id = SessionId.new()
        self.bindings = SessionRuntimeBindings.standalone(self.session_id)
        self.registry = self.bindings.ops_lifecycle
        self.id = OperationId.new()
        self.registry.register_operation(spec(id=self.id))
        self.registry.provisioning_succeeded(self.id)
        self.adapter = RuntimeSessionAdapter.ephemeral()

    def all_ended(self, run_id: Any, ids: Any) -> object:
        return asyncio.run(self.registry.all_ended(run_id, ids))

    async def advanced(self, after_seq: Any) -> object:
        return await self.registry.completion_feed().advanced(after_seq)

    def channel(self) -> PersistenceChannel:
        return PersistenceChannel(InMemoryRuntimeStore())

    def result(self, **fields: Any) -> OperationResult:
        return OperationResult(**{"id": self.id, "content": "done", **fields})


def ignore(_: object) -> bool:
    return True


def build(given: Given, mode: Any) -> object:
    return AgentFactory().build(given.session_id, mode)


#: A call with one argument, the name in its error, and the kind that it takes.
Call = tuple[Callable[[Given, Any], object], str, type, bool]
CALLS: list[Call] = [
    (build, "build_mode", SessionOwned, False),
    (
        lambda g, v: AgentFactory().build(v, StandaloneEphemeral()),
        "session_id",
        SessionId,
        False,
    ),
    (lambda g, v: AgentFactory(v), "history", InMemoryRuntimeStore, True),
    (lambda g, v: AgentBoundary(v), "bindings", SessionRuntimeBindings, False),
    (lambda g, v: SessionOwned(v), "bindings", SessionRuntimeBindings, False),
    (
        lambda g, v: RuntimeLoop(v, inject=ignore, quiescent=bool),
        "bindings",
        SessionRuntimeBindings,
        False,
    ),
    (lambda g, v: SessionRuntimeBindings.standalone(v), "session_id", SessionId, False),
    (
        lambda g, v: SessionRuntimeBindings.standalone(g.session_id, v),
        "config",
        OpsLifecycleConfig,
        True,
    ),
    (lambda g, v: SessionRuntimeBindings.attach(v), "handle", EpochHandle, False),
    (lambda g, v: SessionRuntimeBindings.from_token(v), "text", str, False),
    (lambda g, v: EpochHandle.from_token(v), "text", str, False),
    (lambda g, v: g.bindings.announce(v), "role", Role, False),
    (lambda g, v: g.adapter.prepare_bindings(v), "session_id", SessionId, False),
    (lambda g, v: g.adapter.register_session(v), "session_id", SessionId, False),
    (lambda g, v: g.adapter.ops_lifecycle_registry(v), "session_id", SessionId, False),
    (lambda g, v: g.adapter.contains_session(v), "session_id", SessionId, False),
    (lambda g, v: g.adapter.reset_session(v), "session_id", SessionId, False),
    (lambda g, v: g.adapter.unregister_session(v), "session_id", SessionId, False),
    (lambda g, v: g.adapter.observe_session(v), "session_id", SessionId, False),
    (lambda g, v: observe_session(v), "session_id", SessionId, False),
    (lambda g, v: remove_unused(v), "session_id", SessionId, False),
    (lambda g, v: RuntimeSessionAdapter.ephemeral(namespace=v), "namespace", str, True),
    (
        lambda g, v: RuntimeSessionAdapter.ephemeral(config=v),
        "config",
        OpsLifecycleConfig,
        True,
    ),
    (lambda g, v: RuntimeSessionAdapter.persistent(v), "store", InMemoryRuntimeStore, False),
    (lambda g, v: PersistenceChannel(v), "store", InMemoryRuntimeStore, False),
    (lambda g, v: g.channel().follow(v), "bindings", SessionRuntimeBindings, False),
    (lambda g, v: g.channel().unfollow(v), "bindings", SessionRuntimeBindings, False),
    (lambda g, v: g.channel().flush(bindings=v), "bindings", SessionRuntimeBindings, True),
    (lambda g, v: SessionRuntimeBindings(v), "segment", object, False),
    (lambda g, v: EpochCursorState(v), "segment", object, True),
    (lambda g, v: EpochCursorState().advance_all(v), "positions", EpochCursorSnapshot, False),
    (
        lambda g, v: RuntimeOpsLifecycleRegistry.with_config(v),
        "config",
        OpsLifecycleConfig,
        False,
    ),
    (
        lambda g, v: RuntimeOpsLifecycleRegistry.from_recovered(v),
        "snapshot",
        PersistedOpsSnapshot,
        False,
    ),
    (lambda g, v: RuntimeOpsLifecycleRegistry(v), "segment", object, True),
    (lambda g, v: g.registry.provisioning_succeeded(v), "id", OperationId, False),
    (lambda g, v: g.registry.provisioning_failed(v, "no"), "id", OperationId, False),
    (lambda g, v: g.registry.abort_provisioning(v), "id", OperationId, False),
    (
        lambda g, v: g.registry.peer_ready(
            v, OperationPeerHandle("peer", TrustedPeerSpec("peer", "1", "here"))
        ),
        "id",
        OperationId,
        False,
    ),
    (
        lambda g, v: g.registry.report_progress(v, OperationProgressUpdate("on it")),
        "id",
        OperationId,
        False,
    ),
    (lambda g, v: g.registry.register_watcher(v), "id", OperationId, False),
    (lambda g, v: g.registry.fail_operation(v, "no"), "id", OperationId, False),
    (lambda g, v: g.registry.cancel_operation(v), "id", OperationId, False),
    (lambda g, v: g.registry.request_retire(v), "id", OperationId, False),
    (lambda g, v: g.registry.mark_retired(v), "id", OperationId, False),
    (lambda g, v: g.registry.snapshot(v), "id", OperationId, False),
    (lambda g, v: g.registry.start_operations(v), "ids", OperationId, False),
    (lambda g, v: g.registry.start_operations([v]), "ids", OperationId, False),
    (lambda g, v: g.registry.wait_all(RunId.new(), v), "ids", OperationId, False),
    (lambda g, v: g.registry.wait_all(RunId.new(), [v]), "ids", OperationId, False),
    (lambda g, v: g.registry.wait_all(v, []), "run_id", RunId, False),
    (lambda g, v: g.all_ended(RunId.new(), v), "ids", OperationId, False),
    (lambda g, v: g.all_ended(v, []), "run_id", RunId, False),
    (
        lambda g, v: g.registry.capture_persistence_snapshot(v, g.bindings.cursor_state),
        "epoch_id",
        RuntimeEpochId,
        False,
    ),
    (
        lambda g, v: g.registry.capture_persistence_snapshot(g.bindings.epoch_id, v),
        "cursor_state",
        type(SessionRuntimeBindings.standalone(SessionId.new()).cursor_state),
        False,
    ),
]


@pytest.mark.parametrize(("call", "argument", "kind", "takes_none"), CALLS)
def test_a_wrong_argument_is_refused_in_words(
    call: Callable[[Given, Any], object], argument: str, kind: type, takes_none: bool
) -> None:
    given = Given()
    wrong: list[Any] = [7, RuntimeSessionAdapter, object(), {"a": 1}, RunId.new(), kind]
    wrong = [value for value in wrong if not isinstance(value, kind) or kind is object]
    if kind is not str:
        wrong += ["x", "x" * 100]
    if not takes_none:
        wrong.append(None)
    before = given.registry.list_operations()
    for value in wrong:
        with pytest.raises(ArgumentInvalid) as error:
            call(given, value)
        said = str(error.value)
        assert isinstance(error.value, TypeError)
        assert error.value.argument == argument
        assert f"as {argument}, and was given {error.value.actual}" in said
        assert error.value.expected in said
        assert len(said) < 400
        assert pickle.loads(pickle.dumps(error.value)).argument == argument
    assert given.registry.list_operations() == before


def test_a_session_is_named_by_its_uuid_or_text_too(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings
) -> None:
    id = bindings.session_id
    for named in (id.uuid, str(id)):
        assert adapter.contains_session(named)
        assert adapter.prepare_bindings(named) is bindings
        assert adapter.ops_lifecycle_registry(named) is bindings.ops_lifecycle
        observed = observe_session(named)
        assert observed.session_id == id
        observed.close()
        AgentFactory().build(named, SessionOwned(bindings)).close()
        assert not remove_unused(named)
    other = SessionId.new()
    adapter.register_session(str(other))
    adapter.reset_session(str(other))
    adapter.unregister_session(other.uuid)
    assert not adapter.contains_session(other)


def test_a_build_mode_that_is_none_says_what_to_write(bindings: SessionRuntimeBindings) -> None:
    """A build with raw bindings once made a separate registry, which received no completions."""
    token = bindings.to_token()
    build = AgentFactory().build
    for mode in (bindings, token, None, StandaloneEphemeral, SessionOwned, bindings.handle):
        with pytest.raises(TypeError) as error:
            build(bindings.session_id, mode)  # type: ignore[arg-type]
        assert "SessionOwned(bindings)" in str(error.value)
        assert "StandaloneEphemeral()" in str(error.value)
        assert token not in str(error.value)
    other = SessionRuntimeBindings.standalone(SessionId.new())
    with pytest.raises(BindingsMismatch):
        build(bindings.session_id, SessionOwned(other))
    with pytest.raises(ArgumentInvalid, match="the class SessionOwned itself"):
        build(bindings.session_id, SessionOwned)  # type: ignore[arg-type]


#: A call with a value of a wrong type for its record or field, and the text of its error.
RECORDS: list[tuple[Callable[[Given], object], str]] = [
    (lambda g: g.registry.register_operation("x"), "OperationSpec: it is the str 'x'"),  # type: ignore[arg-type]
    (lambda g: g.registry.register_operation(None), "OperationSpec: it is None"),  # type: ignore[arg-type]
    (
        lambda g: g.registry.register_operation(OperationSpec),  # type: ignore[arg-type]
        "OperationSpec: it is the class OperationSpec itself",
    ),
    (lambda g: g.registry.register_operations(["x"]), "OperationSpec: it is the str"),  # type: ignore[list-item]
    (
        lambda g: g.registry.register_operation(spec(id="x")),  # type: ignore[arg-type]
        "id is the str 'x', not OperationId",
    ),
    (
        lambda g: g.registry.register_operation(spec({"a": 1})),  # type: ignore[arg-type]
        "display_name is the dict {'a': 1}, not str",
    ),
    (lambda g: g.registry.complete_operation(g.id, "x"), "OperationResult: it is the str 'x'"),  # type: ignore[arg-type]
    (lambda g: g.registry.complete_operations([None]), "OperationResult: it is None"),  # type: ignore[list-item]
    (
        lambda g: g.registry.complete_operation(g.id, g.result(content={"a": 1})),
        "result.content is the dict {'a': 1}, not str",
    ),
    (
        lambda g: g.registry.complete_operation(g.id, g.result(content=[1])),
        "result.content is the list [1], not str",
    ),
    (
        lambda g: g.registry.complete_operation(g.id, g.result(duration_ms="x")),
        "result.duration_ms is the str 'x', not int",
    ),
    (lambda g: g.registry.complete_operation(g.id, g.result(duration_ms=-1)), ">= 0"),
    (lambda g: g.registry.fail_operation(g.id, 7), "error is the int 7, not str"),  # type: ignore[arg-type]
    (lambda g: g.registry.cancel_operation(g.id, 7), "reason is the int 7, not str or None"),  # type: ignore[arg-type]
    (lambda g: g.registry.terminate_owner(None), "reason is None, not str"),  # type: ignore[arg-type]
    (
        lambda g: g.registry.report_progress(g.id, "x"),  # type: ignore[arg-type]
        "OperationProgressUpdate: it is the str 'x'",
    ),
    (
        lambda g: g.registry.peer_ready(g.id, OperationPeerHandle("x", None)),  # type: ignore[arg-type]
        "trusted_peer is None, not TrustedPeerSpec",
    ),
]


@pytest.mark.parametrize(("call", "said"), RECORDS)
def test_a_wrong_record_is_refused_in_words(call: Callable[[Given], object], said: str) -> None:
    given = Given()
    before = given.registry.list_operations()
    with pytest.raises(RecordInvalid) as error:
        call(given)
    assert said in str(error.value)
    assert "`object`" not in str(error.value)
    assert given.registry.list_operations() == before


@pytest.mark.parametrize("value", [None, 7])
def test_several_that_are_none(value: Any) -> None:
    given = Given()
    for call in (given.registry.register_operations, given.registry.complete_operations):
        with pytest.raises(ArgumentInvalid, match="Iterable"):
            call(value)


@pytest.mark.parametrize("value", ["x", {"a": 1}, int, OperationId.new()])
def test_a_position_or_a_timeout_that_is_none(value: Any) -> None:
    given = Given()
    feed, watch = given.registry.completion_feed(), given.registry.register_watcher(given.id)
    position: list[Callable[[], object]] = [
        lambda: feed.list_since(value),
        lambda: feed.wait_for_advance(value, 0),
        lambda: asyncio.run(given.advanced(value)),
    ]
    timeout: list[Callable[[], object]] = [
        lambda: feed.wait_for_advance(0, value),
        lambda: watch.wait(value),
        lambda: given.registry.wait_all(RunId.new(), [given.id], value),
    ]
    for call in position:
        with pytest.raises(ArgumentInvalid, match="takes an integer as after_seq"):
            call()
    for call in timeout:
        with pytest.raises(ArgumentInvalid, match="takes a number of seconds or None as timeout"):
            call()


@pytest.mark.parametrize("function", ["inject", "quiescent"])
def test_a_loop_takes_functions(function: str) -> None:
    given = Given()
    for value in (None, True, "x"):
        functions: Any = {"inject": ignore, "quiescent": bool, function: value}
        with pytest.raises(ArgumentInvalid, match=f"takes a function as {function}"):
            RuntimeLoop(given.bindings, **functions)
