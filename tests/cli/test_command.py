"""The command as a whole: rules that hold for every command that is registered."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from typer.models import CommandInfo

from shmepoch import RuntimeSessionAdapter, SessionId, SqliteRuntimeStore
from shmepoch import _native as at
from shmepoch.cli import exits
from shmepoch.cli.app import app
from tests.cli.running import COMMAND, DEADLINE_S, nothing_left, run
from tests.cli.test_history import save
from tests.cli.test_streams import shell
from tests.cli.test_terminal import Terminal, of_a_terminal
from tests.runtime.completions import TOOL, end
from tests.stores.samples import completion
from tests.support import empty_shared_memory, eventually

_ROOT: Final = Path(__file__).parents[2]
_PAGE: Final = (_ROOT / "docs/command.md").read_text()
_CONTROL_C: Final = b"\x03"


class Example(NamedTuple):
    """Arguments with which a command does its work and ends with status 0; names in braces are
    attributes of a `World`."""

    arguments: str
    #: The command that has to be run first, with its arguments.
    before: str = ""
    #: For a command that goes on until it is told to end: whether it is at its work by now.
    stays: Callable[[World], bool] | None = None


def always(_: World) -> bool:
    return True


EXAMPLES: Final = {
    "run": Example("{jobs}"),
    "persist": Example("--store {new}", stays=lambda world: world.new.exists()),
    "history": Example("--store {store}"),
    "ls": Example(""),
    "show": Example("{session}"),
    "watch": Example("", stays=always),
    "tail": Example("{session}", stays=always),
    "gc": Example("--dry-run"),
    "dump": Example("{session} {file}"),
    "restore": Example("{file} --namespace {other}", before="dump {session} {file}"),
    "doctor": Example(""),
    "metrics": Example("--port 0", stays=always),
}


class World(NamedTuple):
    """What the examples are about: an epoch of this process, a store, a file of commands."""

    session: SessionId
    jobs: Path
    store: Path
    #: Paths that are free.
    new: Path
    file: Path
    #: Another namespace.
    other: str

    def arguments(self, name: str) -> list[str]:
        """The words of the example of a command, after what has to be done before."""
        example = EXAMPLES[name]
        if example.before:
            self._run(example.before)
        return [name, *example.arguments.format_map(self._asdict()).split()]

    def _run(self, words: str) -> None:
        command = [*COMMAND, *words.format_map(self._asdict()).split()]
        subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S)


@pytest.fixture
def world(namespace: str, adapter: RuntimeSessionAdapter, tmp_path: Path) -> Iterator[World]:
    bindings = adapter.prepare_bindings(SessionId.new())
    end(bindings, TOOL, TOOL)
    made = World(
        session=bindings.session_id,
        jobs=tmp_path / "jobs",
        store=tmp_path / "store",
        new=tmp_path / "new",
        file=tmp_path / "file",
        other=f"{namespace}-other",
    )
    made.jobs.write_text("echo one\nsleep 0.1\n")
    with SqliteRuntimeStore(made.store) as store:
        save(store, SessionId.new(), [completion(1), completion(2)])
    yield made
    adapter.unregister_session(bindings.session_id)
    empty_shared_memory(made.other)
    nothing_left(namespace)


def _name(info: CommandInfo) -> str:
    assert info.callback is not None
    return info.name or info.callback.__name__


COMMANDS: Final = {_name(info): info for info in app.registered_commands}
NAMES: Final = sorted(COMMANDS)


def parameters(name: str) -> set[str]:
    """The parameters of a command's function."""
    callback = COMMANDS[name].callback
    assert callback is not None
    return set(inspect.signature(callback).parameters)


def printed(
    *arguments: object, columns: int = 80, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command without a terminal, as wide as it is told."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=os.environ | {"COLUMNS": str(columns)} | environment,
    )


def is_clean(text: str) -> bool:
    """Whether a command ended without an accident of this program's."""
    return not re.search("Traceback|Exception ignored|Fatal Python|--- Logging error", text)


def at_work(process: subprocess.Popen[Any]) -> bool:
    """Whether a process of the command has loaded the library, and with it sees to signals; also
    if it has ended."""
    if process.poll() is not None:
        return True
    try:
        return at.__file__ in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:  # it is ending
        return False


def rows_of(table: str) -> list[list[str]]:
    """The cells of a table of docs/command.md, without its heading."""
    [found] = re.findall(rf"^\| {table} \|.*\n\|.*\n((?:\|.*\n)+)", _PAGE, re.M)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in found.splitlines()]


def is_broken_early(line: str, after: str) -> bool:
    """Whether two lines of a paragraph of an 80 columns wide help would have a word more on the
    first one."""
    text = re.compile(r" (\w\S*)")
    word = text.match(after)
    return bool(text.match(line) and word and len(f"{line.rstrip()} {word[1]}") < 80)


# --- what it is documented to be ------------------------------------------------------------------


