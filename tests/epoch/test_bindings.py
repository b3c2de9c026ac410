"""Bindings: one process's access to an epoch, and how another process gets its own."""

from __future__ import annotations

import base64
import copy
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import msgspec
import pytest

from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.bindings import SessionOwned, SessionRuntimeBindings, StandaloneEphemeral
from shmepoch.epoch.handle import EpochHandle
from shmepoch.errors import (
    BindingsClosed,
    BindingsNotTransferable,
    CursorsOnly,
    EpochGone,
    EpochSealed,
    NamespaceInvalid,
    ParticipantsExhausted,
    TokenInvalid,
    WitnessMismatch,
)
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.namespaces import list_sessions
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment
from shmepoch.runtime.adapter import RuntimeSessionAdapter
from tests.epoch.operations import end, spec
from tests.support import mappings


@pytest.fixture
def adapter(namespace: str) -> Iterator[RuntimeSessionAdapter]:
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as made:
        yield made
    for session_id in list_sessions(namespace):
        left = SharedSegment.attach(namespace, session_id)
        left.unlink()
        left.close()


@pytest.fixture
def bindings(adapter: RuntimeSessionAdapter) -> SessionRuntimeBindings:
    return adapter.prepare_bindings(SessionId.new())


@pytest.fixture
def handle(bindings: SessionRuntimeBindings) -> EpochHandle:
    assert bindings.handle is not None
    return bindings.handle


