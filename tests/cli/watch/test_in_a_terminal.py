"""The real command over real processes: how it shows, and how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmepoch import RuntimeSessionAdapter, SessionId
from tests.cli.running import COMMAND, DEADLINE_S
from tests.cli.test_terminal import of_a_terminal
from tests.runtime.completions import TOOL, end
from tests.support import eventually

_ALTERNATE, _NORMAL = b"\x1b[?1049h", b"\x1b[?1049l"
_SHOW_CURSOR = b"\x1b[?25h"
#: What moves or styles text, and what asks or sets the terminal; the text is what stays.
_ESCAPE = re.compile(rb"\x1b\[[0-9;?<>=$]*[a-zA-Z]|\x1b[\]P_][^\x07\x1b]*(\x07|\x1b\\)")
#: A colour of the foreground or the background, but for the default one.
_COLOUR = re.compile(rb"\x1b\[(?:[0-9]+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


class Terminal:
    """A pseudo-terminal with `shmepoch watch` in it."""

    def __init__(self, *arguments: str, before: str = "") -> None:
        self._ours, self._theirs = os.openpty()
        self.resize(24, 100)
        self.before = termios.tcgetattr(self._theirs)
        self.sent = b""
        self._away = threading.Event()
        command = [*COMMAND, "watch", "--interval", "0.1", *arguments]
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "sh", "-c", f'{before}exec "$@"', "sh", *command],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env=dict(os.environ),
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def resize(self, lines: int, columns: int) -> None:
        """Change its size, as one who drags its window."""
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    @property
    def text(self) -> str:
        """All the text that was sent."""
        return _ESCAPE.sub(b"", self.sent).decode(errors="ignore")

    def shows(self, text: str) -> None:
        """Wait until this was shown."""
        eventually(lambda: text in self.text, within=DEADLINE_S)

    def ended(self) -> int:
        """The status that it ended with; the terminal is as it was before."""
        status = self.process.wait(DEADLINE_S)
        assert termios.tcgetattr(self._theirs) == self.before
        self._hang_up()
        assert self.sent.rindex(_NORMAL) > self.sent.rindex(_ALTERNATE)
        assert self.sent.rindex(_SHOW_CURSOR) > self.sent.rindex(_ALTERNATE)
        assert "Traceback" not in self.text
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._hang_up()
        self.go_away()

    def go_away(self) -> None:
        """End the terminal itself, as the loss of a connection does."""
        if not self._away.is_set():
            self._away.set()
            self._hang_up()
            os.close(self._ours)

    def _hang_up(self) -> None:
        if self._theirs >= 0:
            os.close(self._theirs)
            self._theirs = -1
        if self._away.is_set() or self.process.poll() is not None:
            self._reader.join()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO once the other end is closed
            while not self._away.is_set():
                if select.select([self._ours], [], [], 0.05)[0]:
                    self.sent += os.read(self._ours, 65536)


@contextlib.contextmanager
def terminal(*arguments: str, before: str = "") -> Iterator[Terminal]:
    one = Terminal(*arguments, before=before)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_terminal(monkeypatch)


def test_an_epoch_that_is_worked_in(adapter: RuntimeSessionAdapter) -> None:
    bindings = adapter.prepare_bindings(SessionId.new())
    with terminal() as screen:
        screen.shows("1 epoch")
        screen.type(b"\r")
        screen.shows("no completion yet")
        end(bindings, TOOL)
        screen.shows("cancelled")
        screen.resize(15, 60)
        screen.type(b"?")
        screen.shows("Ctrl-C")
        screen.type(b"\x1b")
        adapter.unregister_session(bindings.session_id)
        screen.shows("Its name is gone")
        screen.type(b"\x1b")
        screen.shows("0 epochs")
        screen.type(b"q")
        assert screen.ended() == 0


@pytest.mark.usefixtures("bindings")
@pytest.mark.parametrize("page", [False, True])
def test_ctrl_c_is_typed(page: bool) -> None:
    with terminal() as screen:
        screen.shows("1 epoch")
        if page:
            screen.type(b"\r")
            screen.shows("no completion yet")
        screen.type(b"\x03")
        assert screen.ended() == 130


@pytest.mark.usefixtures("bindings")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it(number: signal.Signals) -> None:
    with terminal() as screen:
        screen.shows("1 epoch")
        screen.process.send_signal(number)
        assert screen.ended() == 128 + number


@pytest.mark.parametrize("before", ["", "trap '' HUP; "], ids=["", "ignored"])
def test_a_terminal_that_goes_away(before: str) -> None:
    """It ends, and does not wait for a reader that is gone, even if SIGHUP is ignored."""
    with terminal(before=before) as screen:
        screen.shows("0 epochs")
        screen.go_away()
        assert screen.process.wait(DEADLINE_S) == 129


@pytest.mark.usefixtures("bindings")
def test_ctrl_z_is_typed() -> None:
    """A shell gets its terminal back, and all is drawn again once the command goes on."""
    with terminal(before="exec bash --norc -i; ") as screen:
        screen.type(f"{shlex.join(COMMAND)} watch --interval 0.1\n".encode())
        screen.shows("1 epoch")
        screen.type(b"\x1a")
        screen.shows("Stopped")
        assert screen.sent.rindex(_NORMAL) > screen.sent.rindex(_ALTERNATE)
        screen.sent = b""
        screen.type(b"fg\n")
        screen.shows("1 epoch")
        screen.type(b"q")
        eventually(lambda: _NORMAL in screen.sent, within=DEADLINE_S)
        screen.type(b"exit 7\n")
        assert screen.process.wait(DEADLINE_S) == 7


@pytest.mark.usefixtures("bindings")
@pytest.mark.parametrize("colours", [True, False])
def test_no_color(colours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without colours, a state is told by its word, and what is chosen by its inversion."""
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    with terminal() as screen:
        screen.shows("● open")
        screen.type(b"q")
        assert screen.ended() == 0
    assert bool(_COLOUR.search(screen.sent)) == colours
    assert re.search(rb"\x1b\[(?:[0-9]+;)*7[;m]", screen.sent)


@pytest.mark.parametrize("term", ["xterm", "linux", "xterm-256color", "screen"])
def test_no_terminal_is_sent_true_colours(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLORTERM", "truecolor")
    with terminal() as screen:
        screen.shows("0 epochs")
        screen.type(b"q")
        assert screen.ended() == 0
    assert not re.search(rb"\x1b\[(?:[0-9]+;)*[34]8;2", screen.sent)


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, "watch", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_without_a_terminal() -> None:
    status, said = run()
    assert status == 2
    assert said == (
        "shmepoch: standard input is not a terminal, and a live view needs a terminal; "
        "shmepoch ls prints the epochs\n"
    )


def test_a_terminal_that_cannot_move_its_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as screen:
        assert screen.process.wait(DEADLINE_S) == 2
        screen.shows("shmepoch ls prints the epochs")
        assert b"\x1b" not in screen.sent


@pytest.mark.parametrize(
    "arguments", [["--namespace", "no/name"], ["-A", "-n", "one"], ["--interval", "0"]]
)
def test_options_that_are_refused(arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


def test_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "textual.py").write_text("raise ModuleNotFoundError(name='textual')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with terminal() as screen:
        assert screen.process.wait(DEADLINE_S) == 3
        screen.shows("pip install 'shmepoch[watch]'")


def test_other_commands_do_not_import_textual() -> None:
    program = "import sys, shmepoch.cli.app; sys.exit('textual' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
