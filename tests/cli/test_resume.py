"""Runs that are resumed after all or some of their processes were killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
from pathlib import Path

import pytest

from shmepoch.cli.run.jobs import Job
from shmepoch.cli.run.past import operation_id
from shmepoch.epoch.operations import OperationStatus, status_of
from shmepoch.ids import SessionId
from shmepoch.memory.namespaces import segment_path
from tests.cli.running import (
    agent_of,
    ended,
    kill_all,
    nothing_left,
    processes_in,
    run,
    started,
    summary,
    told,
    waiting,
    waits,
)
from tests.cli.stored import applied, commands, history, ran, sessions, until_ran, with_status
from tests.support import empty_shared_memory, eventually, segments_in

_ROOT = Path(__file__).parents[2]
_FINISHED = (OperationStatus.COMPLETED, OperationStatus.FAILED)


def everything_was_told(store: Path, transcripts: Path) -> bool:
    """Whether the agents were told of all that the store has.

    They may have been told more: the last completions before the crash were not durable yet.
    """
    stored = {
        (str(item.epoch_id), item.entry.seq, str(item.entry.operation_id))
        for item in history(store)
    }
    return stored <= {
        (line["epoch_id"], line["seq"], line["operation_id"]) for line in told(transcripts)
    }


@pytest.mark.parametrize("begun", [1, 4, 7, 12])
def test_after_the_machine_went(namespace: str, tmp_path: Path, begun: int) -> None:
    store, transcripts = tmp_path / "store", tmp_path / "told"
    jobs = commands(tmp_path, 12, "sleep 0.15")
    stdin = "\n".join(jobs)
    arguments = ("-", "--json", "--store", store, "--sessions", 2, "--transcript", transcripts)
    with started(*arguments, stdin=stdin) as process:
        until_ran(tmp_path, jobs, begun)
        kill_all(namespace)
        ended(process)
    empty_shared_memory(namespace)
    finished, before = with_status(store, *_FINISHED), ran(tmp_path, jobs)

    done = run(*arguments, "--resume", stdin=stdin)
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert figures["finished_before"] == len(finished)
    assert (figures["commands"], figures["completed"], figures["failed"]) == (12, 12, 0)
    assert figures["operations"] == 12 + figures["retried"]
    assert figures["notices"]["lost"] == 0
    assert figures["notices"]["delivered"] >= figures["operations"]
    after = ran(tmp_path, jobs)
    assert {job: after[job] for job in finished} == {job: before[job] for job in finished}
    assert sorted(with_status(store, *_FINISHED)) == sorted(jobs)
    assert set(after) == set(jobs)
    assert everything_was_told(store, transcripts)
    nothing_left(namespace)


def test_after_the_machine_went_again_and_again(namespace: str, tmp_path: Path) -> None:
    store, transcripts = tmp_path / "store", tmp_path / "told"
    jobs = commands(tmp_path, 10, "sleep 0.2")
    stdin = "\n".join(jobs)
    arguments = ("-", "--json", "--store", store, "--transcript", transcripts)
    for resumed in range(4):
        already = ran(tmp_path, jobs).total()
        with started(*arguments, *["--resume"][:resumed], stdin=stdin) as process:
            until_ran(tmp_path, jobs, already + 3)
            kill_all(namespace)
            ended(process)
        empty_shared_memory(namespace)
    done = run(*arguments, "--resume", stdin=stdin)
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert (figures["completed"], figures["notices"]["lost"]) == (10, 0)
    assert figures["notices"]["delivered"] >= figures["operations"] == len(history(store))
    assert sorted(with_status(store, OperationStatus.COMPLETED)) == sorted(jobs)
    assert everything_was_told(store, transcripts)
    nothing_left(namespace)


def test_after_every_process_was_killed_the_live_epochs_go_on(
    namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the next run is in another namespace: it uses the namespace of the epochs."""
    store, transcripts = tmp_path / "store", tmp_path / "told"
    jobs = [*commands(tmp_path, 8, "sleep 0.1"), f"{waits(tmp_path)}; rm {tmp_path}/waiting"]
    stdin = "\n".join(jobs)
    arguments = ("-", "--json", "--store", store, "--transcript", transcripts)
    with started(*arguments, stdin=stdin) as process:
        waiting(tmp_path)
        eventually(lambda: len(with_status(store, OperationStatus.COMPLETED)) == 8, within=60)
        kill_all(namespace)
        ended(process)
    (segment,) = (path for path in segments_in(namespace) if path.suffix != ".doorbells")
    monkeypatch.setenv("SHMEPOCH_NAMESPACE", f"{namespace}-other")
    (tmp_path / "waiting").unlink()
    with started(*arguments, "--resume", stdin=stdin) as process:
        (command,) = waiting(tmp_path)
        assert segment in segments_in(namespace)
        command.kill()
        status, out, err = ended(process)
    assert status == 0, err
    figures = summary(out)
    assert figures["finished_before"] == 8
    assert (figures["completed"], figures["terminated"], figures["retried"]) == (9, 1, 1)
    assert figures["notices"]["lost"] == 0
    (session,) = figures["sessions"]
    assert session["watermark"] == 10
    assert {item.epoch_id for item in history(store)} == {history(store)[0].epoch_id}
    assert ran(tmp_path, jobs).total() == 8
    assert everything_was_told(store, transcripts)
    nothing_left(namespace)
    nothing_left(f"{namespace}-other")