def elsewhere(bindings: SessionRuntimeBindings, program: str) -> str:
    """The output of a new process that has the token in its environment as TOKEN."""
    setup = (
        "import os\n"
        "from shmepoch.epoch.bindings import SessionRuntimeBindings\n"
        "bindings = SessionRuntimeBindings.from_token(os.environ['TOKEN'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", setup + program],
        env=os.environ | {"TOKEN": bindings.to_token()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- passing them on ------------------------------------------------------------------------------


def test_here_they_resolve_to_the_same_object(bindings: SessionRuntimeBindings) -> None:
    assert SessionRuntimeBindings.from_token(bindings.to_token()) is bindings
    assert SessionRuntimeBindings.from_token(f"\n {bindings.to_token()} \n") is bindings
    assert pickle.loads(pickle.dumps(bindings)) is bindings
    assert copy.copy(bindings) is bindings
    assert copy.deepcopy([bindings])[0] is bindings


def test_elsewhere_they_attach_to_the_same_epoch(bindings: SessionRuntimeBindings) -> None:
    bindings.ops_lifecycle.register_operation(spec("from here"))
    bindings.cursor_state.agent_applied_cursor.advance(7)
    said = elsewhere(
        bindings,
        "registry = bindings.ops_lifecycle\n"
        "(found,) = registry.list_operations()\n"
        "registry.cancel_operation(found.id, 'from there')\n"
        "bindings.cursor_state.runtime_observed_seq.advance(3)\n"
        "print(bindings.session_id, bindings.epoch_id, found.display_name,\n"
        "      bindings.cursor_state.agent_applied_cursor.load(), bindings.role)\n",
    )
    assert said == f"{bindings.session_id} {bindings.epoch_id} from here 7 worker"
    (entry,) = bindings.ops_lifecycle.completion_feed().list_since(0).entries
    assert getattr(entry.terminal_outcome, "reason", None) == "from there"
    assert bindings.cursor_state.runtime_observed_seq.load() == 3


def test_in_the_environment_of_another_process(bindings: SessionRuntimeBindings) -> None:
    program = (
        "from shmepoch import SessionRuntimeBindings\n"
        "with SessionRuntimeBindings.from_env() as bindings:\n"
        "    with bindings.operation('work') as operation:\n"
        "        operation.complete('there')\n"
    )
    environment = bindings.env()
    assert {**environment, **os.environ} == environment
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    (entry,) = bindings.ops_lifecycle.completion_feed().list_since(0).entries
    assert (entry.display_name, entry.terminal_outcome.text) == ("work", "there")
    assert [one.role for one in bindings.participants()] == [Role.RUNTIME]  # it has left


def test_an_environment_of_ones_own(bindings: SessionRuntimeBindings) -> None:
    environment = bindings.env({"PATH": "/bin"})
    assert environment.keys() == {"PATH", "SHMEPOCH_BINDINGS"}
    assert SessionRuntimeBindings.from_env(environment) is bindings


def test_an_environment_without_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHMEPOCH_BINDINGS", raising=False)
    with pytest.raises(TokenInvalid, match="no SHMEPOCH_BINDINGS"):
        SessionRuntimeBindings.from_env()
    with pytest.raises(TokenInvalid):
        SessionRuntimeBindings.from_env({"SHMEPOCH_BINDINGS": "nonsense"})


def test_pickled_into_another_process(bindings: SessionRuntimeBindings) -> None:
    data = pickle.dumps({"bindings": bindings, "same": bindings}).hex()
    said = elsewhere(
        bindings,
        "import pickle\n"
        f"found = pickle.loads(bytes.fromhex('{data}'))\n"
        "print(found['bindings'] is found['same'] is bindings)\n",
    )
    assert said == "True"


def test_no_text_shows_the_key(bindings: SessionRuntimeBindings, handle: EpochHandle) -> None:
    key = handle.witness
    secrets = (repr(key)[2:-1], key.hex(), base64.b64encode(key).decode(), handle.to_token())
    owned = SessionOwned(bindings)
    for text in map(str, (bindings, handle, owned, [bindings], [handle])):
        assert str(bindings.session_id) in text
        assert str(bindings.epoch_id) in text
        assert not any(secret in text for secret in secrets)
    assert repr(owned) == f"SessionOwned({bindings.session_id}, {bindings.epoch_id})"


@pytest.mark.parametrize("shared", [True, False])
def test_they_show_all_that_they_are(bindings: SessionRuntimeBindings, shared: bool) -> None:
    shown = bindings if shared else SessionRuntimeBindings.standalone(bindings.session_id)
    shown.cursor_state.runtime_observed_seq.advance(3)
    assert repr(shown) == (
        f"SessionRuntimeBindings(session_id={shown.session_id!r}, epoch_id={shown.epoch_id!r}, "
        f"ops_lifecycle=<RuntimeOpsLifecycleRegistry>, cursor_state={shown.cursor_state!r})"
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "name", ["session_id", "epoch_id", "ops_lifecycle", "cursor_state", "handle", "other"]
)
def test_they_cannot_be_made_another_epochs(
    bindings: SessionRuntimeBindings, name: str, shared: bool
) -> None:
    other = SessionRuntimeBindings.standalone(SessionId.new())
    changed = bindings if shared else SessionRuntimeBindings.standalone(bindings.session_id)
    before = [getattr(changed, each, None) for each in (name, "history")]
    for _ in range(2):  # before and after the first use
        with pytest.raises(AttributeError, match=f"{name} of bindings cannot be assigned to"):
            setattr(changed, name, getattr(other, name, None))
        assert [getattr(changed, each, None) for each in (name, "history")] == before


def test_what_is_no_token_or_handle(bindings: SessionRuntimeBindings) -> None:
    wrong: Any
    for wrong in (None, 5, b"shmepoch1.", bindings, SessionRuntimeBindings, [bindings.to_token()]):
        with pytest.raises(TypeError, match="to_token"):
            SessionRuntimeBindings.from_token(wrong)
        with pytest.raises(TypeError, match="EpochHandle"):
            SessionRuntimeBindings.attach(wrong)
    wrong = bindings.to_token()
    with pytest.raises(TypeError, match="EpochHandle"):
        SessionRuntimeBindings.attach(wrong)


def test_each_epoch_has_a_key_of_its_own(adapter: RuntimeSessionAdapter) -> None:
    keys = set()
    for _ in range(5):
        handle = adapter.prepare_bindings(SessionId.new()).handle
        assert handle is not None
        assert len(handle.witness) == 16
        keys.add(handle.witness)
    assert len(keys) == 5


# --- tokens ---------------------------------------------------------------------------------------


def test_a_token_is_one_word_for_a_command_line(bindings: SessionRuntimeBindings) -> None:
    token = bindings.to_token()
    assert token.startswith("shmepoch1.")
    assert token.replace(".", "").replace("-", "").replace("_", "").isalnum()
    assert token.isascii()


def test_a_token_that_was_cut(bindings: SessionRuntimeBindings) -> None:
    token = bindings.to_token()
    for length in range(len(token)):
        with pytest.raises(TokenInvalid) as refused:
            SessionRuntimeBindings.from_token(token[:length])
        assert "unchanged" in str(refused.value)
        assert refused.value.reason in str(refused.value)


def test_a_token_that_was_edited() -> None:
    """Any one character, in tokens of every length modulo the encoding's block."""
    letters = "AZaz09-_.=+/ \u00e9"
    for length in range(1, 4):
        handle = EpochHandle(
            namespace="n" * length,
            session_id=SessionId.new(),
            epoch_id=RuntimeEpochId.new(),
            witness=os.urandom(16),
        )
        token = handle.to_token()
        assert EpochHandle.from_token(token) == handle
        for place, letter in enumerate(token):
            for other in {*letters, chr(ord(letter) ^ 1), letter.swapcase()} - {letter}:
                edited = token[:place] + other + token[place + 1 :]
                with pytest.raises(TokenInvalid):
                    EpochHandle.from_token(edited)


@pytest.mark.parametrize(
    "extra",
    [
        "A",
        "AAAA",
        ".",
        "\x00",
        "x" * 10_000,
        "=",
        "==",
    ],
)
def test_a_token_with_more_behind_it(handle: EpochHandle, extra: str) -> None:
    with pytest.raises(TokenInvalid):
        EpochHandle.from_token(handle.to_token() + extra)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "begin with"),
        ("hello", "begin with"),
        ("hello.world", "begin with"),
        (".", "begin with"),
        ("shmepoch2.AAAA", "version is 'shmepoch2'"),
        ("shmepoch.AAAA", "version is 'shmepoch'"),
        ("shmepoch1.", "cut or edited"),
        ("shmepoch1.!!!!", "cut or edited"),
        ("shmepoch1.\u00e9", "cut or edited"),
        ("shmepoch1." + "A" * 200, "cut or edited"),
    ],
)
def test_what_is_no_token(text: str, reason: str) -> None:
    with pytest.raises(TokenInvalid, match=reason):
        SessionRuntimeBindings.from_token(text)


