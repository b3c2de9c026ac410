"""Runs that are ended early: every process goes, and the status says why."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from shmepoch import SqliteRuntimeStore
from tests.cli.running import (
    COMMAND,
    DEADLINE_S,
    agent_of,
    ended,
    nothing_left,
    processes_in,
    run,
    started,
    summary,
    told,
    waiting,
    waits,
)
from tests.support import eventually, segments_in


def test_ctrl_c(namespace: str, tmp_path: Path) -> None:
    stdin = f"true\n{waits(tmp_path)}; true\ntimeout 600 setsid {waits(tmp_path)}\necho never\n"
    arguments = ("--json", "--workers", 2, "--transcript", tmp_path)
    with started("-", *arguments, stdin=stdin) as process:
        waiting(tmp_path, 2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
        status, out, err = ended(process)
    assert status == 130
    assert "Traceback" not in err
    figures = summary(out)
    counts = ("commands", "operations", "completed", "cancelled", "terminated", "failed")
    assert [figures[count] for count in counts] == [4, 3, 1, 2, 0, 0]
    assert figures["notices"] == {"delivered": 3, "duplicates": 0, "lost": 0}
    cancelled = [line for line in told(tmp_path) if line["status"] == "cancelled"]
    assert [line["output"] for line in cancelled] == ["the run was interrupted"] * 2
    nothing_left(namespace)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_signals_that_end_a_run(
    namespace: str, tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    with started("-", "--sessions", 2, stdin=f"{waits(tmp_path)}; true\n" * 2) as process:
        waiting(tmp_path, 2)
        process.send_signal(number)
        status, out, err = ended(process)
    assert (status, err) == (expected, "")
    assert "2 cancelled" in out.splitlines()[-1]
    nothing_left(namespace)


def test_commands_are_asked_to_end_before_they_are_killed(namespace: str, tmp_path: Path) -> None:
    polite = f"trap 'echo bye >{tmp_path}/bye; exit' TERM; {waits(tmp_path)} & wait"
    stubborn = f"trap '' TERM INT HUP; {waits(tmp_path)}; {waits(tmp_path)}"
    with started("-", "--workers", 2, stdin=f"{polite}\n{stubborn}\n") as process:
        waiting(tmp_path, 2)
        os.killpg(process.pid, signal.SIGINT)
        status, _, err = ended(process)
    assert (status, err) == (130, "")
    assert (tmp_path / "bye").read_text() == "bye\n"
    nothing_left(namespace)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills_what_still_runs(
    namespace: str, tmp_path: Path, second: signal.Signals
) -> None:
    slow = f"trap 'echo >{tmp_path}/asked; sleep 1; echo >{tmp_path}/bye' TERM"
    with started("-", stdin=f"{slow}; {waits(tmp_path)} & wait; wait\n") as process:
        waiting(tmp_path)
        os.killpg(process.pid, signal.SIGINT)
        eventually((tmp_path / "asked").exists)
        process.send_signal(second)
        status, out, err = ended(process)
    assert (status, err) == (130, "")
    assert "1 cancelled" in out.splitlines()[-1]
    assert not (tmp_path / "bye").exists()
    nothing_left(namespace)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_keep_coming_change_nothing_more(
    namespace: str, tmp_path: Path, number: signal.Signals
) -> None:
    with started("-", stdin=f"{waits(tmp_path)}; true\n") as process:
        waiting(tmp_path)
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(0.002)
        status, _, err = ended(process)
    assert (status, err) == (128 + number, "")
    nothing_left(namespace)


def test_a_signal_that_comes_before_the_first_session(namespace: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    SqliteRuntimeStore(store).close()
    holder = sqlite3.connect(store, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with started("-", "--store", store, stdin="true\n") as process:
        runtime = psutil.Process(process.pid)
        eventually(lambda: str(store) in [file.path for file in runtime.open_files()], within=60)
        process.send_signal(signal.SIGTERM)
        holder.close()
        status, out, _ = ended(process)
    assert status == 143
    assert "SIGTERM: 0 commands ended while running, 1 not run" in out
    nothing_left(namespace)
    assert run("-", "--store", store, "--resume", stdin="true\n").returncode == 0


def test_a_second_signal_ends_children_that_stand_still(namespace: str, tmp_path: Path) -> None:
    arguments = ("-", "--json", "--transcript", tmp_path)
    with started(*arguments, stdin=f"{waits(tmp_path)}; true\ntrue\n") as process:
        (waiter,) = waiting(tmp_path)
        agent_of(tmp_path).suspend()
        (worker,) = (one for one in waiter.parents() if one.ppid() == process.pid)
        worker.suspend()
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            while "SIGINT: " not in (line := process.stderr.readline()) and line:
                pass
        status, _, err = ended(process)
    assert (status, "Traceback" in err) == (130, False)
    nothing_left(namespace)


def test_what_is_not_run_is_said(namespace: str, tmp_path: Path) -> None:
    stdin = f"true\n{waits(tmp_path)}; true\n{waits(tmp_path)}; true\n" + "true\n" * 3
    with started("-", "--workers", 2, stdin=stdin) as process:
        waiting(tmp_path, 2)
        process.send_signal(signal.SIGINT)
        status, out, err = ended(process)
    assert (status, err) == (130, "")
    assert "SIGINT: 2 commands ended while running, 3 not run; a second signal" in out
    nothing_left(namespace)


@pytest.mark.parametrize("count", range(1, 6))
def test_ctrl_c_while_the_children_are_starting(namespace: str, count: int) -> None:
    """Whatever they are doing, they print no error, and none stays."""
    with started("-", "--workers", 4, stdin="sleep 600; true\n" * 4) as process:
        runtime = psutil.Process(process.pid)
        eventually(lambda: len(runtime.children()) >= count)
        os.killpg(process.pid, signal.SIGINT)
        status, _, err = ended(process)
    assert (status, err) == (130, "")
    nothing_left(namespace)


def test_ctrl_c_before_there_is_anything_to_run(namespace: str) -> None:
    with subprocess.Popen(
        [*COMMAND, "run", "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        # It has read what it imports, and waits for its file.
        eventually(lambda: "pipe_read" in Path(f"/proc/{process.pid}/wchan").read_text())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_nohup_is_respected(tmp_path: Path) -> None:
    command = ["nohup", *COMMAND, "run", "-"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(f"{waits(tmp_path)}; true\n")
        process.stdin.close()
        process.stdin = None
        (waiter,) = waiting(tmp_path)
        process.send_signal(signal.SIGHUP)
        waiter.kill()
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0


def test_whoever_reads_the_events_may_leave(namespace: str) -> None:
    with started("-", stdin="true\nsleep 0.2\nsleep 600; true\n") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        status, _, err = ended(process)
    assert (status, err) == (141, "")
    nothing_left(namespace)


def test_a_killed_runtime_takes_its_children_and_their_commands_with_it(
    namespace: str, tmp_path: Path
) -> None:
    stdin = f"{waits(tmp_path)}; true\nsetsid {waits(tmp_path)}\n"
    with started("-", "--workers", 2, stdin=stdin) as process:
        waiting(tmp_path, 2)
        process.kill()
        ended(process)
        eventually(lambda: not processes_in(namespace), within=30)
    assert segments_in(namespace)
    assert run("-", stdin="true\n").returncode == 0  # the next run removes what this one left
    nothing_left(namespace)


def test_a_worker_that_stands_still_does_not_hold_up_the_end(
    namespace: str, tmp_path: Path
) -> None:
    with started("-", stdin=f"{waits(tmp_path)}; true\n") as process:
        (waiter,) = waiting(tmp_path)
        (worker,) = (one for one in waiter.parents() if one.ppid() == process.pid)
        worker.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        status, _, _ = ended(process)
    assert status == 130
    nothing_left(namespace)
