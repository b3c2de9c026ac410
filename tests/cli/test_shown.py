"""How the command shows texts of others: names of operations, output, errors."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
from pathlib import Path
from typing import Final

import msgspec
import pytest

from shmepoch import Failed, SessionId, SqliteRuntimeStore
from shmepoch.cli.streams import visible
from tests.cli.running import COMMAND, DEADLINE_S, nothing_left, run
from tests.cli.test_history import save
from tests.cli.test_terminal import Terminal, of_a_terminal
from tests.stores.samples import completion

#: A title, the clipboard, a cleared screen, hidden text; the same begun by one character of C1; a
#: line that is written over; text that runs backwards; a separate line.
_HOSTILE: Final = (
    "\x1b]0;title\x07 \x1b]52;c;ZXZpbA==\x07 \x1b[2J \x1b[8m \x9b2J \x9d0;t\x9c \r over \x08 \x7f "
    "\u202egnp.exe\u2066 \u2028line"
)
_WRITTEN_OUT: Final = (
    r"\x1b]0;title\x07 \x1b]52;c;ZXZpbA==\x07 \x1b[2J \x1b[8m \x9b2J \x9d0;t\x9c \r over \x08 \x7f "
    r"\u202egnp.exe\u2066 \u2028line"
)
#: The sequences of rich itself: colours, movements, the cursor and the end of each line.
_RICH: Final = re.compile(r"\x1b\[\??[0-9;]*[mhlAGJK]|\r\n?|\n")
_OBEYED: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: Text that a UTF-8 terminal shows unchanged.
_HARMLESS: Final = "žluť 木 é \U0001f9c0 \u200d ש"


def on_terminal(*arguments: object, columns: int = 400) -> str:
    """The command's output to a terminal, without the sequences of rich."""
    screen = Terminal(columns, *arguments)
    try:
        assert screen.status() in (0, 1, 2)
    finally:
        screen.close()
    return _RICH.sub("", screen.sent.decode())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_terminal(monkeypatch)
    monkeypatch.setenv("PYTHONUTF8", "1")


@pytest.fixture
def session_id() -> SessionId:
    return SessionId.new()


@pytest.fixture
def store(tmp_path: Path, session_id: SessionId) -> Path:
    path = tmp_path / "store"
    with SqliteRuntimeStore(path) as opened:
        entry = completion(1, outcome=Failed(f"{_HOSTILE} {_HARMLESS}"))
        named = msgspec.structs.replace(entry, display_name=f"{_HOSTILE} {_HARMLESS}")
        save(opened, session_id, [named])
    return path


def test_everything_that_a_terminal_obeys_is_written_out() -> None:
    assert visible(_HOSTILE) == _WRITTEN_OUT
    assert visible(_HARMLESS) == _HARMLESS
    assert visible("a\tb\nc\x00\x1f\x80\x9f\ud800") == r"a\tb" "\n" r"c\x00\x1f\x80\x9f\ud800"


def test_a_history_on_a_terminal(store: Path, session_id: SessionId) -> None:
    shown = on_terminal("history", "--store", store, session_id, columns=1000)
    assert _OBEYED.search(shown) is None
    assert shown.count(_WRITTEN_OUT) == 2
    assert shown.count("žluť") == 2


@pytest.mark.parametrize("columns", [1, 20])
def test_a_history_on_a_narrow_terminal(
    tmp_path: Path, session_id: SessionId, columns: int
) -> None:
    """The terminal breaks the lines; no column is left out."""
    with SqliteRuntimeStore(tmp_path / "store") as opened:
        save(opened, session_id, [completion(1, outcome=Failed("why"))])
    shown = on_terminal("history", "--store", tmp_path / "store", session_id, columns=columns)
    for text in ("seq", "ended", "status", "name", "how", "failed", "work 1", "why"):
        assert text in shown


def test_a_history_in_a_file(store: Path, session_id: SessionId) -> None:
    command = [*COMMAND, "history", "--store", str(store), str(session_id)]
    shown = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()
    assert _OBEYED.search(shown.replace("\n", "")) is None
    assert shown.count(_WRITTEN_OUT) == 2


def test_json_on_a_terminal(store: Path, session_id: SessionId) -> None:
    shown = on_terminal("history", "--store", store, session_id, "--json")
    assert _OBEYED.search(shown) is None
    assert json.loads(shown)["entry"]["display_name"] == f"{_HOSTILE} {_HARMLESS}"


def test_a_run_on_a_terminal_and_elsewhere(
    namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = tmp_path / "jobs"
    print_it = "printf '\\033]52;c;ZXZpbA==\\007\\033[2J'"
    jobs.write_text(f"{print_it}; exit 3 # {_HOSTILE}".replace("\u2028", "") + "\n")
    shown = on_terminal("run", jobs)
    assert _OBEYED.search(shown) is None
    assert r"\x1b]52;c;ZXZpbA==\x07 \x1b[2J" in shown
    done = run(jobs)
    assert _OBEYED.search((done.stdout + done.stderr).replace("\n", "")) is None
    assert r"\x1b]52;c;ZXZpbA==\x07 \x1b[2J" in done.stdout
    nothing_left(namespace)


def test_what_is_logged_on_a_terminal(tmp_path: Path, session_id: SessionId) -> None:
    path = tmp_path / "store \x1b[2J"
    with SqliteRuntimeStore(path) as opened:
        save(opened, session_id, [completion(1)])
    connection = sqlite3.connect(path)
    connection.execute("UPDATE entries SET entry = '{'")
    connection.commit()
    connection.close()
    shown = on_terminal("history", session_id, "--store", path)
    assert _OBEYED.search(shown) is None
    assert r"store \x1b[2J: completion 1 of epoch" in shown


@pytest.mark.parametrize("command", ["run", "history --store", "persist --store", "sh"])
def test_errors_on_a_terminal(namespace: str, tmp_path: Path, command: str) -> None:
    path = tmp_path / "a \x1b[2J\x9b2J\u202e b"
    if command == "sh":
        command = "run"
        path.write_text("echo 'open \x1b[2J\x9b2J\u202e\n")
    if command == "persist --store":
        path.mkdir()
    shown = on_terminal(*command.split(), path)
    assert _OBEYED.search(shown) is None
    assert r"\x1b[2J\x9b2J\u202e b" in shown
    nothing_left(namespace)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_any_encoding(
    monkeypatch: pytest.MonkeyPatch,
    namespace: str,
    tmp_path: Path,
    store: Path,
    session_id: SessionId,
    encoding: str,
) -> None:
    """Characters outside it are escaped; JSON is the same in every encoding that has ASCII."""
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setenv("PYTHONUTF8", "0")
    (tmp_path / "jobs").write_text("echo ✗ 木 é\n", encoding="utf-8")

    def printed(*arguments: object) -> str:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
        return done.stdout.decode(encoding)

    def written(text: str) -> str:
        return text.encode(encoding, "backslashreplace").decode(encoding)

    assert written("line 1: echo ✗ 木 é") in printed("run", tmp_path / "jobs")
    assert printed("run", tmp_path / "jobs", "--json").isascii()
    assert written("žluť 木 é") in printed("history", "--store", store, session_id)
    shown = printed("history", "--store", store, session_id, "--json")
    assert shown.isascii()
    assert json.loads(shown)["entry"]["display_name"] == f"{_HOSTILE} {_HARMLESS}"
    nothing_left(namespace)