def test_every_command_is_documented_and_has_an_example() -> None:
    documented = {re.sub(r"\[?`shmepoch |`.*", "", row[0]) for row in rows_of("command")}
    assert set(COMMANDS) <= set(EXAMPLES) == documented
    for name in NAMES:
        assert f"\n## shmepoch {name}\n" in _PAGE or f"({name}.md)" in _PAGE


def test_the_exit_statuses_are_documented_as_they_are() -> None:
    table = {int(status): meaning for status, meaning in rows_of("exit status")}
    assert table == {int(status): meaning for status, meaning in exits.MEANINGS.items()}
    said = printed("--help").stdout
    for status, meaning in table.items():
        assert re.search(rf"^ +{status}  {meaning} *$", said, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command(name: str) -> None:
    """It says the exit statuses, and its examples are whole lines at 80 columns."""
    shown = printed(name, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Exit status:" in shown.stdout
    callback = COMMANDS[name].callback
    assert callback is not None
    examples = re.findall("^    (shmepoch .*)$", inspect.getdoc(callback) or "", re.M)
    assert [example for example in examples if f" {name}" in example]
    for example in examples:
        assert re.search(rf"^ +{re.escape(example)} *$", shown.stdout, re.M)
    assert [pair for pair in pairwise(shown.stdout.splitlines()) if is_broken_early(*pair)] == []
    narrow = printed(name, "--help", columns=40)
    assert (narrow.returncode, narrow.stderr) == (0, "")
    assert max(map(len, narrow.stdout.splitlines())) <= 40


def test_its_version() -> None:
    shown = printed("--version")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == (
        f"shmepoch {version('shmepoch')}, segment layout {at.VERSION}, "
        f"CPython {platform.python_version()}\n"
    )


# --- how every command ends -----------------------------------------------------------------------


@contextlib.contextmanager
def started(world: World, name: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The example of a command in progress, with its error output in a pipe."""
    process = subprocess.Popen(
        [*COMMAND, *world.arguments(name)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        **streams,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def let_end(process: subprocess.Popen[bytes], world: World, name: str) -> str:
    """End a command that stays, wait for the end of any other; its error output."""
    stays = EXAMPLES[name].stays
    if stays is not None:
        eventually(lambda: at_work(process) and (stays(world) or process.poll() is not None))
        process.terminate()
    return process.communicate(timeout=DEADLINE_S)[1].decode()


#: How SIGTERM ends a command that stays: in good order, or as it ends a program without a handler.
_TOLD_TO_END: Final = {0, -signal.SIGTERM, 128 + signal.SIGTERM}


@pytest.mark.parametrize("name", NAMES)
def test_its_reader_has_left(world: World, name: str) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    with started(world, name, stdout=ours) as process:
        os.close(ours)
        error = let_end(process, world, name)
    assert is_clean(error), error
    assert process.returncode in {0, 2, 141, *_TOLD_TO_END}  # 2: it needs a terminal


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("closing", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_its_streams_are_closed(world: World, name: str, closing: str) -> None:
    if EXAMPLES[name].stays is None:
        ended = shell(closing, *world.arguments(name))
        assert (ended.returncode, is_clean(ended.stderr)) == (0, True)
        return
    words = ["sh", "-c", f'exec "$@" {closing}', "-", *COMMAND, *world.arguments(name)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        error = let_end(process, world, name)
    assert is_clean(error), error
    assert process.returncode in {0, 2, *_TOLD_TO_END}


@pytest.mark.parametrize("name", NAMES)
def test_its_terminal_is_narrow(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_terminal(monkeypatch)
    screen = Terminal(40, *world.arguments(name))
    stays = EXAMPLES[name].stays
    try:
        if stays is not None:
            # Before that, a Ctrl-C is the interpreter's own to handle.
            shows_nothing = stays is not always
            eventually(lambda: screen.sent or (shows_nothing and stays(world)))
            while screen.process.poll() is None:
                screen.type(_CONTROL_C)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    screen.process.wait(1)
        assert screen.status() in ({0} if stays is None else {0, 130, -signal.SIGINT})
    finally:
        screen.close()
    assert is_clean(screen.text), screen.text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(world: World, name: str, number: signal.Signals) -> None:
    """At any moment from the import of the library on."""
    with started(world, name, stdout=subprocess.DEVNULL) as process:
        stays = EXAMPLES[name].stays or always
        eventually(lambda: process.poll() is not None or (at_work(process) and stays(world)))
        process.send_signal(number)
        error = process.communicate(timeout=DEADLINE_S)[1].decode()
    assert is_clean(error), error
    assert process.returncode in {0, 2, -number, 128 + number}


@pytest.mark.parametrize("name", [name for name in NAMES if "namespace" in parameters(name)])
def test_a_namespace_that_is_not_usable_is_refused(world: World, name: str) -> None:
    words = world.arguments(name)
    refused = printed(*words, "--namespace", "a/b")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("shmepoch: namespace 'a/b' is not usable")


def test_a_run_in_a_namespace_that_it_is_told(namespace: str) -> None:
    there = f"ls /dev/shm/shmepoch.{namespace}-mine.*"
    assert run("-", "--namespace", f"{namespace}-mine", stdin=f"{there}\n").returncode == 0
    nothing_left(f"{namespace}-mine")


# --- what it logs ---------------------------------------------------------------------------------


def records(text: str) -> list[dict[str, Any]]:
    """What shmepoch itself has logged of a command that logs JSON."""
    found = [json.loads(line) for line in text.splitlines()]
    ours = [record for record in found if record["logger"].startswith("shmepoch.")]
    for record in ours:
        assert {"time", "level", "pid", "message", "event"} <= set(record)
    return ours


def test_its_log_as_json(world: World, adapter: RuntimeSessionAdapter) -> None:
    words = ("--log-level", "info", "--log-json", "persist", "--store", str(world.new))
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        eventually(world.new.exists)
        eventually(lambda: printed("history", "--store", world.new).stdout)
        process.terminate()
        out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert out == f"stored 2 completions of 1 epoch in {world.new}\n"
    epoch = str(adapter.prepare_bindings(world.session).epoch_id)
    followed, left = records(err)
    about = {"level": "info", "session": str(world.session), "epoch": epoch}
    assert followed.items() >= {**about, "event": "epoch_followed"}.items()
    assert left.items() >= {**about, "event": "epoch_left", "seq": 2}.items()


def test_what_failed_is_a_record_too(tmp_path: Path) -> None:
    missing = tmp_path / "missing \x1b[2J"
    refused = printed("--log-json", "history", "--store", missing)
    assert (refused.returncode, refused.stdout) == (2, "")
    (record,) = records(refused.stderr)
    assert refused.stderr.isascii()
    assert (record["event"], record["level"]) == ("command_failed", "error")
    assert str(missing) in record["message"]
    plain = printed("history", "--store", missing)
    assert plain.stderr.startswith("shmepoch: ")
    assert "\x1b" not in plain.stderr


def test_a_run_logs_its_events(namespace: str) -> None:
    words = [*COMMAND, "--log-level", "debug", "--log-json"]
    done = run("-", "--kill-every", 0.3, "--retries", 20, stdin="sleep 1\n" * 2, command=words)
    events = {record["event"] for record in records(done.stderr)}
    assert {"epoch_created", "participants_ended", "session_unregistered"} <= events
    quiet = run("-", stdin="true\n")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    nothing_left(namespace)


_AGENT_FAILS: Final = """
from shmepoch.cli import main
from shmepoch.cli.run.transcript import Transcript


def fail(*_):
    raise OSError(28, "No space left on device", "told")


Transcript.__init__ = fail
if __name__ == "__main__":
    main()
"""


def test_the_processes_of_a_run_log_as_it_does(namespace: str, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(_AGENT_FAILS)
    done = run("-", stdin="true\n", command=[sys.executable, str(script), "--log-json"])
    assert done.returncode == 3
    agents, runs = records(done.stderr)
    assert agents["message"] == f"agent process {agents['pid']}: told: No space left on device"
    assert f"the agent process {agents['pid']} ended with status 1" in runs["message"]
    assert (agents["event"], runs["event"]) == ("command_failed",) * 2
    nothing_left(namespace)


# --- completion -----------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What bash would complete the last word to."""
    shown = printed(
        _SHMEPOCH_COMPLETE="complete_bash",
        COMP_WORDS=" ".join(("shmepoch", *words)),
        COMP_CWORD=str(len(words)),
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    return shown.stdout.split()


def test_a_shell_completes_commands_and_options() -> None:
    assert set(completed("")) == set(NAMES)
    assert completed("hist") == ["history"]
    assert completed("persist", "--max") == ["--max-delay"]
    script = printed(_SHMEPOCH_COMPLETE="source_bash")
    assert (script.returncode, "_SHMEPOCH_COMPLETE=complete_bash" in script.stdout) == (0, True)


def test_a_shell_completes_the_sessions_of_a_store(tmp_path: Path) -> None:
    path, ids = tmp_path / "store", [SessionId.new() for _ in range(2)]
    with SqliteRuntimeStore(path) as store:
        for id in ids:
            save(store, id, [completion(1)])
    named = ("history", "--store", str(path))
    assert completed(*named, "") == sorted(map(str, ids))
    assert completed(*named, str(ids[0])[:-1]) == [str(ids[0])]
    assert completed("history", "--store", str(tmp_path / "missing"), "") == []
    assert completed("history", "--store", str(tmp_path), "") == []
    assert completed("history", "") == []
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [name for name in NAMES if "epoch" in parameters(name)])
def test_a_shell_completes_live_sessions(world: World, name: str) -> None:
    session = str(world.session)
    assert completed(name, session[:6]) == [session]
    assert completed(name, "x") == []
    assert completed(name, "--namespace", "a/b", "") == []
