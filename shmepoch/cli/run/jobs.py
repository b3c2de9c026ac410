"""The jobs file: one shell command on each line."""

from __future__ import annotations

import codecs
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from shmepoch.errors import ShmepochError

#: Stands between the commands of the script that checks all of them at once. If a command left a
#: quote open, one of these closes it and is then a syntax error. Otherwise they are comments.
_CLOSERS: Final = "# ' )\n# \" )\n# ` )\n"

#: Some editors put it at the beginning of a UTF-8 file.
_BYTE_ORDER_MARK: Final = "\ufeff"
#: The beginnings of files that are not UTF-8. UTF-32 (LE) begins like UTF-16.
_UTF16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


class JobsInvalid(ShmepochError, ValueError):
    """The jobs file is not valid; `line` is the line of the fault, or None for the whole file."""

    path: str
    line: int | None
    reason: str

    def _text(self) -> str:
        where = self.path if self.line is None else f"{self.path}, line {self.line}"
        return f"{where}: {self.reason}"


class Job(msgspec.Struct, frozen=True):
    """One command and the number of its line."""

    line: int
    command: str


def read(path: Path) -> list[Job]:
    """The commands of a file, or of standard input for "-".

    Raises `JobsInvalid` with the line of the first command that a shell would refuse, and `OSError`
    for a file that cannot be read.
    """
    name = "standard input" if str(path) == "-" else str(path)
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    if b"\r" in data.strip() and b"\n" not in data:
        raise JobsInvalid(name, 1, "its lines end in CR alone; save it with LF or CRLF")
    jobs = []
    for line, raw in enumerate(data.split(b"\n"), 1):
        command = _decode(name, line, raw)
        if not command or command.startswith("#"):
            continue
        if "\0" in command:
            why = "a command cannot hold a NUL byte; if the file is UTF-16, save it as UTF-8"
            raise JobsInvalid(name, line, why)
        if (len(command) - len(command.rstrip("\\"))) % 2:
            raise JobsInvalid(name, line, "it ends in a backslash; a command is one line")
        jobs.append(Job(line, command))
    if not jobs:
        raise JobsInvalid(name, None, "no commands in it; write one a line")
    _check_syntax(name, jobs)
    return jobs


def _decode(name: str, line: int, raw: bytes) -> str:
    """The command of a line, without the spaces and marks that editors add."""
    if line == 1 and raw.startswith(_UTF16_MARKS):
        raise JobsInvalid(name, line, "the file is UTF-16 or UTF-32; save it as UTF-8")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} is 0x{raw[error.start]:02x}"
        raise JobsInvalid(name, line, f"not UTF-8 ({where}); save it as UTF-8") from error
    # In any line: files may have been joined.
    return text.strip().removeprefix(_BYTE_ORDER_MARK).strip()


def _check_syntax(name: str, jobs: list[Job]) -> None:
    """Find the first command with a syntax error, without running any."""
    # First one shell for all of them: a shell for each takes a second per thousand.
    if _complaint("".join(f"{{\n{job.command}\n{_CLOSERS}}}\n" for job in jobs)) is None:
        return
    for job in jobs:
        complaint = _complaint(f"{job.command}\n")
        if complaint is not None:
            raise JobsInvalid(name, job.line, f"not a shell command: {complaint}")


def _complaint(script: str) -> str | None:
    checked = subprocess.run(
        ["/bin/sh", "-n"], input=script.encode(), capture_output=True, check=False
    )
    return checked.stderr.decode(errors="replace").strip() if checked.returncode else None
