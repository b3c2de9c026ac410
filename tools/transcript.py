"""Tries each command for operators on real epochs, and writes down what it shows."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from shmepoch import RuntimeSessionAdapter, SessionId

#: How the namespace is called in the transcript; the real one is of this process alone.
_SHOWN: Final = "night"
_DEADLINE_S: Final = 60.0
_JOBS: Final = "echo 1,204 files indexed\nexit 2\nsleep 600\n"
_WORKER: Final = "-c", "from tools.transcript import work; work()"
_TOKEN: Final = "SHMEPOCH_TRANSCRIPT_TOKEN"


class Transcript:
    """A shell in a folder of its own, and what was typed and shown there."""

    def __init__(self, folder: Path, namespace: str) -> None:
        self._folder = folder
        self._namespace = namespace
        self._environment = os.environ | {
            "SHMEPOCH_NAMESPACE": namespace,
            "COLUMNS": "110",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.text = ""

    def say(self, text: str) -> None:
        """Write a paragraph or a heading."""
        self.text += f"{text}\n\n"

    def type(self, command: str) -> None:
        """Run a command in a shell; its output and a status other than 0 are written down."""
        done = self._run(f"{command} 2>&1")
        shown = done.stdout.replace(self._namespace, _SHOWN)
        self.text += "".join(
            f"    {line}".rstrip() + "\n" for line in [f"$ {command}", *shown.splitlines()]
        )
        if done.returncode:
            self.text += f"    (exit status {done.returncode})\n"
        self.text += "\n"

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command in the background, in a process group of its own."""
        return subprocess.Popen(
            command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    def records(self, command: str) -> list[dict[str, Any]]:
        """The JSON lines that a command prints."""
        return [json.loads(line) for line in self._run(command).stdout.splitlines()]

    def _run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
            check=False,
        )


def work() -> None:
    """Run operations for ever."""
    from shmepoch import OperationId, OperationKind, OperationSpec, SessionRuntimeBindings

    registry = SessionRuntimeBindings.from_token(os.environ[_TOKEN]).ops_lifecycle
    while True:
        id = OperationId.new()
        registry.register_operation(
            OperationSpec(
                id=id,
                kind=OperationKind.BACKGROUND_TOOL_OP,
                display_name="index the repository",
                source_label="tool",
            )
        )
        registry.cancel_operation(id)


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the epochs do not come to where the transcript has them")
        time.sleep(0.05)


@contextlib.contextmanager
def at_work(shell: Transcript) -> Iterator[subprocess.Popen[bytes]]:
    """A run of which one command goes on, one is done and one has failed."""
    run = shell.start("shmepoch", "run", "jobs.txt", "--workers", "2", "--store", "run.db")

    def is_there() -> bool:
        return any(
            one["ended"] == 2
            and one["operations"].get("running") == 1
            and one["durable_through"] == 2
            and one["cursors"]["agent_applied_cursor"] == 2
            for one in shell.records("shmepoch ls --json")
        )

    try:
        until(is_there)
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def write(shell: Transcript) -> None:
    """The whole of it."""
    shell.say("# The commands, tried")
    shell.say(
        "`tools/transcript` makes this page. It runs each command on real epochs, and writes down "
        "what is shown; a test runs it, too."
    )
    shell.say("## A run is at work")
    with at_work(shell) as run:
        session = shell.records("shmepoch ls --json")[0]["session_id"]
        shell.type("cat jobs.txt")
        shell.type("shmepoch ls")
        shell.type(f"shmepoch show {session}")
        shell.type(f"shmepoch tail {session} --no-follow")
        shell.type(f"shmepoch show {session[:-1]}{'0' if session[-1] != '0' else '1'}")
        shell.type("shmepoch gc --dry-run --older-than 0")
        fetch = "from urllib.request import urlopen; print(urlopen(input()).read().decode())"
        shell.type(
            "shmepoch metrics --port 0 2>address & until grep -q http address; do sleep 0.1; done; "
            f"grep -o 'http.*' address | python -c '{fetch}' | grep '^shmepoch_operations{{'; "
            "kill %1; wait %1"
        )
        is_stored = "shmepoch history --store other.db 2>&1 | grep -q '1 completed'"
        shell.type(
            f"shmepoch persist --store other.db & until {is_stored}; do sleep 0.1; done; "
            "kill %1; wait %1"
        )
        shell.say("## All of its processes are killed")
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        until(lambda: shell.records("shmepoch ls --json")[0]["state"] == "abandoned")
    shell.type("shmepoch ls --filter state=abandoned")
    shell.type(f"shmepoch show {session}")
    shell.type(f"shmepoch dump {session} case.zip")
    shell.type("shmepoch gc --dry-run")
    shell.type("shmepoch gc --older-than 0")
    shell.type("shmepoch ls")
    shell.type("shmepoch restore case.zip")
    shell.type("shmepoch ls --json")
    shell.type("shmepoch gc --older-than 0")
    shell.type("shmepoch history --store run.db | head -6")
    stopped(shell)


def stopped(shell: Transcript) -> None:
    """A writer that was stopped inside a transition."""
    shell.say("## A writer is stopped in the middle of a transition")
    namespace = os.environ["SHMEPOCH_NAMESPACE"]
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        session = str(bindings.session_id)
        os.environ[_TOKEN] = bindings.to_token()
        worker = subprocess.Popen([sys.executable, *_WORKER])
        try:
            until(lambda: bindings.ops_lifecycle.completion_feed().watermark() > 0)

            def is_inside() -> bool:
                worker.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
                if shell.records(f"shmepoch show {session} --json")[0]["locks"].get("writer"):
                    return True
                worker.send_signal(signal.SIGCONT)
                return False

            until(is_inside)
            shell.type("shmepoch ls")
            shell.type(f"shmepoch show {session} --entries 1 | head -24")
            shell.type(f"shmepoch dump {session} stopped.zip && ls stopped.zip")
            shell.type("shmepoch gc --dry-run --older-than 0")
            shell.type("shmepoch doctor | grep kernel:")
        finally:
            worker.kill()
            worker.wait()
        adapter.unregister_session(bindings.session_id)


def main(path: Path) -> None:
    """Write the transcript to a file."""
    namespace = f"transcript-{os.getpid()}"
    os.environ["SHMEPOCH_NAMESPACE"] = namespace
    with tempfile.TemporaryDirectory(prefix="shmepoch-") as folder:
        shell = Transcript(Path(folder), namespace)
        (Path(folder) / "jobs.txt").write_text(_JOBS)
        write(shell)
    path.write_text(shell.text.rstrip("\n") + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
