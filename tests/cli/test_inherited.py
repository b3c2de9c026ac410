"""State that a run inherits from its parent does not change the run or its commands."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cli.running import (
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
from tests.support import empty_shared_memory, eventually

#: The states of a parent that execs the command, or starts it.
_INHERIT = """
import os, resource, signal, subprocess, sys, time
{prelude}
os.execv(sys.executable, [sys.executable, "-m", "shmepoch", *sys.argv[1:]])
"""
_IGNORE_CHILDREN = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
_IGNORE_AND_BLOCK_ALL = """
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGHUP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
"""
_AS_NOHUP = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
#: A child with a child, which the grandparent inherits when the file exists.
_CHILDREN = """
script = "sleep 600 & echo $! >{folder}/inner; until [ -e {folder}/go ]; do sleep 0.05; done"
null = subprocess.DEVNULL
outer = subprocess.Popen(["/bin/sh", "-c", script], stdin=null, stdout=null, stderr=null)
open("{folder}/outer", "w").write(str(outer.pid))
while not os.path.exists("{folder}/inner") or not open("{folder}/inner").read().strip():
    time.sleep(0.01)
"""
_SLEEPER = "null = subprocess.DEVNULL\nsubprocess.Popen(['sleep', '600'], stdout=null, stderr=null)"
_SUBREAPER = "import ctypes; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)"


def inheriting(prelude: str) -> tuple[str, ...]:
    """The command, started by a parent that has run `prelude`."""
    return (sys.executable, "-c", _INHERIT.format(prelude=prelude))


def outputs(folder: Path) -> dict[str, str]:
    """The output of each command."""
    return {line["command"]: line["output"] for line in told(folder)}


def worker_above(command: psutil.Process) -> psutil.Process:
    """The worker that runs a command."""
    return next(one for one in command.parents() if "spawn_main" in " ".join(one.cmdline()))


@pytest.mark.parametrize("prelude", [_IGNORE_CHILDREN, _IGNORE_AND_BLOCK_ALL])
def test_a_failed_command_has_failed_whatever_is_ignored(
    namespace: str, tmp_path: Path, prelude: str
) -> None:
    arguments = ("-", "--json", "--transcript", tmp_path)
    done = run(*arguments, stdin="exit 3\nkill -9 $$\ntrue\n", command=inheriting(prelude))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    figures = summary(done.stdout)
    assert (figures["completed"], figures["failed"]) == (1, 2)
    assert [line["status"] for line in told(tmp_path)].count("failed") == 2
    nothing_left(namespace)


def test_a_bad_line_is_found_though_children_are_ignored(tmp_path: Path) -> None:
    bad = f"touch {tmp_path}/ran\necho 'open\n"
    done = run("-", stdin=bad, command=inheriting(_IGNORE_CHILDREN))
    assert done.returncode == 2
    assert "standard input, line 2: " in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_killed_worker_is_noticed_though_children_are_ignored(
    namespace: str, tmp_path: Path
) -> None:
    stdin = f"[ -e {tmp_path}/waiting ] && exit; {waits(tmp_path)}; true\n"
    arguments = ("-", "--json", "--workers", 1, "--retries", 1)
    command = inheriting(_IGNORE_CHILDREN)
    with started(*arguments, stdin=stdin, command=command) as process:
        (waiter,) = waiting(tmp_path)
        (worker,) = (one for one in waiter.parents() if one.ppid() == process.pid)
        worker.kill()
        status, out, err = ended(process)
    assert (status, "Traceback" in err) == (0, False)
    figures = summary(out)
    assert (figures["terminated"], figures["retried"], figures["restarts"]) == (1, 1, 1)
    nothing_left(namespace)


@pytest.mark.parametrize("prelude", ["", _IGNORE_AND_BLOCK_ALL, _AS_NOHUP])
def test_commands_have_default_signals_and_three_descriptors(tmp_path: Path, prelude: str) -> None:
    also = "os.dup2(os.open(os.devnull, os.O_RDONLY), 7, inheritable=True)"
    signals = "grep -E '^Sig(Blk|Ign)' /proc/self/status"
    open_now = "exec ls /proc/self/fd"
    command = inheriting(f"{also}\n{prelude}")
    done = run("-", "--transcript", tmp_path, stdin=f"{signals}\n{open_now}\n", command=command)
    assert done.returncode == 0, done.stderr
    said = outputs(tmp_path)
    assert [int(line.split()[1], 16) for line in said[signals].splitlines()] == [0, 0]
    assert said[open_now].split() == ["0", "1", "2", "3"]  # the last is the listing's own


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_run_hears_what_was_blocked_and_ignored(
    namespace: str, tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    command = inheriting(_IGNORE_AND_BLOCK_ALL)
    with started("-", stdin=f"{waits(tmp_path)}; true\n", command=command) as process:
        waiting(tmp_path)
        process.send_signal(number)
        assert ended(process)[0] == expected
    nothing_left(namespace)


@pytest.mark.parametrize(("inherited", "expected"), [(0o027, "0027"), (0o777, "0077")])
def test_files_are_their_owner_s_whatever_the_umask(
    tmp_path: Path, inherited: int, expected: str
) -> None:
    folder = tmp_path / "told"
    command = inheriting(f"os.umask({inherited})")
    done = run("-", "--transcript", folder, stdin="umask\n", command=command)
    assert done.returncode == 0, done.stderr
    assert outputs(folder) == {"umask": f"{expected}\n"}
    (transcript,) = folder.iterdir()
    for path, mode in ((folder, 0o777), (transcript, 0o666)):
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~int(expected, 8)


def test_a_low_limit_of_descriptors_is_for_commands(tmp_path: Path) -> None:
    """A runtime needs a few descriptors for each child."""
    prelude = "_, most = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
    prelude += "resource.setrlimit(resource.RLIMIT_NOFILE, (40, most))"
    arguments = ("-", "--sessions", 8, "--workers", 1, "--transcript", tmp_path)
    done = run(*arguments, stdin="ulimit -n\n" * 8, command=inheriting(prelude))
    assert done.returncode == 0, done.stderr
    assert [line["output"] for line in told(tmp_path)] == ["40\n"] * 8


@pytest.mark.parametrize("subreaper", [False, True])
def test_children_from_before_an_exec_are_left_alone(
    namespace: str, tmp_path: Path, subreaper: bool
) -> None:
    """Also their children, which the run inherits when their parent ends."""
    stdin = f"[ -e {tmp_path}/waiting ] && exit; {waits(tmp_path)}; true\n"
    arguments = ("-", "--json", "--workers", 1, "--retries", 1)
    prelude = _CHILDREN.format(folder=tmp_path) + _SUBREAPER * subreaper
    with started(*arguments, stdin=stdin, command=inheriting(prelude)) as process:
        (waiter,) = waiting(tmp_path)
        outer, inner = (
            psutil.Process(int((tmp_path / name).read_text())) for name in ("outer", "inner")
        )
        (tmp_path / "go").touch()
        eventually(lambda: not outer.is_running() or outer.status() == psutil.STATUS_ZOMBIE)
        worker_above(waiter).kill()  # and everything that it started
        status, out, err = ended(process)
        assert (status, "Traceback" in err) == (0, False)
        assert summary(out)["retried"] == 1
        assert inner.is_running()
        assert inner.status() != psutil.STATUS_ZOMBIE
        inner.kill()
    nothing_left(namespace)


def test_over_other_children_a_run_ends_by_signals_as_ever(namespace: str, tmp_path: Path) -> None:
    command = inheriting(_SLEEPER)
    with started("-", stdin=f"{waits(tmp_path)}; true\n", command=command) as process:
        waiting(tmp_path)
        (stranger,) = (
            one for one in psutil.Process(process.pid).children() if one.name() == "sleep"
        )
        os.killpg(process.pid, signal.SIGINT)
        stranger.wait(30)  # it was in the terminal's group, too
        status, out, err = ended(process)
    assert (status, err) == (130, "")
    assert "1 cancelled" in out.splitlines()[-1]
    nothing_left(namespace)


def test_over_other_children_a_killed_run_takes_its_own_with_it(
    namespace: str, tmp_path: Path
) -> None:
    command = inheriting(_SLEEPER)
    with started("-", stdin=f"{waits(tmp_path)}; true\n", command=command) as process:
        waiting(tmp_path)
        strangers = [one for one in psutil.Process(process.pid).children() if one.name() == "sleep"]
        process.kill()
        ended(process)
    eventually(lambda: set(processes_in(namespace)) == set(strangers), within=30)
    kill_all(namespace)
    empty_shared_memory(namespace)


_APART = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def _may_unshare() -> bool:
    tried = subprocess.run([*_APART, "true"], capture_output=True, check=False)
    return tried.returncode == 0 and shutil.which("nsenter") is not None


def _sleepers_below(first: psutil.Process) -> list[psutil.Process]:
    """The two long sleeps, a child of process 1 and one of a worker; empty until both run."""
    found: dict[bool, psutil.Process] = {}
    for one in first.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # other commands come and go
            if one.cmdline() == ["sleep", "600"]:
                found[one.ppid() == first.pid] = one
    return [found[True], found[False]] if len(found) == 2 else []


@pytest.mark.skipif(not _may_unshare(), reason="takes a pid namespace of its own, as a container")
def test_process_1_of_a_container_leaves_the_orphans_of_others_alone(
    namespace: str, tmp_path: Path
) -> None:
    stdin = f"[ -e {tmp_path}/tried ] && exit; touch {tmp_path}/tried; sleep 600\n"
    stdin += f"until [ -e {tmp_path}/end ]; do sleep 0.05; done\n"
    arguments = ("-", "--json", "--workers", 2, "--retries", 1)
    command = (*_APART, sys.executable, "-m", "shmepoch")
    with started(*arguments, stdin=stdin, command=command) as process:
        eventually((tmp_path / "tried").exists, within=60)
        (first,) = psutil.Process(process.pid).children()
        enter = ("nsenter", "--target", str(first.pid), "--pid", "sh", "-c")
        subprocess.run([*enter, "setsid sleep 600 >&- 2>&- & true"], check=True)
        # Both are still shells for a moment.
        orphan, sleeper = eventually(lambda: _sleepers_below(first), within=60)
        worker_above(sleeper).kill()
        eventually(lambda: not sleeper.is_running(), within=60)
        assert orphan.is_running()
        assert orphan.status() != psutil.STATUS_ZOMBIE
        (tmp_path / "end").touch()
        status, out, err = ended(process)
    assert (status, "Traceback" in err) == (0, False)
    assert summary(out)["retried"] == 1
    nothing_left(namespace)


@pytest.mark.skipif(not _may_unshare(), reason="takes a pid namespace of its own, as a container")
def test_process_1_of_a_container_ends_by_signals(namespace: str, tmp_path: Path) -> None:
    command = (*_APART, sys.executable, "-m", "shmepoch")
    with started("-", "--json", stdin=f"{waits(tmp_path)}; true\n", command=command) as process:
        eventually((tmp_path / "waiting").exists, within=60)
        (first,) = psutil.Process(process.pid).children()
        first.send_signal(signal.SIGTERM)
        status, out, err = ended(process)
    assert (status, "Traceback" in err) == (143, False)
    assert summary(out)["cancelled"] == 1
    nothing_left(namespace)