def sealed_up(payload: Any, witness: bytes) -> str:
    """A token with any payload and the right checksum."""
    from shmepoch.epoch import handle as module

    data = msgspec.msgpack.encode(payload)
    body = base64.urlsafe_b64encode(data + module._mac(data, witness))
    return "shmepoch1." + body.decode().rstrip("=")


@pytest.mark.parametrize(
    "payload",
    [
        ("n", b"s" * 16, b"e" * 16, b"short"),
        ("n", b"s" * 15, b"e" * 16, b"w" * 16),
        ("n", b"s" * 16, b"", b"w" * 16),
        ("n", b"s" * 16, b"e" * 16),
        (5, b"s" * 16, b"e" * 16, b"w" * 16),
        {"namespace": "n"},
        None,
    ],
    ids=repr,
)
def test_a_token_of_something_else(payload: Any) -> None:
    with pytest.raises(TokenInvalid):
        EpochHandle.from_token(sealed_up(payload, b"w" * 16))


def test_a_token_is_the_only_one_of_its_handle() -> None:
    """msgpack can write one length in several widths, and a process with the key can sign them
    all."""
    from shmepoch.epoch import handle as module

    plain = msgspec.msgpack.encode(("n", b"s" * 16, b"e" * 16, b"w" * 16))
    for payload, read in ((plain, True), (plain.replace(b"\xa1n", b"\xd9\x01n"), False)):
        body = base64.urlsafe_b64encode(payload + module._mac(payload, b"w" * 16))
        with nullcontext() if read else pytest.raises(TokenInvalid):
            assert EpochHandle.from_token("shmepoch1." + body.decode().rstrip("="))