def test_after_the_runtime_was_killed_its_children_are_waited_for(
    namespace: str, tmp_path: Path
) -> None:
    """Two of one command at the same time would fail: its lock is held as long as it runs."""
    store = tmp_path / "store"
    lock = f"exec 9>{tmp_path}/lock; flock -n 9 || exit 99"
    stubborn = f"{lock}; trap '' TERM; echo >>{tmp_path}/begun; sleep 1; echo >>{tmp_path}/ended"
    arguments = ("-", "--json", "--store", store, "--workers", 1)
    with started(*arguments, stdin=stubborn) as process:
        eventually((tmp_path / "begun").exists, within=60)
        process.kill()
        ended(process)
    done = run(*arguments, "--resume", stdin=stubborn)
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert (figures["completed"], figures["failed"]) == (1, 0)
    nothing_left(namespace)


def test_a_child_that_does_not_end_is_named(namespace: str, tmp_path: Path) -> None:
    store, transcripts = tmp_path / "store", tmp_path / "told"
    arguments = ("-", "--store", store, "--transcript", transcripts)
    with started(*arguments, stdin=f"{waits(tmp_path)}; true\n") as process:
        waiting(tmp_path)
        agent = agent_of(transcripts)
        agent.suspend()
        process.kill()
        process.wait()  # not until the agent closes its output
    refused = run(*arguments, "--resume", stdin=f"{waits(tmp_path)}; true\n")
    assert refused.returncode == 3
    assert f"still has agent process {agent.pid}" in refused.stderr
    agent.resume()
    eventually(lambda: not processes_in(namespace), within=30)
    empty_shared_memory(namespace)


def test_after_ctrl_c(namespace: str, tmp_path: Path) -> None:
    store, transcripts = tmp_path / "store", tmp_path / "told"
    flag = tmp_path / "flag"
    jobs = [f"echo one >>{tmp_path}/one", f"[ -e {flag} ] || {waits(tmp_path)}; true"]
    stdin = "\n".join([*jobs, f"touch {flag}"])
    arguments = ("-", "--json", "--store", store, "--workers", 1, "--transcript", transcripts)
    with started(*arguments, stdin=stdin) as process:
        waiting(tmp_path)
        os.killpg(process.pid, signal.SIGINT)
        status, out, err = ended(process)
    assert status == 130
    assert "--resume carries on" in err
    assert summary(out)["notices"] == {"delivered": 2, "duplicates": 0, "lost": 0}
    nothing_left(namespace)  # the store has everything

    flag.touch()
    done = run(*arguments, "--resume", stdin=stdin)
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    counts = ("commands", "finished_before", "operations", "completed", "cancelled", "retried")
    assert [figures[count] for count in counts] == [3, 1, 4, 3, 1, 1]
    assert figures["notices"] == {"delivered": 4, "duplicates": 0, "lost": 0}
    assert (tmp_path / "one").read_text() == "one\n"
    assert everything_was_told(store, transcripts)
    nothing_left(namespace)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_ended_run_leaves_nothing_in_memory_that_its_store_has(
    namespace: str, tmp_path: Path, number: signal.Signals
) -> None:
    store, flag = tmp_path / "store", tmp_path / "flag"
    jobs = [*commands(tmp_path, 5, "true"), f"[ -e {flag} ] || {waits(tmp_path)}; true"]
    arguments = ("-", "--json", "--store", store, "--workers", 1)
    with started(*arguments, stdin="\n".join([*jobs, "true"])) as process:
        waiting(tmp_path)
        process.send_signal(number)
        status, _, err = ended(process)
    assert status == 128 + number
    assert f"{number.name}: 1 command ended while running, 1 not run" in err
    assert err.splitlines()[-1] == f"shmepoch: --store {store} --resume carries on with this run"
    nothing_left(namespace)
    assert sorted(with_status(store, *_FINISHED)) == sorted(jobs[:5])
    flag.touch()
    done = run(*arguments, "--resume", stdin="\n".join([*jobs, "true"]))
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert (figures["finished_before"], figures["completed"], figures["cancelled"]) == (5, 7, 1)
    assert ran(tmp_path, jobs[:5]).total() == 5
    nothing_left(namespace)


