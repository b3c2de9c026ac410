"""Runs the real `shmepoch` command, and finds every process that it started."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from tests.support import eventually, segments_in

COMMAND: Final = (sys.executable, "-m", "shmepoch")
#: A watchdog; on an idle machine every step takes less than a tenth of it.
DEADLINE_S: Final = 90.0


def run(
    *arguments: object, stdin: str | bytes = b"", command: Sequence[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    """Run the command; returns its status and its output."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*command, "run", *map(str, arguments)],
        input=data,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


@contextlib.contextmanager
def started(
    *arguments: object, stdin: str, command: Sequence[str] = COMMAND
) -> Iterator[subprocess.Popen[str]]:
    """A run in progress, in its own process group as a terminal would start it."""
    with subprocess.Popen(
        [*command, "run", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            assert process.stdin is not None
            process.stdin.write(stdin)
            process.stdin.close()
            process.stdin = None
            yield process
        finally:
            process.terminate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end of a run in progress: its status and its output."""
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def summary(stdout: str) -> dict[str, Any]:
    """The machine-readable summary."""
    found: dict[str, Any] = json.loads(stdout)
    return found


def transcripts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The notices of each session's agent, by session."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def told(folder: Path) -> list[dict[str, Any]]:
    """The notices of all agents."""
    return [line for lines in transcripts(folder).values() for line in lines]


def processes_in(namespace: str) -> list[psutil.Process]:
    """Every process that inherited the namespace, whatever its parent is now; not this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("SHMEPOCH_NAMESPACE") == namespace and process.pid != os.getpid():
                found.append(process)
    return found


def waits(folder: Path) -> str:
    """A command that writes a file to `folder` when it runs, and stays until it is killed."""
    return f"sh -c 'echo $$ >>{folder}/waiting; exec sleep 600'"


def waiting(folder: Path, count: int = 1) -> list[psutil.Process]:
    """The staying commands, when there are `count` of them."""

    def pids() -> list[str]:
        said = folder / "waiting"
        return said.read_text().splitlines() if said.exists() else []

    return [
        psutil.Process(int(pid)) for pid in eventually(lambda: _whole(pids(), count), within=60)
    ]


def _whole(lines: list[str], count: int) -> list[str]:
    return lines if len(lines) == count and lines[-1] else []


def agent_of(transcripts: Path) -> psutil.Process:
    """The agent of a run with one session, after it has opened its transcript."""
    (path,) = eventually(lambda: list(transcripts.glob("*.jsonl")), within=60)
    (writer,) = (process for process in psutil.process_iter() if _has_open(process, path))
    return writer


def _has_open(process: psutil.Process, path: Path) -> bool:
    try:
        return any(file.path == str(path) for file in process.open_files())
    except psutil.Error:
        return False


def kill_all(namespace: str) -> None:
    """Kill every process of the namespace, commands too, like a crash of the machine."""

    def kill() -> bool:
        found = processes_in(namespace)
        for signal in ("suspend", "kill"):  # so that none notices another's death
            for process in found:
                with contextlib.suppress(psutil.Error):
                    getattr(process, signal)()
        return not found

    eventually(kill, within=30)


def nothing_left(namespace: str) -> None:
    """Fail unless every process and segment of the namespace is gone soon."""
    eventually(lambda: not processes_in(namespace), within=30)
    assert segments_in(namespace) == []