@pytest.mark.parametrize("name", ["../x", "", "a/b", "n" * 65, "a.b", "n\x00"])
def test_a_token_cannot_name_a_path(name: str) -> None:
    token = sealed_up((name, b"s" * 16, b"e" * 16, b"w" * 16), b"w" * 16)
    with pytest.raises((NamespaceInvalid, TokenInvalid)):
        SessionRuntimeBindings.from_token(token)


# --- attaching ------------------------------------------------------------------------------------


def other_process(handle: EpochHandle, **changes: Any) -> SharedSegment:
    """Attach like a process that has no bindings of the epoch yet."""
    changed = msgspec.structs.replace(handle, **changes)
    return SharedSegment.attach_epoch(
        changed.namespace, changed.session_id, changed.epoch_id, changed.witness
    )


def test_another_witness(bindings: SessionRuntimeBindings, handle: EpochHandle) -> None:
    for witness in (b"w" * 16, handle.witness[:-1] + bytes([handle.witness[-1] ^ 1])):
        with pytest.raises(WitnessMismatch) as refused:
            other_process(handle, witness=witness)
        assert refused.value.epoch_id == bindings.epoch_id
        with pytest.raises(WitnessMismatch):
            SessionRuntimeBindings.attach(msgspec.structs.replace(handle, witness=witness))
    assert not bindings.sealed
    other_process(handle).close()


def test_a_sealed_epoch(bindings: SessionRuntimeBindings, handle: EpochHandle) -> None:
    bindings.shared_segment().seal()
    assert bindings.sealed
    for attach in (other_process, SessionRuntimeBindings.attach):
        with pytest.raises(EpochSealed) as refused:
            attach(handle)
        assert refused.value.epoch_id == bindings.epoch_id


def test_an_epoch_that_was_followed_by_another(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings, handle: EpochHandle
) -> None:
    fresh = adapter.reset_session(bindings.session_id)
    assert fresh.epoch_id != bindings.epoch_id
    for attach in (other_process, SessionRuntimeBindings.attach):
        with pytest.raises(EpochSealed) as refused:
            attach(handle)
        assert refused.value.epoch_id == bindings.epoch_id


def test_an_epoch_that_is_gone(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings, handle: EpochHandle
) -> None:
    adapter.unregister_session(bindings.session_id)
    for attach in (other_process, SessionRuntimeBindings.attach):
        with pytest.raises(EpochGone) as refused:
            attach(handle)
        error = refused.value
        assert (error.session_id, error.epoch_id) == (bindings.session_id, bindings.epoch_id)
        assert error.name == bindings.shared_segment().name
        assert "RemoveIPC" in str(error)


def test_a_session_of_another_namespace(handle: EpochHandle) -> None:
    with pytest.raises(EpochGone):
        other_process(handle, namespace=f"{handle.namespace}x")


def test_a_full_table_of_participants(namespace: str) -> None:
    config = OpsLifecycleConfig(max_participants=2)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        handle = bindings.handle
        assert handle is not None
        first, second = other_process(handle), other_process(handle)
        first.join(Role.WORKER)
        with pytest.raises(ParticipantsExhausted) as refused:
            second.join(Role.WORKER)
        assert refused.value.limit == 2
        assert "max_participants" in str(refused.value)
        first.close()
        second.join(Role.WORKER)
        assert len(bindings.participants()) == 2
        second.close()
        adapter.unregister_session(bindings.session_id)


