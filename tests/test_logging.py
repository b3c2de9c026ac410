"""What is logged: each event is documented as it is in the code, and has its fields."""

from __future__ import annotations

import ast
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from shmepoch import (
    AgentFactory,
    OperationId,
    OpsLifecycleConfig,
    PersistenceChannel,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    StoreWriteFailed,
)
from shmepoch import _native as at
from shmepoch.events import Event
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, drop_through, end
from tests.runtime.stores import WatchedStore
from tests.support import empty_shared_memory, eventually, spec

_ROOT = Path(__file__).parents[1]
_ORDINARY = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Logged(NamedTuple):
    """All calls that log one event."""

    levels: set[str]
    loggers: set[str]
    fields: frozenset[str]


def logging_calls() -> Iterator[tuple[str, ast.Call]]:
    """Each call that logs, and its logger."""
    for path in sorted((_ROOT / "shmepoch").rglob("*.py")):
        logger = ".".join(path.relative_to(_ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="_log"))):
                    yield logger, node


def levels(call: ast.Call) -> set[str]:
    assert isinstance(call.func, ast.Attribute)
    match call.func.attr, call.args:
        case "exception", _:
            return {"error"}
        case "log", [ast.IfExp(body=ast.Attribute(attr=one), orelse=ast.Attribute(attr=other)), *_]:
            return {one.lower(), other.lower()}
    return {call.func.attr}


def event_and_fields(call: ast.Call) -> tuple[str, frozenset[str]]:
    """The event of a call that logs, and the names of its fields."""
    [extra] = [keyword.value for keyword in call.keywords if keyword.arg == "extra"]
    match extra:
        case ast.Call(func=ast.Name(id="about"), args=[ast.Attribute(attr=name)], keywords=fields):
            return Event[name].value, frozenset(field.arg or "**" for field in fields)
    raise AssertionError(ast.unparse(call))


def logged() -> dict[str, Logged]:
    """What the code logs."""
    calls = defaultdict(list)
    for logger, call in logging_calls():
        event, fields = event_and_fields(call)
        calls[event].append((logger, levels(call), fields))
    return {
        event: Logged(
            {level for _, levels, _ in found for level in levels},
            {logger for logger, _, _ in found},
            frozenset[str]().union(*(fields for _, _, fields in found)),
        )
        for event, found in calls.items()
    }


def documented() -> dict[str, Logged]:
    """What docs/logging.md says that it logs."""
    page = (_ROOT / "docs/logging.md").read_text().partition("## Events")[2]
    found = {}
    for line in re.findall(r"^\| `.*", page, re.M):
        event, levels, loggers, fields, meaning, advice = line.strip("| ").split(" | ")
        assert meaning
        assert advice
        found[event.strip("`")] = Logged(
            set(levels.split(", ")),
            set(re.findall(r"`([\w.]+)`", loggers)),
            frozenset(re.findall(r"`(\w+)`", fields)),
        )
    return found


def test_every_event_is_documented_as_it_is_logged() -> None:
    code, page = logged(), documented()
    assert set(code) == set(page) == set(Event)
    assert code == page


def test_no_field_takes_the_place_of_an_ordinary_one() -> None:
    fields = frozenset[str]().union(*(one.fields for one in logged().values()))
    assert fields & _ORDINARY == set()


# --- real ones ------------------------------------------------------------------------------------


