"""Killed agents and workers: nothing is lost, run twice at the same time, or left behind."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from pathlib import Path

import psutil
import pytest

from shmepoch.cli.run.session import MOST_UNTOLD
from tests.cli.faulty import FAULTS
from tests.cli.running import (
    agent_of,
    ended,
    nothing_left,
    run,
    started,
    summary,
    told,
    transcripts,
    waiting,
    waits,
)
from tests.support import eventually

_ROOT = Path(__file__).parents[2]


def worker_of(command: psutil.Process, runtime: int) -> psutil.Process:
    """The worker whose descendant `command` is."""
    (worker,) = (one for one in command.parents() if one.ppid() == runtime)
    return worker


@pytest.mark.parametrize("seed", range(2))
def test_a_run_whose_processes_are_killed_all_the_time_loses_nothing(
    namespace: str, tmp_path: Path, seed: int
) -> None:
    # Two of one command at the same time would fail: the lock is held as long as the command runs.
    stdin = "".join(
        f"exec 9>{tmp_path}/lock{number}; flock -n 9 || exit 99; sleep 0.7; echo {number}\n"
        for number in range(12)
    )
    transcript = tmp_path / "told"
    arguments = ("--sessions", 2, "--kill-every", 1, "--retries", 1000, "--seed", seed)
    done = run("-", "--json", *arguments, "--transcript", transcript, stdin=stdin)
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert (figures["commands"], figures["completed"], figures["failed"]) == (12, 12, 0)
    assert figures["operations"] == 12 + figures["terminated"] == 12 + figures["retried"]
    assert figures["notices"]["lost"] == 0
    assert figures["notices"]["delivered"] == figures["operations"]
    assert figures["kills"] >= figures["restarts"] > 0
    for session in figures["sessions"]:
        lines = transcripts(transcript)[session["session_id"]]
        seqs = [line["seq"] for line in lines]
        assert set(seqs) == set(range(1, session["watermark"] + 1))
        assert len({(line["seq"], line["operation_id"]) for line in lines}) == len(set(seqs))
        # An agent may apply in its turn what was completed after the turn was injected, and the
        # run may end before the loop has observed that.
        assert session["cursors"].pop("agent_applied_cursor") == session["watermark"]
        assert max(session["cursors"].values()) <= session["watermark"]
    completed = {line["output"] for line in told(transcript) if line["status"] == "completed"}
    assert completed == {f"{number}\n" for number in range(12)}
    nothing_left(namespace)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_child_killed_at_the_worst_moment(
    namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    marker = tmp_path / "marker"
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("FAULT_MARKER", str(marker))
    monkeypatch.setenv("PYTHONPATH", str(_ROOT))
    arguments = ("--json", "--workers", 1, "--retries", 1, "--transcript", tmp_path)
    faulty = (sys.executable, "-m", "tests.cli.faulty")
    # It ends after the agent's first turn: no later turn compensates for a lost one.
    stdin = f"until ls {tmp_path}/*.jsonl; do sleep 0.01; done >/dev/null 2>&1; sleep 0.3; echo one"
    done = run("-", *arguments, stdin=stdin, command=faulty)
    assert marker.exists()
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert (figures["commands"], figures["completed"]) == (1, 1)
    if fault != "worker-completed":  # then the run may end before the death is noticed
        assert figures["restarts"] == 1
    # Only a worker that had registered its operation and not ended it leaves one to be terminated.
    interrupted = fault in ("worker-registered", "worker-started", "worker-ran")
    assert figures["terminated"] == figures["retried"] == int(interrupted)
    repeated = int(fault == "agent-wrote")
    assert figures["notices"] == {"delivered": 1 + interrupted, "duplicates": repeated, "lost": 0}
    lines = told(tmp_path)
    assert [line["seq"] for line in lines] == [1] * (1 + repeated) + [2] * interrupted
    assert lines[-1]["output"] == "one\n"
    nothing_left(namespace)


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param("", id="plain"),
        pytest.param("exec ", id="exec"),
        pytest.param("timeout 600 ", id="group of its own"),
        pytest.param("setsid --wait ", id="session of its own"),
        pytest.param("nohup setsid -f ", id="daemon"),
    ],
)
def test_the_command_of_a_killed_worker_ends_before_it_is_run_again(
    namespace: str, tmp_path: Path, prefix: str
) -> None:
    stdin = f"[ -e {tmp_path}/waiting ] && exit; {prefix}{waits(tmp_path)}; sleep 600\n"
    arguments = ("--json", "--workers", 1, "--retries", 1, "--transcript", tmp_path)
    with started("-", *arguments, stdin=stdin) as process:
        (command,) = waiting(tmp_path)
        worker = worker_of(command, process.pid)
        worker.kill()
        status, out, _ = ended(process)
    assert status == 0
    figures = summary(out)
    assert (figures["operations"], figures["terminated"], figures["retried"]) == (2, 1, 1)
    assert not command.is_running()
    lines = told(tmp_path)
    assert [line["status"] for line in lines] == ["terminated", "completed"]
    assert f"worker process {worker.pid}" in lines[0]["output"]
    nothing_left(namespace)


def test_without_retries_a_command_whose_worker_died_is_reported(
    namespace: str, tmp_path: Path
) -> None:
    with started("-", "--transcript", tmp_path, stdin=f"{waits(tmp_path)}; true\n") as process:
        (command,) = waiting(tmp_path)
        worker_of(command, process.pid).kill()
        status, out, err = ended(process)
    assert (status, err) == (1, "")
    assert "session 1: terminated line 1 (" in out
    assert [line["status"] for line in told(tmp_path)] == ["terminated"]
    nothing_left(namespace)


def test_a_worker_without_a_command_is_replaced(tmp_path: Path) -> None:
    arguments = ("--json", "--workers", 2, "--transcript", tmp_path)
    with started("-", *arguments, stdin=f"{waits(tmp_path)}; true\ntrue\n") as process:
        (command,) = waiting(tmp_path)
        # The other one is idle once its own command has ended, and the agent was told.
        eventually(
            lambda: any(b"completed" in path.read_bytes() for path in tmp_path.glob("*.jsonl")),
            within=60,
        )
        others = set(psutil.Process(process.pid).children())
        others -= {worker_of(command, process.pid), agent_of(tmp_path)}
        (idle,) = (child for child in others if "resource_tracker" not in " ".join(child.cmdline()))
        idle.kill()
        eventually(lambda: not idle.is_running())
        command.kill()
        status, out, _ = ended(process)
    figures = summary(out)
    assert (status, figures["restarts"], figures["completed"]) == (0, 1, 2)


def test_an_agent_that_stands_still_holds_up_no_command(tmp_path: Path) -> None:
    stdin = f"{waits(tmp_path)}; true\ntouch {tmp_path}/one\ntouch {tmp_path}/two\n"
    with started("-", "--json", "--workers", 1, "--transcript", tmp_path, stdin=stdin) as process:
        (command,) = waiting(tmp_path)
        agent = agent_of(tmp_path)
        agent.send_signal(signal.SIGSTOP)
        command.kill()
        eventually((tmp_path / "two").exists, within=60)
        assert process.poll() is None
        agent.send_signal(signal.SIGCONT)
        status, out, _ = ended(process)
    assert status == 0
    assert summary(out)["notices"] == {"delivered": 3, "duplicates": 0, "lost": 0}


def test_while_the_agent_is_far_behind_nothing_new_is_started(tmp_path: Path) -> None:
    """So the feed never has to drop a completion that the agent was not told of."""
    stdin = f"{waits(tmp_path)}; true\n" + "true\n" * 500
    arguments = ("--json", "--workers", 1, "--transcript", tmp_path)
    with started("-", *arguments, stdin=stdin) as process:
        (command,) = waiting(tmp_path)
        agent = agent_of(tmp_path)
        agent.send_signal(signal.SIGSTOP)
        command.kill()
        assert process.stderr is not None
        said = b""
        # It has stopped once it says nothing for a second; on a slow machine perhaps not yet.
        while said.count(b"completed") < 300 and select.select([process.stderr], [], [], 1.0)[0]:
            said += os.read(process.stderr.fileno(), 65536)
        agent.send_signal(signal.SIGCONT)
        status, out, rest = ended(process)
    assert status == 0
    assert summary(out)["notices"] == {"delivered": 501, "duplicates": 0, "lost": 0}
    begun, told_of, untold = 0, 0, []
    for line in (said.decode() + rest).splitlines():
        begun += "started" in line
        if match := re.search(r"agent has been told of (\d+)", line):
            told_of = int(match[1])
        untold.append(begun - told_of)
    assert max(untold) <= MOST_UNTOLD