def test_a_segment_of_cursors_only_makes_no_bindings(namespace: str) -> None:
    segment = SharedSegment.allocate(
        namespace, None, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.publish()
    handle = EpochHandle(
        namespace=namespace,
        session_id=segment.session_id,
        epoch_id=segment.epoch_id,
        witness=segment.witness,
    )
    with pytest.raises(CursorsOnly) as refused:
        SessionRuntimeBindings.attach(handle)
    left = segment.participants.list()
    del refused
    gc.collect()
    segment.unlink()
    segment.close()
    assert left == []


def test_bindings_that_are_let_go_of_leave_no_mapping(namespace: str) -> None:
    segment = SharedSegment.allocate(
        namespace,
        OpsLifecycleConfig(),
        session_id=SessionId.new(),
        epoch_id=RuntimeEpochId.new(),
    )
    segment.publish()
    gc.collect()
    gc.disable()  # freed at once, not by the collector
    try:
        mapped = mappings(segment)
        found = SessionRuntimeBindings.of_segment(
            SharedSegment.attach(namespace, segment.session_id)
        )
        end(found.ops_lifecycle)
        assert mappings(segment) == mapped + 1
        found.close()
        del found
        assert mappings(segment) == mapped
    finally:
        gc.enable()
        segment.unlink()
        segment.close()


def test_what_was_closed_is_no_longer_changed(
    bindings: SessionRuntimeBindings, handle: EpochHandle
) -> None:
    registry, cursors = bindings.ops_lifecycle, bindings.cursor_state
    ended = end(registry)
    bindings.close()
    bindings.close()
    with pytest.raises(BindingsClosed) as refused:
        registry.register_operation(spec())
    assert refused.value.epoch_id == bindings.epoch_id
    with pytest.raises(BindingsClosed):
        registry.collect_completed()
    assert [found.id for found in registry.list_operations()] == [ended]
    assert registry.completion_feed().watermark() == 1
    assert cursors.snapshot().agent_applied_cursor == 0
    again = SessionRuntimeBindings.attach(handle)
    assert again is not bindings
    assert [found.id for found in again.ops_lifecycle.list_operations()] == [ended]
    again.close()


def test_roles(bindings: SessionRuntimeBindings) -> None:
    assert bindings.role is Role.RUNTIME
    (me,) = bindings.participants()
    assert (me.pid, me.role, me.alive, me.is_self) == (os.getpid(), Role.RUNTIME, True, True)
    bindings.announce(Role.OBSERVER)
    assert [found.role for found in bindings.participants()] == [Role.OBSERVER]
    assert bindings.participants()[0].number == me.number
    bindings.announce(Role.RUNTIME)


# --- standalone -----------------------------------------------------------------------------------


def test_standalone_bindings_stay_where_they_are() -> None:
    session_id = SessionId.new()
    bindings = SessionRuntimeBindings.standalone(session_id)
    assert (bindings.session_id, bindings.handle, bindings.role) == (session_id, None, None)
    assert bindings.participants() == []
    for leave in (bindings.to_token, lambda: pickle.dumps(bindings), bindings.shared_segment):
        with pytest.raises(BindingsNotTransferable) as refused:
            leave()
        assert "prepare_bindings" in str(refused.value)
    assert copy.copy(bindings) is bindings
    bindings.announce(Role.AGENT)
    bindings.close()
    end(bindings.ops_lifecycle)
    assert bindings.ops_lifecycle.completion_feed().watermark() == 1


def test_build_modes_are_values(bindings: SessionRuntimeBindings) -> None:
    assert StandaloneEphemeral() == StandaloneEphemeral()
    assert repr(StandaloneEphemeral()) == "StandaloneEphemeral()"
    assert len({StandaloneEphemeral(), StandaloneEphemeral()}) == 1
    assert SessionOwned(bindings) == SessionOwned(bindings)
    assert len({SessionOwned(bindings), SessionOwned(bindings)}) == 1
    other = SessionRuntimeBindings.standalone(bindings.session_id)
    assert SessionOwned(bindings) != SessionOwned(other)
    assert StandaloneEphemeral() != SessionOwned(bindings)
