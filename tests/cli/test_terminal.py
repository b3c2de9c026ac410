"""On a terminal: a live table with the state of every session."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.running import COMMAND, DEADLINE_S, nothing_left, waiting, waits
from tests.support import eventually

_CONTROL_C = b"\x03"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")
_SHOW_CURSOR = "\x1b[?25h"


class Terminal:
    """A pseudo-terminal with the command in it; collects its output."""

    def __init__(self, columns: int, *arguments: object) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.sent = b""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *COMMAND, *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            # Spelt out: pytest loads readline, which adds COLUMNS behind os.environ's back.
            env=dict(os.environ),
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def text(self) -> str:
        """All output, without its colours and movements."""
        return _ESCAPE.sub("", self.sent.decode(errors="ignore"))

    def row(self, name: str) -> list[int]:
        """The figures in the last row of that name."""
        rows = re.findall(rf"^{name} +([\d ]+?) *$", self.text, re.MULTILINE)
        return [int(figure) for figure in rows[-1].split()] if rows else []

    def type(self, keys: bytes) -> None:
        """Type these keys."""
        os.write(self._ours, keys)

    def status(self) -> int:
        """The exit status of the run."""
        status = self.process.wait(DEADLINE_S)
        self._reader.join()
        return status

    def close(self) -> None:
        """End the run if necessary, and close the terminal."""
        self.process.terminate()
        self.process.wait(DEADLINE_S)
        self._reader.join()
        os.close(self._ours)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO when the other end is closed
            while data := os.read(self._ours, 65536):
                self.sent += data


def of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the environment one that leaves the size and the colours to the terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def terminal(columns: int, jobs: Path, *arguments: object) -> Iterator[Terminal]:
    """A run on a terminal."""
    one = Terminal(columns, "run", jobs, *arguments)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_terminal(monkeypatch)


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


def test_a_table_that_follows_the_run(namespace: str, jobs: Path, tmp_path: Path) -> None:
    # An agent is told of the first ends without an injection, and of the later ones by one.
    jobs.write_text("echo one\nexit 3\n" + f"{waits(tmp_path)}; true\n" * 2)
    with terminal(80, jobs, "--sessions", 2) as screen:
        eventually(lambda: screen.row("agent applied") == [1, 1, 2], within=60)
        assert screen.row("session") == []  # its heading ends in words
        assert "session                 1        2    all 2" in screen.text
        assert screen.row("running") == [1, 1, 2]
        assert screen.row("completed") == [1, 0, 1]
        assert screen.row("failed") == [0, 1, 1]
        eventually(lambda: screen.row("participants") == [4, 4, 8], within=60)
        assert "2/4" in screen.text.splitlines()[-1]
        assert re.search(
            r"line 2 failed \(exit status 3 after \d+ ms\): exit 3 *$", screen.text, re.M
        )
        for waiter in waiting(tmp_path, 2):
            waiter.kill()
        assert screen.status() == 1
    assert screen.row("completed") == [2, 1, 3]
    for name in ("watermark", "agent applied", "runtime observed", "runtime injected"):
        assert screen.row(name) == [2, 2, 4]
    assert screen.row("lag") == [0, 0, 0]
    assert "4/4" in screen.text.splitlines()[-2]
    assert screen.text.splitlines()[-1].startswith("4 commands, 3 completed, 1 failed")
    assert screen.sent.decode().endswith(screen.text.splitlines()[-1] + "\r\n")
    nothing_left(namespace)


@pytest.mark.parametrize("columns", [1, 10])
def test_a_terminal_that_nothing_fits(namespace: str, jobs: Path, columns: int) -> None:
    """It shows as much as there is room for, and the figures at the end."""
    jobs.write_text("exit 3\n" * 2)
    with terminal(columns, jobs) as screen:
        assert screen.status() == 1
    assert "Traceback" not in screen.text
    assert screen.text.splitlines()[-1].startswith("2 commands, 0 completed, 2 failed")
    nothing_left(namespace)


@pytest.mark.parametrize("columns", [40, 80])
def test_it_fits_the_terminal(jobs: Path, columns: int) -> None:
    jobs.write_text("true\n" * 6)
    with terminal(columns, jobs, "--sessions", 6, "--workers", 1) as screen:
        assert screen.status() == 0
    table = [line for line in screen.text.splitlines() if "agent applied" in line]
    assert table
    assert {len(line) <= columns for line in table} == {True}
    assert screen.row("completed")[-1] == 6
    assert "…" not in screen.text


def test_ctrl_c_is_typed(namespace: str, jobs: Path) -> None:
    jobs.write_text("sleep 600; true\nsleep 600; true\n")
    with terminal(80, jobs) as screen:
        eventually(lambda: screen.row("running") == [2], within=60)
        screen.type(_CONTROL_C)
        assert screen.status() == 130
    assert screen.row("cancelled") == [2]
    assert "Traceback" not in screen.text
    assert _SHOW_CURSOR in screen.sent.decode()
    nothing_left(namespace)


def test_no_command_waits_for_what_is_typed(jobs: Path) -> None:
    jobs.write_text("read line </dev/tty\n")
    with terminal(80, jobs) as screen:
        assert screen.status() == 1
    assert "line 1 failed (exit status" in screen.text


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    jobs.write_text("echo one\n")
    with terminal(80, jobs) as screen:
        assert screen.status() == 0
    assert "session 1: started    line 1: echo one" in screen.text
    assert "\x1b" not in screen.sent.decode()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_goes_away(
    namespace: str, jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignored: bool
) -> None:
    """It ends the run by SIGHUP; if that is ignored, the run goes on without the terminal."""
    monkeypatch.setenv("TERM", "dumb")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    jobs.write_text(f"{waits(first)}; true\n{waits(second)}; true\n")
    ours, theirs = os.openpty()
    command = [*COMMAND, "run", str(jobs), "--workers", "1"]
    shell = "trap '' HUP; " * ignored + f"exec {shlex.join(command)}"
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", "sh", "-c", shell],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    (waiter,) = waiting(first)
    os.close(ours)
    if ignored:
        waiter.kill()
        (waiter,) = waiting(second)
        waiter.kill()
    assert process.wait(DEADLINE_S) == (0 if ignored else 129)
    nothing_left(namespace)