class Log:
    """What was logged, by event."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "shmepoch")
        self._caplog = caplog

    def of(self, event: Event) -> list[dict[str, object]]:
        """The fields of each record of an event."""
        return [
            {name: value for name, value in vars(one).items() if name not in _ORDINARY | {"event"}}
            for one in list(self._caplog.records)
            if vars(one).get("event") == event
        ]

    def one(self, event: Event) -> dict[str, object]:
        """The fields of the one record of an event, once there is one."""
        [fields] = eventually(lambda: self.of(event))
        return fields


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    return Log(caplog)


def begin(bindings: SessionRuntimeBindings, channel: Channel) -> None:
    """Begin two operations, and end without ending them."""
    for _ in range(2):
        id = OperationId.new()
        bindings.ops_lifecycle.register_operation(spec(id=id))
        bindings.ops_lifecycle.provisioning_succeeded(id)
    channel.say("begun")
    channel.hear()


def test_the_life_of_a_session(namespace: str, log: Log) -> None:
    """It is made, loses a worker, is reset, survives a reboot and a runtime, and ends."""
    store, session_id = WatchedStore(), SessionId.new()
    session = str(session_id)
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        first = adapter.prepare_bindings(session_id)
        epoch = str(first.epoch_id)
        assert log.one(Event.EPOCH_CREATED) == {
            "session": session,
            "epoch": epoch,
            "reason": "the store has none",
        }
        with start(begin, first, method="subprocess") as worker:
            assert worker.hear() == "begun"
            worker.kill()
            assert log.one(Event.PARTICIPANTS_ENDED) == {
                "session": session,
                "epoch": epoch,
                "pids": [worker.pid],
                "operations": 2,
            }
        second = adapter.reset_session(session_id)
        after = str(second.epoch_id)
        assert log.one(Event.EPOCH_ROTATED) == {"session": session, "epoch": after, "before": epoch}
        end(second, TOOL, TOOL, TOOL)
    assert log.one(Event.SESSION_GIVEN_UP) == {"session": session, "epoch": after}
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        adapter.prepare_bindings(session_id)
        assert log.one(Event.EPOCH_CONTINUED) == {"session": session, "epoch": after}
    empty_shared_memory(namespace)
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        adapter.prepare_bindings(session_id)
        assert log.one(Event.EPOCH_RECOVERED) == {"session": session, "epoch": after, "seq": 3}
        adapter.unregister_session(session_id)
    assert log.one(Event.SESSION_UNREGISTERED) == {"session": session, "epoch": after}


def test_a_store_that_fails_and_works_again(bindings: SessionRuntimeBindings, log: Log) -> None:
    store = WatchedStore()
    with PersistenceChannel(store) as channel:
        channel.follow(bindings)
        store.failure = lambda: StoreWriteFailed("the disk is full")
        end(bindings, TOOL)
        reason = log.one(Event.STORE_FAILED)["reason"]
        assert "the disk is full" in str(reason)
        store.failure = None
        assert log.one(Event.STORE_WORKS) == {}
        store.failure = lambda: StoreWriteFailed("the disk is full")
        end(bindings, TOOL)
        eventually(lambda: len(log.of(Event.STORE_FAILED)) == 2)
    assert log.one(Event.CHANNEL_CLOSED_BEHIND) == {"completions": 1}


def test_what_is_dropped(namespace: str, log: Log) -> None:
    """Before it was stored, and before the agent was told."""
    store = WatchedStore()
    config = OpsLifecycleConfig(max_completed=1, max_operations=1, feed_bytes=8192)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        about = {"session": str(bindings.session_id), "epoch": str(bindings.epoch_id)}
        factory = AgentFactory()
        boundary = factory.build(bindings.session_id, SessionOwned(bindings))
        with boundary.drain():
            end(bindings, TOOL)
        dropped = drop_through(bindings, 1)
        gap = {**about, "seq": dropped, "completions": dropped}
        boundary.drain()
        boundary.drain()  # of what is not committed it is told again
        assert log.one(Event.AGENT_GAP) == gap
        boundary.close()
        with PersistenceChannel(store) as channel:
            channel.follow(bindings)
            assert log.one(Event.STORE_GAP) == gap
        bindings.cursor_state.agent_applied_cursor.advance(2**40)
        factory.build(bindings.session_id, SessionOwned(bindings)).drain()
        ahead = log.one(Event.CURSOR_AHEAD)
        assert ahead.items() >= {**about, "seq": 2**40, "cursor": "agent_applied_cursor"}.items()
        adapter.unregister_session(bindings.session_id)


def test_a_transition_that_was_broken_off(bindings: SessionRuntimeBindings, log: Log) -> None:
    """As by a writer that is killed between its intent and its commit."""
    with start(begin, bindings, method="subprocess") as worker:
        assert worker.hear() == "begun"
        bindings.shared_segment().memory.store(at.INTENT_AT, 1)
        worker.kill()
        assert log.one(Event.EPOCH_REPAIRED) == {
            "session": str(bindings.session_id),
            "epoch": str(bindings.epoch_id),
            "repairs": 1,
        }


def test_a_name_that_is_lost(adapter: RuntimeSessionAdapter, log: Log) -> None:
    bindings = adapter.prepare_bindings(SessionId.new())
    segment = bindings.shared_segment()
    segment.path.unlink()
    assert log.one(Event.NAME_LOST) == {
        "session": str(bindings.session_id),
        "epoch": str(bindings.epoch_id),
        "path": str(segment.path),
    }