def test_a_run_that_waits_for_children_of_another_is_ended_by_a_signal(
    namespace: str, tmp_path: Path
) -> None:
    store, transcripts = tmp_path / "store", tmp_path / "told"
    arguments = ("-", "--store", store, "--transcript", transcripts)
    stdin = f"{waits(tmp_path)}; true\n"
    with started(*arguments, stdin=stdin) as process:
        waiting(tmp_path)
        agent = agent_of(transcripts)
        agent.suspend()
        process.kill()
        process.wait()
    with started(*arguments, "--resume", stdin=stdin) as process:
        (session,) = sessions(store)
        mapped, name = Path(f"/proc/{process.pid}/maps"), segment_path(namespace, session).name
        eventually(lambda: name in mapped.read_text(), within=60)
        process.send_signal(signal.SIGINT)
        status, out, err = ended(process)
    assert (status, "Traceback" in err) == (130, False)
    assert "0 commands ended while running, 1 not run" in out
    assert len(segments_in(namespace)) == 1  # the agent has it
    agent.kill()
    eventually(lambda: not processes_in(namespace), within=30)
    empty_shared_memory(namespace)


def test_a_command_that_failed_is_finished(namespace: str, tmp_path: Path) -> None:
    store, flag = tmp_path / "store", tmp_path / "flag"
    stdin = f"echo >>{tmp_path}/tried; exit 3\n[ -e {flag} ] || {waits(tmp_path)}; true\n"
    arguments = ("-", "--json", "--store", store, "--workers", 1)
    with started(*arguments, stdin=stdin) as process:
        waiting(tmp_path)
        process.terminate()
        assert ended(process)[0] == 143
    flag.touch()
    done = run(*arguments, "--resume", stdin=stdin)
    assert done.returncode == 1, done.stderr
    figures = summary(done.stdout)
    assert (figures["completed"], figures["failed"], figures["finished_before"]) == (1, 1, 1)
    assert (tmp_path / "tried").read_text() == "\n"
    assert run(*arguments, "--resume", stdin=stdin).returncode == 2
    nothing_left(namespace)


def test_what_the_agent_was_not_told_is_delivered(namespace: str, tmp_path: Path) -> None:
    store, transcripts = tmp_path / "store", tmp_path / "told"
    jobs = [f"{waits(tmp_path)}; true", *(f"echo {number}" for number in range(5))]
    stdin = "\n".join([*jobs, f"test -e {tmp_path}/flag || {waits(tmp_path)}; true"])
    arguments = ("-", "--json", "--store", store, "--workers", 1, "--transcript")
    with started(*arguments, transcripts, stdin=stdin) as process:
        (command,) = waiting(tmp_path)
        agent = agent_of(transcripts)
        agent.suspend()
        command.kill()
        eventually(lambda: len(with_status(store, OperationStatus.COMPLETED)) == 6, within=60)
        kill_all(namespace)
        ended(process)
    assert told(transcripts) == []
    empty_shared_memory(namespace)
    (tmp_path / "flag").touch()
    done = run(*arguments, tmp_path / "again", "--resume", stdin=stdin)
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert figures["finished_before"] == 6
    assert figures["notices"] == {
        "delivered": figures["operations"],
        "duplicates": 0,
        "lost": 0,
    }
    lines = told(tmp_path / "again")
    assert [line.get("output") for line in lines][1:6] == [f"{number}\n" for number in range(5)]
    assert everything_was_told(store, tmp_path / "again")
    nothing_left(namespace)


