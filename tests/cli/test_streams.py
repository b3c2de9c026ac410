"""The standard streams of the command: no state of them ends in a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

from shmepoch import RuntimeEpochId, SessionId, SqliteRuntimeStore
from shmepoch.cli import streams
from shmepoch.cli.run.transcript import Transcript
from tests.cli.running import COMMAND, DEADLINE_S, nothing_left, run
from tests.cli.stored import sessions
from tests.cli.test_history import save
from tests.stores.samples import completion

#: Each standard stream closed, and several.
_CLOSINGS: Final = ("<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-")


def shell(redirections: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command with its streams redirected by a shell."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "-", *COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    path = tmp_path / "jobs"
    path.write_text(f"echo said; echo hi >{tmp_path}/done\ncat\n")
    return path


@pytest.mark.parametrize(
    ("closing", "options"),
    [*((closing, ()) for closing in _CLOSINGS), ("<&- >&- 2>&-", ("--json",))],
)
def test_a_run_without_a_standard_stream(
    namespace: str, tmp_path: Path, jobs: Path, closing: str, options: tuple[str, ...]
) -> None:
    """Its output is discarded, and does not go into the files that it opens."""
    store, told = tmp_path / "store", tmp_path / "told"
    done = shell(closing, "run", jobs, "--store", store, "--transcript", told, *options)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert (tmp_path / "done").read_text() == "hi\n"
    assert store.read_bytes().startswith(b"SQLite format 3\0")
    (session_id,) = sessions(store)
    for line in (told / f"{session_id}.jsonl").read_text().splitlines():
        assert json.loads(line)["status"] == "completed"
    nothing_left(namespace)


@pytest.mark.parametrize("closing", _CLOSINGS)
@pytest.mark.parametrize("command", ["run", "history --store"])
def test_a_refusal_without_a_standard_stream(tmp_path: Path, closing: str, command: str) -> None:
    refused = shell(closing, *command.split(), tmp_path / "missing")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert ("missing" in refused.stderr) == ("2>" not in closing)
    assert "Traceback" not in refused.stderr


def test_nothing_is_read_of_a_closed_input(namespace: str) -> None:
    refused = shell("<&-", "run", "-")
    assert refused.returncode == 2
    assert refused.stderr == "shmepoch: standard input: no commands in it; write one a line\n"


@pytest.mark.parametrize("closing", _CLOSINGS)
def test_a_history_without_a_standard_stream(tmp_path: Path, closing: str) -> None:
    with SqliteRuntimeStore(tmp_path / "store") as store:
        save(store, session_id := SessionId.new(), [completion(1)])
    shown = shell(closing, "history", session_id, "--store", tmp_path / "store")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert ("completed" in shown.stdout) == (">&-" not in closing.split())


@pytest.fixture
def arguments(tmp_path: Path, jobs: Path) -> dict[str, tuple[object, ...]]:
    """Commands that print something, by name."""
    with SqliteRuntimeStore(tmp_path / "store") as store:
        save(store, session_id := SessionId.new(), [completion(1)])
    stored = ("history", "--store", tmp_path / "store")
    return {
        "run": ("run", jobs),
        "run --json": ("run", jobs, "--json"),
        "history": (*stored, session_id),
        "sessions": stored,
        "--help": ("--help",),
    }


@pytest.mark.parametrize("command", ["run", "run --json", "history", "sessions", "--help"])
def test_a_device_that_is_full(
    namespace: str,
    arguments: dict[str, tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # buffered output fails later
    full = shell(">/dev/full", *arguments[command])
    assert full.returncode == 3
    events, *said = full.stderr.partition("shmepoch: ")
    assert "".join(said) == "shmepoch: standard output: No space left on device\n"
    assert (events != "") == (command == "run --json")  # which has them on standard error
    nothing_left(namespace)


@pytest.mark.parametrize(
    ("command", "status"),
    [("run", 141), ("run --json", 141), ("history", 141), ("sessions", 141), ("--help", 1)],
)
def test_a_pipe_that_is_read_no_more(
    namespace: str, arguments: dict[str, tuple[object, ...]], command: str, status: int
) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    left = subprocess.run(
        [*COMMAND, *map(str, arguments[command])],
        stdout=ours,
        stderr=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=False,
    )
    os.close(ours)
    assert left.returncode == status
    assert b"Traceback" not in left.stderr
    assert b"Exception ignored" not in left.stderr
    nothing_left(namespace)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_a_name_in_no_encoding_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    refused = subprocess.run(
        [*COMMAND, "run", bytes(tmp_path) + b"/\xff \xc5\xbe"], capture_output=True, check=False
    )
    assert refused.returncode == 2
    shown = refused.stderr.decode(encoding)
    assert "\\udcff" in shown
    assert "Traceback" not in shown


def test_a_transcript_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "told.jsonl"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with Transcript(path) as written, pytest.raises(OSError) as failed:
        written.append(RuntimeEpochId.new(), ())
    assert streams.said(failed.value) == f"{path}: No space left on device"


def test_a_run_may_have_no_reader(namespace: str, jobs: Path) -> None:
    done = run(jobs, command=["setsid", "--wait", *COMMAND])
    assert done.returncode == 0
    nothing_left(namespace)
