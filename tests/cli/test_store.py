"""Runs with a store: its contents, and how a run reacts when the store fails."""

from __future__ import annotations

import multiprocessing
import signal
import sqlite3
import sys
from pathlib import Path

import pytest

from shmepoch import OpsLifecycleConfig, RuntimeSessionAdapter, SessionId, SqliteRuntimeStore
from shmepoch.cli.run import agent, transcript
from shmepoch.cli.run.plan import RUNS
from shmepoch.epoch.operations import OperationStatus
from tests.cli.running import (
    ended,
    kill_all,
    nothing_left,
    processes_in,
    run,
    started,
    summary,
    waiting,
    waits,
)
from tests.cli.stored import commands, ran, with_status
from tests.runtime.completions import TOOL, end
from tests.support import eventually, segments_in


def one_after_another(folder: Path) -> tuple[Path, Path, Path, str]:
    """A store, the folders in which two commands wait, and the commands.

    When there is a file `flag` the second one does not wait.
    """
    first, second = folder / "first", folder / "second"
    first.mkdir()
    second.mkdir()
    stdin = f"{waits(first)}; true\n[ -e {folder}/flag ] || {waits(second)}; true\n"
    return folder / "store", first, second, stdin


def locked(store: Path) -> sqlite3.Connection:
    """A connection that keeps others from writing to the store."""
    holder = sqlite3.connect(store, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    return holder


def test_a_finished_run_leaves_its_history_and_room_for_the_next(
    namespace: str, tmp_path: Path
) -> None:
    store, stdin = tmp_path / "store", "true\nfalse\n"
    ids = []
    for _ in range(2):
        done = run("-", "--json", "--store", store, "--sessions", 2, stdin=stdin)
        assert done.returncode == 1, done.stderr
        ids += [session["session_id"] for session in summary(done.stdout)["sessions"]]
        nothing_left(namespace)
    with SqliteRuntimeStore(store) as opened:
        assert {str(id) for id in opened.sessions()} == {*ids, str(RUNS)}
        assert [opened.load(id) for id in opened.sessions()] == [None] * 5
    assert sorted(with_status(store, *OperationStatus)) == ["false"] * 2 + ["true"] * 2


_CANNOT_OPEN = """
from shmepoch.cli import main
from shmepoch.errors import SharedMemoryExhausted
from shmepoch.runtime.adapter import RuntimeSessionAdapter as adapter

prepare, opened = adapter.prepare_bindings, []


def exhausted(self, session_id):
    if opened:
        raise SharedMemoryExhausted(1, 0, "/dev/shm")
    opened.append(session_id)
    return prepare(self, session_id)


adapter.prepare_bindings = exhausted
main()
"""


_NO_PROCESS = """
from multiprocessing import resource_tracker
from shmepoch.cli import main


def none_left():
    raise BlockingIOError(11, "Resource temporarily unavailable")


resource_tracker.ensure_running = none_left
main()
"""


@pytest.mark.parametrize("cannot", [_CANNOT_OPEN, _NO_PROCESS])
def test_a_run_that_cannot_begin_leaves_nothing_to_resume(
    namespace: str, tmp_path: Path, cannot: str
) -> None:
    store, stdin = tmp_path / "store", "true\ntrue\n"
    arguments = ("-", "--store", store, "--sessions", 2)
    failed = run(*arguments, stdin=stdin, command=(sys.executable, "-c", cannot))
    assert failed.returncode == 3
    assert "Traceback" not in failed.stderr
    nothing_left(namespace)
    assert run(*arguments, stdin=stdin).returncode == 0


def test_a_store_that_cannot_be_used_is_refused_before_anything_runs(
    namespace: str, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("no database, and longer than the header of one would be" * 10)
    for path in (text, tmp_path, tmp_path / "missing" / "store"):
        refused = run("-", "--store", path, stdin=f"touch {tmp_path}/ran\n")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith(f"shmepoch: {path} cannot be used as a store: ")
    assert not (tmp_path / "ran").exists()
    nothing_left(namespace)


def test_a_store_that_fails_does_not_hold_up_commands_and_nothing_is_lost(
    namespace: str, tmp_path: Path
) -> None:
    """Completions that it did not take are in shared memory, and a resumed run stores them."""
    store = tmp_path / "store"
    jobs = [f"{waits(tmp_path)}; true", *commands(tmp_path, 4, "true")]
    stdin = "\n".join(jobs)
    arguments = ("-", "--json", "--store", store, "--workers", 1)
    with started(*arguments, stdin=stdin) as process:
        (command,) = waiting(tmp_path)
        holder = locked(store)
        command.kill()
        status, out, err = ended(process)
        holder.close()
    assert (status, out) == (3, "")
    *_, how, why = err.splitlines()
    assert how == f"shmepoch: --store {store} --resume carries on with this run"
    assert "the store did not take a write" in why
    assert "Traceback" not in err
    eventually(lambda: not processes_in(namespace), within=30)
    assert len(segments_in(namespace)) == 1
    assert ran(tmp_path, jobs[1:]).total() == 4
    done = run(*arguments, "--resume", stdin=stdin)
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert (figures["finished_before"], figures["completed"]) == (5, 5)
    assert ran(tmp_path, jobs[1:]).total() == 4
    assert sorted(with_status(store, OperationStatus.COMPLETED)) == sorted(jobs)
    nothing_left(namespace)


def test_a_command_is_shown_as_completed_once_it_is_durable(namespace: str, tmp_path: Path) -> None:
    """If the machine crashes before that, the command runs again."""
    store, first, second, stdin = one_after_another(tmp_path)
    with started("-", "--store", store, "--workers", 1, stdin=stdin) as process:
        (command,) = waiting(first)
        holder = locked(store)
        command.kill()
        (command,) = waiting(second)  # so the first one has ended
        assert process.stdout is not None
        shown: list[str] = []
        while not any("started    line 2" in line for line in shown):
            shown.append(process.stdout.readline())
        assert not any("completed" in line for line in shown)
        assert with_status(store, OperationStatus.COMPLETED) == []
        holder.execute("ROLLBACK")
        holder.close()
        while "completed  line 1" not in shown[-1]:
            shown.append(process.stdout.readline())
            assert shown[-1]
        assert len(with_status(store, OperationStatus.COMPLETED)) == 1
        command.kill()
        status, out, err = ended(process)
    assert (status, "completed  line 2" in out) == (0, True), err
    nothing_left(namespace)


_IMPATIENT = """
from shmepoch.cli import main
from shmepoch.cli.run import command

command._STORE_S = 0.5
if __name__ == "__main__":
    main()
"""


def test_what_finished_before_is_durable_before_it_is_shown(namespace: str, tmp_path: Path) -> None:
    store, first, second, stdin = one_after_another(tmp_path)
    arguments = ("-", "--store", store, "--workers", 1)
    with started(*arguments, stdin=stdin) as process:
        (command,) = waiting(first)
        holder = locked(store)
        command.kill()
        waiting(second)
        kill_all(namespace)
        ended(process)
    impatient = (sys.executable, "-c", _IMPATIENT)
    refused = run(*arguments, "--resume", stdin=stdin, command=impatient)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "the store did not take a write" in refused.stderr.splitlines()[-1]
    holder.close()
    (tmp_path / "flag").touch()
    done = run(*arguments, "--resume", stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert "2 commands in 1 session, 1 of them finished before" in done.stdout
    nothing_left(namespace)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_run_that_is_ended_while_its_store_fails_leaves_what_it_lacks(
    namespace: str, tmp_path: Path, signals: int
) -> None:
    store, first, second, stdin = one_after_another(tmp_path)
    arguments = ("-", "--json", "--store", store, "--workers", 1)
    with started(*arguments, stdin=stdin) as process:
        (command,) = waiting(first)
        holder = locked(store)
        command.kill()
        waiting(second)
        err = ""
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            while "SIGTERM: " not in (line := process.stderr.readline()) and line:
                err += line
        status, _, rest = ended(process)
        holder.close()
    err += rest
    assert (status, "Traceback" in err) == (143, False)
    assert err.splitlines()[-1] == f"shmepoch: --store {store} --resume carries on with this run"
    eventually(lambda: not processes_in(namespace), within=30)
    assert segments_in(namespace)
    (tmp_path / "flag").touch()
    done = run(*arguments, "--resume", stdin=stdin)
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert (figures["finished_before"], figures["completed"]) == (1, 2)
    nothing_left(namespace)


@pytest.mark.parametrize("with_store", [True, False])
def test_the_agent_finds_in_the_store_what_the_feed_has_dropped(
    namespace: str, tmp_path: Path, with_store: bool
) -> None:
    path, told, session_id = tmp_path / "store", tmp_path / "told", SessionId.new()
    config = OpsLifecycleConfig(max_completed=8)
    context = multiprocessing.get_context("spawn")
    with (
        SqliteRuntimeStore(path) as store,
        RuntimeSessionAdapter.persistent(store, namespace=namespace, config=config) as adapter,
    ):
        bindings = adapter.prepare_bindings(session_id)
        feed = bindings.ops_lifecycle.completion_feed()
        while not (dropped := feed.list_since(0).dropped_through):
            end(bindings, *[TOOL] * 100, reason="x" * 400)
            eventually(lambda: store.last_seq(bindings.epoch_id) == feed.watermark())
        ours, theirs = context.Pipe()
        arguments = theirs, bindings.to_token(), told, path if with_store else None
        process = context.Process(target=agent.main, args=arguments)
        process.start()
        theirs.close()
        assert ours.poll(60)
        ours.close()
        process.join(60)
        lines = transcript.read(told)
        gaps = [(line.after_seq, line.seq) for line in lines if line.after_seq is not None]
        assert gaps == ([] if with_store else [(0, dropped)])
        first = 1 if with_store else dropped + 1
        seqs = [line.seq for line in lines if line.after_seq is None]
        assert seqs == list(range(first, feed.watermark() + 1))
        adapter.unregister_session(session_id)
    assert process.exitcode == 0
