"""Calls that are refused, or that fail before a command has run: they leave no trace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from shmepoch import SqliteRuntimeStore
from tests.cli.running import COMMAND, DEADLINE_S, nothing_left, run

_TRANSCRIPT: Final = ("--transcript", "told/by/session")


def refused(
    folder: Path, *arguments: object, command: Sequence[str] = COMMAND, environment: str = ""
) -> subprocess.CompletedProcess[str]:
    """The command in `folder`; fails if that has other files in it afterwards."""
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=os.environ | ({"SHMEPOCH_NAMESPACE": environment} if environment else {}),
    )
    assert sorted(folder.rglob("*")) == before
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Jobs, a store without a run, an empty file, and a file that is not a store."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "jobs").write_text("true\n")
    (folder / "bad").write_text("echo 'open\n")
    (folder / "text").write_text("this is no database, " * 100)
    (folder / "empty").touch()
    SqliteRuntimeStore(folder / "stored").close()
    return folder


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("run", "bad", "--store", "new", *_TRANSCRIPT), "line 1"),
        (("run", "jobs", "--store", "text", *_TRANSCRIPT), "text cannot be used as a store"),
        (("run", "jobs", "--store", "no/new", *_TRANSCRIPT), "there is no folder"),
        (("run", "jobs", "--store", "new", "--resume", *_TRANSCRIPT), "no unfinished run"),
        (("run", "jobs", "--store", "stored", "--resume", *_TRANSCRIPT), "no unfinished run"),
        (("run", "jobs", "--store", "empty", "--resume", *_TRANSCRIPT), "no unfinished run"),
        (("run", "jobs", "--resume", *_TRANSCRIPT), "needs --store"),
        (("run", "jobs", "--namespace", "a/b", *_TRANSCRIPT), "namespace 'a/b' is not usable"),
        (("run", "jobs", "--store", "new", "--transcript", "text"), "text: File exists"),
        (("run", "jobs", "--store", "new", "--transcript", "text/a"), "Not a directory"),
        (
            ("run", "jobs", "--store", "new", "--kill-every", "inf"),
            "inf is not a number of seconds",
        ),
        (
            ("persist", "--store", "new", "--max-delay", "nan"),
            "nan is not a number of seconds from 0 to 3600",
        ),
        (("persist", "--store", "new", "--max-delay", "inf"), "from 0 to 3600"),
        (("persist", "--store", "new", "--max-delay", "3601"), "from 0 to 3600"),
        (("persist", "--store", "new", "--namespace", "a/b"), "namespace 'a/b' is not usable"),
        (("persist", "--store", "text"), "text cannot be used as a store"),
        (("history", "--store", "new"), "there is no such file"),
        (("history", "--store", "empty"), "it is empty"),
        (("history", "--store", "text"), "text cannot be used as a store"),
        (("history", "--store", "x" * 300), "File name too long"),
        (("history", "--store", "stored", "--status", "failed"), "name the session"),
        (("history", "--store", "stored", "--last", "3"), "name the session"),
        (("history", "--store", "stored", "0199"), "knows no session with an id that begins with"),
        (("history", "--store", "new", "0199"), "there is no such file"),
        (("history", "--store", "stored", "0199", "--last", "0"), "--last"),
        (("persist", "--store", "no/new"), "there is no folder"),
        (("persist", "--store", "."), "cannot be used as a store"),
        (("--log-level", "loud", "persist", "--store", "new"), "'loud' is not one of"),
        (("history", "--store", "stored", "--since", "2026-03-01"), "name the session"),
        (("history", "--store", "stored", "--until", "2026-03-01", "--json"), "name the session"),
    ],
)
def test_what_is_refused_makes_nothing(
    namespace: str, folder: Path, arguments: tuple[str, ...], why: str
) -> None:
    done = refused(folder, *arguments)
    assert done.returncode == 2
    assert why in " ".join(done.stderr.replace("│", "").split())
    assert (folder / "empty").stat().st_size == 0
    nothing_left(namespace)


@pytest.mark.parametrize("command", ["run jobs", "persist"])
def test_a_bad_namespace_in_the_environment_is_named(folder: Path, command: str) -> None:
    done = refused(folder, *command.split(), "--store", "new", environment="a/b")
    assert done.returncode == 2
    assert done.stderr.startswith("shmepoch: namespace 'a/b' is not usable")


_ABSENT: Final = """
mkdir ../dev
mount --bind /dev ../dev
mount -t tmpfs tmpfs /dev
for name in null urandom; do touch /dev/$name; mount --bind ../dev/$name /dev/$name; done
exec "$@"
"""
_READ_ONLY: Final = 'mount -t tmpfs -o ro tmpfs /dev/shm; exec "$@"'


@pytest.mark.parametrize("command", ["run jobs", "persist"])
@pytest.mark.parametrize(
    ("mounts", "why"),
    [(_ABSENT, "/dev/shm is not there"), (_READ_ONLY, "/dev/shm is not writable")],
)
def test_no_shared_memory(folder: Path, command: str, mounts: str, why: str) -> None:
    own_mounts = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*own_mounts, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let this user have mounts of its own")
    private = [*own_mounts, "sh", "-ec", mounts, "-", *COMMAND]
    done = refused(folder, *command.split(), "--store", "new", command=private)
    assert done.returncode == 3
    assert done.stderr.startswith(f"shmepoch: shared memory cannot be used: {why}")
    assert done.stderr.count("\n") == 1


def test_a_transcript_folder_is_made_with_those_it_lies_in(namespace: str, folder: Path) -> None:
    told = folder / "told" / "by" / "session"
    assert run(folder / "jobs", "--transcript", told).returncode == 0
    assert len(list(told.iterdir())) == 1
    nothing_left(namespace)
