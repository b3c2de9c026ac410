"""`shmepoch persist`: the process that keeps a namespace's epochs in a store."""

from __future__ import annotations

import contextlib
import resource
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmepoch import (
    OpsLifecycleConfig,
    Role,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
    SqliteRuntimeStore,
)
from shmepoch.memory.namespaces import segment_path
from tests.cli.running import COMMAND
from tests.runtime.completions import TOOL, drop_through, end
from tests.support import eventually


@contextlib.contextmanager
def persisting(path: Path, *before: str) -> Iterator[subprocess.Popen[str]]:
    """The command, which stores this test's namespace in `path`; `before` is a prefix that starts
    it."""
    with subprocess.Popen(
        [*before, *COMMAND, "persist", "--store", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def stored(path: Path, session_id: SessionId) -> int:
    """The last completion of the session that the store has."""
    if not path.exists():
        return 0
    with SqliteRuntimeStore(path) as store:
        found = store.load(session_id)
        return found.last_seq if found is not None else 0


@pytest.fixture
def sessions(adapter: RuntimeSessionAdapter) -> Iterator[list[SessionRuntimeBindings]]:
    """Two epochs of a live runtime that has no store."""
    bindings = [adapter.prepare_bindings(SessionId.new()) for _ in range(2)]
    yield bindings
    for one in bindings:
        if adapter.contains_session(one.session_id):
            adapter.unregister_session(one.session_id)


def test_live_epochs_and_those_that_come_are_stored(
    adapter: RuntimeSessionAdapter, sessions: list[SessionRuntimeBindings], tmp_path: Path
) -> None:
    path = tmp_path / "store"
    end(sessions[0], TOOL, TOOL)
    with persisting(path):
        eventually(lambda: stored(path, sessions[0].session_id) == 2)
        sessions.append(adapter.prepare_bindings(SessionId.new()))
        for one in sessions[1:]:
            end(one, TOOL)
            eventually(lambda one=one: stored(path, one.session_id) == 1)  # type: ignore[misc]
        roles = [one.role for one in sessions[2].participants()]
        assert sorted(roles) == [Role.PERSISTENCE, Role.RUNTIME]


def test_killed_and_started_again_it_goes_on(
    sessions: list[SessionRuntimeBindings], tmp_path: Path
) -> None:
    path, bindings = tmp_path / "store", sessions[0]
    for round in range(3):
        end(bindings, *[TOOL] * 5)
        with persisting(path) as process:
            eventually(lambda: stored(path, bindings.session_id) >= 5 * round + 1)  # noqa: B023
            end(bindings, TOOL)
            process.send_signal(signal.SIGKILL)
        end(bindings, *[TOOL] * 4)
    with persisting(path):
        eventually(lambda: stored(path, bindings.session_id) == 30)
    with SqliteRuntimeStore(path) as store:
        kept = store.list_entries(bindings.epoch_id, 0, 30)
    assert [entry.seq for entry in kept] == list(range(1, 31))
    assert kept == list(bindings.ops_lifecycle.completion_feed().list_since(0).entries)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_at_its_end_everything_is_stored(
    sessions: list[SessionRuntimeBindings], tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "store"
    end(sessions[0], TOOL)
    with persisting(path) as process:
        eventually(lambda: stored(path, sessions[0].session_id) == 1)
        end(sessions[0], *[TOOL] * 100)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out == f"stored 101 completions of 2 epochs in {path}\n"
    assert stored(path, sessions[0].session_id) == 101


def test_at_its_end_it_says_what_was_dropped_before_it_was_stored(
    namespace: str, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    config = OpsLifecycleConfig(max_completed=1, max_operations=1, feed_bytes=8192)
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=config) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        end(bindings, TOOL)
        dropped = drop_through(bindings, 1)
        last = bindings.ops_lifecycle.completion_feed().watermark()
        with persisting(path) as process:
            eventually(lambda: stored(path, bindings.session_id) == last)
            adapter.unregister_session(bindings.session_id)  # it is left before the end
            process.terminate()
            out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    kept = f"stored {last - dropped} completions of 1 epoch in {path}"
    assert out == f"{kept}; {dropped} were dropped before they were\n"
    assert f"completions 1 to {dropped} were dropped before they were stored" in err


def test_without_standard_streams_it_stores_all_the_same(
    sessions: list[SessionRuntimeBindings], tmp_path: Path
) -> None:
    path = tmp_path / "store"
    end(sessions[0], TOOL)
    with persisting(path, "sh", "-c", 'exec "$@" <&- >&- 2>&-', "-") as process:
        eventually(lambda: stored(path, sessions[0].session_id) == 1)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_nohup_is_respected(sessions: list[SessionRuntimeBindings], tmp_path: Path) -> None:
    path = tmp_path / "store"
    with persisting(path, "nohup") as process:
        end(sessions[0], TOOL)
        eventually(lambda: stored(path, sessions[0].session_id) == 1)
        process.send_signal(signal.SIGHUP)
        end(sessions[0], TOOL)
        eventually(lambda: stored(path, sessions[0].session_id) == 2)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_asks_twice_does_not_wait_for_the_store(
    sessions: list[SessionRuntimeBindings], tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "store"
    end(sessions[0], TOOL)
    with persisting(path) as process:
        eventually(lambda: stored(path, sessions[0].session_id) == 1)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        end(sessions[0], TOOL)

        def ended() -> bool:
            process.send_signal(number)  # two at once may be one
            return process.poll() is not None

        eventually(ended, within=60)
        _, err = process.communicate(timeout=60)
        holder.close()
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    with persisting(path):  # nothing is lost
        eventually(lambda: stored(path, sessions[0].session_id) == 2)


def test_without_descriptors_it_goes_on(
    adapter: RuntimeSessionAdapter, sessions: list[SessionRuntimeBindings], tmp_path: Path
) -> None:
    """It logs that it cannot search, and polls again."""
    path = tmp_path / "store"
    end(sessions[0], TOOL)
    with persisting(path) as process:
        eventually(lambda: stored(path, sessions[0].session_id) == 1)
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, hard))
        sessions.append(adapter.prepare_bindings(SessionId.new()))
        end(sessions[2], TOOL)
        assert process.stderr is not None
        assert "Too many open files" in process.stderr.readline()
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        eventually(lambda: stored(path, sessions[2].session_id) == 1)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err


def test_an_epoch_that_ends_is_let_go(
    adapter: RuntimeSessionAdapter, sessions: list[SessionRuntimeBindings], tmp_path: Path
) -> None:
    path, session_id = tmp_path / "store", sessions[0].session_id
    end(sessions[0], TOOL)
    with persisting(path):
        eventually(lambda: stored(path, session_id) == 1)
        first, second = sessions[0].epoch_id, adapter.reset_session(session_id)
        end(second, TOOL, TOOL)
        eventually(lambda: stored(path, session_id) == 2)
    with SqliteRuntimeStore(path) as store:
        epochs = [item.epoch_id for item in store.history(session_id)]
    assert epochs == [first, second.epoch_id, second.epoch_id]


def test_a_store_that_fails_does_not_keep_it(
    sessions: list[SessionRuntimeBindings], tmp_path: Path
) -> None:
    path = tmp_path / "store"
    end(sessions[0], TOOL)
    with persisting(path) as process:
        eventually(lambda: stored(path, sessions[0].session_id) == 1)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        end(sessions[0], TOOL)
        process.terminate()
        _, err = process.communicate(timeout=60)
        holder.close()
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "store" in err.splitlines()[-1]
    assert stored(path, sessions[0].session_id) == 1


def test_a_segment_that_is_damaged_is_named_once(
    namespace: str, sessions: list[SessionRuntimeBindings], tmp_path: Path
) -> None:
    path, damaged = tmp_path / "store", segment_path(namespace, SessionId.new())
    damaged.touch(mode=0o600)
    end(sessions[1], TOOL)
    try:
        with persisting(path) as process:
            eventually(lambda: stored(path, sessions[1].session_id) == 1)
            sessions[1].ops_lifecycle.check()
            process.terminate()
            _, err = process.communicate(timeout=60)
    finally:
        damaged.unlink()
    assert process.returncode == 0
    assert err.count("is not stored") == 1