def test_what_the_agent_forgets_is_counted_as_lost(
    namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a notice that was owed before; but not one that the agent had applied before."""
    store, first, second = tmp_path / "store", tmp_path / "first", tmp_path / "second"
    flag = tmp_path / "flag"
    stdin = f"true\ntest -e {flag} || {waits(tmp_path)}; true\n"
    arguments = ("-", "--json", "--store", store, "--workers", 1, "--transcript")
    with started(*arguments, first, stdin=stdin) as process:
        waiting(tmp_path)
        eventually(lambda: applied(store) == [1], within=60)
        agent_of(first).suspend()
        kill_all(namespace)
        ended(process)
    flag.touch()
    monkeypatch.setenv("FAULT", "agent-forgets")
    monkeypatch.setenv("FAULT_MARKER", str(tmp_path / "marker"))
    monkeypatch.setenv("PYTHONPATH", str(_ROOT))
    faulty = (sys.executable, "-m", "tests.cli.faulty")
    done = run(*arguments, second, "--resume", stdin=stdin, command=faulty)
    assert done.returncode == 0, done.stderr
    # The terminated attempt of the second command was owed when the run was resumed. The attempt
    # after that is forgotten with it if it ends before the agent's first turn.
    notices = summary(done.stdout)["notices"]
    assert notices["delivered"] + notices["lost"] == 2
    assert notices["lost"] >= 1
    nothing_left(namespace)


_ENDS = """
import os, signal, sys
from shmepoch.cli import main
from shmepoch.runtime.adapter import RuntimeSessionAdapter as adapter

unregister, left = adapter.unregister_session, [{after}]


def dying(self, session_id):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    unregister(self, session_id)


adapter.unregister_session = dying
main()
"""


@pytest.mark.parametrize("machine_goes", [False, True])
@pytest.mark.parametrize("after", [0, 1])
def test_killed_between_the_ends_of_its_sessions(
    namespace: str, tmp_path: Path, after: int, machine_goes: bool
) -> None:
    store, transcripts = tmp_path / "store", tmp_path / "told"
    jobs = commands(tmp_path, 4, "true")
    stdin = "\n".join(jobs)
    arguments = ("-", "--json", "--store", store, "--sessions", 2, "--transcript", transcripts)
    dying = (sys.executable, "-c", _ENDS.format(after=after))
    assert run(*arguments, stdin=stdin, command=dying).returncode == -signal.SIGKILL
    eventually(lambda: not processes_in(namespace), within=30)
    finished = with_status(store, *_FINISHED)
    if machine_goes:
        empty_shared_memory(namespace)
    done = run(*arguments, "--resume", stdin=stdin)
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert figures["completed"] == 4
    assert figures["finished_before"] >= len(finished)
    assert figures["notices"]["lost"] == 0
    assert all(ran(tmp_path, jobs)[job] == 1 for job in finished)
    assert everything_was_told(store, transcripts)
    nothing_left(namespace)


def test_a_run_that_goes_on_is_not_taken_over(namespace: str, tmp_path: Path) -> None:
    arguments = ("-", "--store", tmp_path / "store")
    stdin = f"{waits(tmp_path)}; true\n"
    with started(*arguments, stdin=stdin) as process:
        (command,) = waiting(tmp_path)
        second = run(*arguments, "--resume", stdin=stdin)
        assert second.returncode == 3
        assert str(process.pid) in second.stderr
        assert run(*arguments, stdin=stdin).returncode == 2
        command.kill()
        assert ended(process)[0] == 0
    nothing_left(namespace)


@pytest.fixture
def unfinished(namespace: str, tmp_path: Path) -> Path:
    """A store with an unfinished run of two commands in two sessions."""
    store = tmp_path / "store"
    stdin = f"{waits(tmp_path)}; true\ntrue\n"
    with started("-", "--store", store, "--sessions", 2, stdin=stdin) as process:
        waiting(tmp_path)
        kill_all(namespace)
        ended(process)
    empty_shared_memory(namespace)
    return store


def test_what_does_not_go_with_the_store_is_refused(
    namespace: str, unfinished: Path, tmp_path: Path
) -> None:
    waits_ = f"{waits(tmp_path)}; true"
    same = f"{waits_}\ntrue\n"

    def refusal(*arguments: object, stdin: str) -> str:
        refused = run("-", *arguments, stdin=stdin)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "Traceback" not in refused.stderr
        return refused.stderr

    resume = ("--store", unfinished, "--resume", "--sessions")
    changed = refusal(*resume, 2, stdin=f"{waits_}\nfalse\n")
    assert "line 2: 'true' there and line 2: 'false' here" in changed
    moved = refusal(*resume, 2, stdin=f"{waits_}\n\ntrue\n")
    assert "line 2: 'true' there and line 3: 'true' here" in moved
    fewer = refusal(*resume, 2, stdin=f"{waits_}\n")
    assert "line 2: 'true' there and no further command here" in fewer
    more = refusal(*resume, 2, stdin=f"{same}true\n")
    assert "no further command there and line 3: 'true' here" in more
    assert "resume it with --sessions 2" in refusal(*resume, 1, stdin=same)
    moved = refusal(*resume, 2, "--namespace", "elsewhere", stdin=same)
    assert f"is one of namespace {namespace!r}, not of 'elsewhere'" in moved
    again = refusal("--store", unfinished, stdin=same)
    assert "unfinished run of 2 commands in 2 sessions" in again
    assert "--store" in refusal("--resume", stdin=same)
    nothing = refusal("--store", tmp_path / "new", "--resume", stdin=same)
    assert "no unfinished run" in nothing


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("DELETE FROM entries", "0 entries stand where it should"),
        ("UPDATE entries SET entry = 'x'", "malformed"),
        ("UPDATE entries SET entry = replace(entry, 'jobs', 'soup')", "`jobs`"),
    ],
)
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_damaged_plan_is_refused(
    unfinished: Path, tmp_path: Path, damage: str, why: str, resume: tuple[str, ...]
) -> None:
    with contextlib.closing(sqlite3.connect(unfinished, isolation_level=None)) as store:
        plan = "(SELECT min(key) FROM epochs)"  # it was there before the first session
        store.execute(f"{damage} WHERE epoch = {plan}")
    stdin = f"{waits(tmp_path)}; true\ntrue\n"
    refused = run("-", "--store", unfinished, "--sessions", 2, *resume, stdin=stdin)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("shmepoch: the plan of the run in the store cannot be read: ")
    assert why in refused.stderr
    assert "name another file with --store" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_an_operation_follows_from_what_it_runs() -> None:
    session, job = SessionId.new(), Job(3, "echo é")
    ids = {
        operation_id(session, job, 0),
        operation_id(session, job, 1),
        operation_id(session, Job(4, "echo é"), 0),
        operation_id(session, Job(3, "echo e"), 0),
        operation_id(SessionId.new(), job, 0),
    }
    assert len(ids) == 5
    assert operation_id(session, Job(3, "echo é"), 0) in ids


def test_the_ends_that_finish_a_command_are_in_the_history(namespace: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = run("-", "--json", "--store", store, stdin="true\nfalse\n")
    assert done.returncode == 1
    statuses = sorted(status_of(item.entry.terminal_outcome) for item in history(store))
    assert statuses == sorted(_FINISHED)
    assert json.loads(done.stdout)["finished_before"] == 0
    nothing_left(namespace)


def test_what_a_child_left_running_is_run_again(namespace: str, tmp_path: Path) -> None:
    """Also if it is killed while the next run waits for its end."""
    store, flag = tmp_path / "store", tmp_path / "flag"
    stdin = f"[ -e {flag} ] || {waits(tmp_path)}; true\n"
    arguments = ("-", "--json", "--store", store, "--workers", 1)
    with started(*arguments, stdin=stdin) as process:
        (command,) = waiting(tmp_path)
        (worker,) = (one for one in command.parents() if one.ppid() == process.pid)
        worker.suspend()
        process.kill()
        process.wait()
    flag.touch()
    with started(*arguments, "--resume", stdin=stdin) as process:
        (session,) = sessions(store)
        mapped, name = Path(f"/proc/{process.pid}/maps"), segment_path(namespace, session).name
        eventually(lambda: name in mapped.read_text(), within=60)
        worker.kill()
        command.kill()
        status, out, err = ended(process)
    assert status == 0, err
    figures = summary(out)
    assert (figures["completed"], figures["terminated"], figures["retried"]) == (1, 1, 1)
    assert figures["notices"]["lost"] == 0
    nothing_left(namespace)
