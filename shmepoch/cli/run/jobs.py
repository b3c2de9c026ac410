"""The jobs file: shell commands, one a line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from shmepoch.errors import ShmepochError


class JobsInvalid(ShmepochError, ValueError):
    """The jobs file cannot be run as it is; `line` is where, or None for the whole file."""

    path: str
    line: int | None
    reason: str

    def __init__(self, path: str, line: int | None, reason: str) -> None:
        where = path if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {reason}", path=path, line=line, reason=reason)


class Job(msgspec.Struct, frozen=True):
    """One command and the line it stands on."""

    line: int
    command: str


def read(path: Path) -> list[Job]:
    """The commands of a file, or of standard input for "-".

    Raises `JobsInvalid` with the line of the first that no shell would take, and `OSError` for a
    file that cannot be read.
    """
    name = "standard input" if str(path) == "-" else str(path)
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    jobs = []
    for line, raw in enumerate(data.split(b"\n"), 1):
        try:
            command = raw.decode().strip()
        except UnicodeDecodeError as error:
            raise JobsInvalid(name, line, f"not UTF-8: {error.reason}") from error
        if not command or command.startswith("#"):
            continue
        if "\0" in command:
            raise JobsInvalid(name, line, "a command cannot hold a NUL byte")
        _check_syntax(name, line, command)
        jobs.append(Job(line, command))
    if not jobs:
        raise JobsInvalid(name, None, "no commands in it; write one a line")
    return jobs


def _check_syntax(name: str, line: int, command: str) -> None:
    try:
        checked = subprocess.run(
            ["/bin/sh", "-n", "-c", command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except OSError:
        return  # too long for an argument: its operation will say so
    if checked.returncode != 0:
        message = checked.stderr.decode(errors="replace").strip()
        raise JobsInvalid(name, line, f"not a shell command: {message}")
