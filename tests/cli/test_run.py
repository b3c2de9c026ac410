"""`shmepoch run` on real commands: their outcomes, and its output."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest

from tests.cli.running import (
    ended,
    nothing_left,
    run,
    started,
    summary,
    told,
    transcripts,
    waiting,
    waits,
)

_WITHOUT = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name={missing!r})


sys.meta_path.insert(0, Absent())
from shmepoch.cli import main

main()
"""

_LACKING = """
import sys
from shmepoch.cli import main
from shmepoch.cli.run import children
from shmepoch.errors import SharedMemoryExhausted
from shmepoch.runtime.adapter import RuntimeSessionAdapter


def lack(*args, **kwargs):
    raise {{
        "room": SharedMemoryExhausted(1, 0, "/dev/shm"),
        "process": BlockingIOError(11, "Resource temporarily unavailable"),
        "thread": RuntimeError("can't start new thread"),
    }}[{missing!r}]


if __name__ == "__main__":
    if {missing!r} == "process":
        children.Children.start = lack
    else:
        RuntimeSessionAdapter.prepare_bindings = lack
    main()
"""


def test_all_complete(namespace: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs"
    file.write_text("# greetings\necho hello\n\necho there\n")
    done = run(file, "--transcript", tmp_path / "told", "--json")
    assert done.returncode == 0
    figures = summary(done.stdout)
    assert {key: figures[key] for key in ("commands", "operations", "completed", "failed")} == {
        "commands": 2,
        "operations": 2,
        "completed": 2,
        "failed": 0,
    }
    assert figures["notices"] == {"delivered": 2, "duplicates": 0, "lost": 0}
    (session,) = figures["sessions"]
    assert session["watermark"] == 2
    # The agent's first turn needs no continuation, so the loop may not have observed its notices.
    assert session["cursors"].pop("agent_applied_cursor") == 2
    assert max(session["cursors"].values()) <= 2
    lines = transcripts(tmp_path / "told")[session["session_id"]]
    assert {line["epoch_id"] for line in lines} == {session["epoch_id"]}
    assert [line["seq"] for line in lines] == [1, 2]
    assert {(line["command"], line["status"], line["output"]) for line in lines} == {
        ("echo hello", "completed", "hello\n"),
        ("echo there", "completed", "there\n"),
    }
    assert len({line["operation_id"] for line in lines}) == 2
    nothing_left(namespace)


def test_the_summary_has_the_agreed_keys() -> None:
    figures = summary(run("-", "--json", stdin="true\n").stdout)
    counts = {"commands", "operations", "completed", "failed", "terminated", "cancelled", "retried"}
    counts |= {"finished_before"}
    assert set(figures) == counts | {"notices", "kills", "restarts", "duration_s", "sessions"}
    assert set(figures["notices"]) == {"delivered", "duplicates", "lost"}
    assert {"session_id", "epoch_id", "watermark", "cursors"} <= set(figures["sessions"][0])
    assert isinstance(figures["duration_s"], float)


def test_commands_are_spread_over_the_sessions(tmp_path: Path) -> None:
    stdin = "".join(f"echo {number}\n" for number in range(7))
    done = run("-", "--sessions", 3, "--transcript", tmp_path, "--json", stdin=stdin)
    figures = summary(done.stdout)
    by_session = transcripts(tmp_path)
    assert sorted(map(len, by_session.values())) == [2, 2, 3]
    assert set(by_session) == {session["session_id"] for session in figures["sessions"]}
    assert len({session["epoch_id"] for session in figures["sessions"]}) == 3
    assert figures["notices"] == {"delivered": 7, "duplicates": 0, "lost": 0}


def test_there_is_no_more_of_anything_than_there_are_commands() -> None:
    done = run("-", "--sessions", 9, "--workers", 9, "--json", stdin="true\ntrue\n")
    assert done.returncode == 0
    assert len(summary(done.stdout)["sessions"]) == 2


def test_one_line_for_each_event() -> None:
    done = run("-", stdin="# a comment\necho hello\nexit 3\n")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "2 commands in 1 session"
    assert "session 1: started    line 2: echo hello" in lines
    assert "session 1: started    line 3: exit 3" in lines
    assert any(re.fullmatch(r"session 1: completed  line 2 in \d+ ms", line) for line in lines)
    failed = r"session 1: failed     line 3 \(exit status 3 after \d+ ms\)"
    assert any(re.fullmatch(failed, line) for line in lines)
    assert "session 1: agent has been told of 2 completions" in lines
    assert "2 notices delivered, 0 duplicates, 0 lost" in lines[-1]
    assert done.stderr == ""


def test_with_json_the_events_go_to_stderr() -> None:
    done = run("-", "--json", stdin="echo hello\n")
    assert summary(done.stdout)["completed"] == 1
    assert "line 1: echo hello" in done.stderr


def test_a_command_that_fails(tmp_path: Path) -> None:
    stdin = "echo said; echo so >&2; exit 3\nkill -9 $$\nno-such-program\n"
    done = run("-", "--json", "--transcript", tmp_path, stdin=stdin)
    assert done.returncode == 1
    figures = summary(done.stdout)
    assert (figures["completed"], figures["failed"], figures["notices"]["lost"]) == (0, 3, 0)
    by_command = {line["command"]: line for line in told(tmp_path)}
    assert {line["status"] for line in by_command.values()} == {"failed"}
    first = by_command["echo said; echo so >&2; exit 3"]["output"]
    assert first.startswith("exit status 3 after ")
    assert first.endswith(" ms\nsaid\nso\n")
    assert by_command["kill -9 $$"]["output"].startswith("killed by SIGKILL after ")
    assert "not found" in by_command["no-such-program"]["output"]


def test_what_a_failed_command_printed_is_shown() -> None:
    done = run("-", stdin="echo said; echo so >&2; exit 3\necho fine\nseq 1 200; false\n")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    (first,) = (number for number, line in enumerate(lines) if "failed     line 1" in line)
    assert lines[first + 1 : first + 3] == ["    | said", "    | so"]
    (last,) = (number for number, line in enumerate(lines) if "failed     line 3" in line)
    shown = lines[last + 1 : last + 12]
    assert shown == ["    | ...", *(f"    | {number}" for number in range(191, 201))]
    assert "    | fine" not in lines


def test_a_long_line_of_a_failed_command_is_shown_in_part() -> None:
    done = run("-", stdin="yes x | tr -d '\\n' | head -c 3000; false\n")
    assert f"    | {'x' * 200}..." in done.stdout.splitlines()


def test_transcripts_have_fields_for_machines(tmp_path: Path) -> None:
    long = f"true {'é' * 150}"
    stdin = f"# first\nsleep 0.2\nexit 7\nkill -9 $$\nseq 1 5000\n\nseq 1 5000; exit 5\n{long}\n"
    before = time.time_ns() // 1_000_000
    run("-", "--transcript", tmp_path, stdin=stdin)
    after = time.time_ns() // 1_000_000
    by_line = {line["line"]: line for line in told(tmp_path)}
    assert sorted(by_line) == [2, 3, 4, 5, 7, 8]
    assert all(before <= line["completed_at_ms"] <= after for line in by_line.values())
    assert by_line[2]["duration_ms"] >= 200
    fields = ("exit_status", "signal", "output_cut", "output_bytes", "command_cut")
    found = {number: [line.get(field) for field in fields] for number, line in by_line.items()}
    size = len("".join(f"{number}\n" for number in range(1, 5001)))
    assert found == {
        2: [0, None, None, None, None],
        3: [7, None, None, None, None],
        4: [None, "SIGKILL", None, None, None],
        5: [0, None, True, size, None],
        7: [5, None, True, size, None],
        8: [0, None, None, None, True],
    }
    assert by_line[5]["output"].endswith("\n4999\n5000\n")
    assert len(by_line[5]["output"]) == 4096
    assert by_line[8]["command"] == long.encode()[:200].decode(errors="ignore") + "…"


def test_no_output_passes_for_one_that_was_cut(tmp_path: Path) -> None:
    stdin = "echo '[the end of 5000 bytes]'; echo x\nhead -c 4096 /dev/zero | tr '\\0' x\n"
    stdin += "head -c 4097 /dev/zero | tr '\\0' x\n"
    run("-", "--transcript", tmp_path, stdin=stdin)
    by_line = {line["line"]: line for line in told(tmp_path)}
    assert by_line[1]["output"] == "[the end of 5000 bytes]\nx\n"
    assert by_line[2]["output"] == by_line[3]["output"] == "x" * 4096
    sizes = [by_line[number].get("output_bytes") for number in (1, 2, 3)]
    assert sizes == [None, None, 4097]


@pytest.mark.parametrize("missing", ["room", "process", "thread"])
def test_a_run_that_cannot_be_carried_out_has_a_status_of_its_own(
    namespace: str, missing: str
) -> None:
    command = (sys.executable, "-c", _LACKING.format(missing=missing))
    done = run("-", stdin="false\n", command=command)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False)
    assert done.stderr.startswith("shmepoch: ")
    nothing_left(namespace)


def test_a_fault_of_the_program_is_not_taken_for_a_failed_command(namespace: str) -> None:
    faulty = (
        "from shmepoch.cli import main; from shmepoch.cli.run import command; "
        "command.execute = lambda *_: {}[0]; main()"
    )
    done = run("-", stdin="true\n", command=(sys.executable, "-c", faulty))
    assert done.returncode == 3
    assert "KeyError" in done.stderr


def test_the_statuses_are_in_the_help() -> None:
    shown = run("--help", stdin="").stdout
    for status in ("0 if", "1 if", "2 if", "3 if", "130", "143", "129", "141"):
        assert status in " ".join(shown.replace("│", " ").split())


def test_a_command_that_cannot_start(tmp_path: Path) -> None:
    too_long = "echo " + "x" * 200_000  # Linux takes 128 KiB in one argument
    done = run("-", "--json", "--transcript", tmp_path, stdin=f"{too_long}\ntrue\n")
    assert done.returncode == 1
    figures = summary(done.stdout)
    assert (figures["completed"], figures["failed"]) == (1, 1)
    (failed,) = (line for line in told(tmp_path) if line["status"] == "failed")
    assert "could not be started" in failed["output"]
    assert "Argument list too long" in failed["output"]
    assert "ms" not in failed["output"]


def test_output_that_is_not_utf8_is_kept_with_replacement_characters(tmp_path: Path) -> None:
    run("-", "--transcript", tmp_path, stdin=r"printf 'caf\351 ol\303\251\n'")
    (line,) = told(tmp_path)
    assert line["output"] == "caf\N{REPLACEMENT CHARACTER} olé\n"


def test_whatever_bytes_a_command_prints_its_transcript_is_json(tmp_path: Path) -> None:
    every = "".join(f"\\{byte:03o}" for byte in range(256))
    stdin = f"printf '{every}'\nprintf '{every}'; false\nhead -c 100000 /dev/zero\n"
    stdin += r"printf '%s\n' \udcff '\355\263\277'; printf '\355\263\277'; exit 2"
    done = run("-", "--json", "--transcript", tmp_path, stdin=stdin)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    lines = {line["line"]: line for line in told(tmp_path)}
    assert [lines[number]["status"] for number in (1, 2, 3, 4)] == [
        "completed",
        "failed",
        "completed",
        "failed",
    ]
    printed = bytes(range(256)).decode(errors="replace")
    assert lines[1]["output"] == printed
    assert lines[2]["output"].endswith(f" ms\n{printed}")
    assert set(lines[3]["output"]) == {"\0"}


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_files_may_have_names_in_any_encoding(
    namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locale: str
) -> None:
    for name, value in (("LC_ALL", locale), ("PYTHONCOERCECLOCALE", "0"), ("PYTHONUTF8", "0")):
        monkeypatch.setenv(name, value)
    file, folder, store = (
        tmp_path / os.fsdecode(name) for name in (b"jobs-\xff", b"told-\xe9", b"store-\xe9")
    )
    file.write_text("echo one\n")
    done = run(file, "--transcript", folder, "--store", store)
    assert done.returncode == 0, done.stderr
    assert [line["output"] for line in told(folder)] == ["one\n"]
    file.write_bytes(b"echo caf\xe9\n")
    refused = run(file, "--store", store)
    assert refused.returncode == 2
    assert "line 1: not UTF-8" in refused.stderr
    nothing_left(namespace)


def test_commands_are_utf8_in_every_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LC_ALL", "C"), ("PYTHONCOERCECLOCALE", "0"), ("PYTHONUTF8", "0")):
        monkeypatch.setenv(name, value)
    done = run("-", "--transcript", tmp_path, stdin="echo käse 🧀\n")
    assert done.returncode == 0
    assert "line 1: echo k\\xe4se" in done.stdout
    assert told(tmp_path)[0]["output"] == "käse 🧀\n"


def test_of_ten_megabytes_of_output_the_tail_is_kept(tmp_path: Path) -> None:
    done = run("-", "--json", "--transcript", tmp_path, stdin="seq -f %09.0f 1 1000000\n")
    assert done.returncode == 0
    (line,) = told(tmp_path)
    lines = line["output"].splitlines()
    assert lines[-1] == "001000000"
    assert 100 < len(lines) < 1000


def test_a_character_at_the_cut_is_left_out_not_replaced(tmp_path: Path) -> None:
    for shift in range(3):  # one of them cuts a character of three bytes in each place
        stdin = f"yes € | tr -d '\\n' | head -c 30000; printf %s {'x' * shift}\n"
        run("-", "--transcript", tmp_path / str(shift), stdin=stdin)
        (line,) = told(tmp_path / str(shift))
        assert line["output"].rstrip("x") == "€" * ((4096 - shift) // 3)


def test_output_without_a_newline_or_of_nothing_but_bad_bytes(tmp_path: Path) -> None:
    stdin = "head -c 1000000 /dev/zero | tr '\\0' '\\377'\n"
    done = run("-", "--json", "--transcript", tmp_path, stdin=stdin)
    assert done.returncode == 0
    (line,) = told(tmp_path)
    assert set(line["output"]) == {"\N{REPLACEMENT CHARACTER}"}


def test_a_command_reads_nothing_of_ours_and_has_its_own_signals(tmp_path: Path) -> None:
    stdin = "cat; kill -INT $$; echo not reached\nkill -TERM $$; echo not reached\n"
    run("-", "--transcript", tmp_path, stdin=stdin)
    outputs = sorted(line["output"].partition(" after ")[0] for line in told(tmp_path))
    assert outputs == ["killed by SIGINT", "killed by SIGTERM"]


def test_what_commands_left_behind_is_reaped(tmp_path: Path) -> None:
    stdin = "true &\n" * 20 + f"{waits(tmp_path)}; true\n"
    with started("-", "--workers", 1, stdin=stdin) as process:
        (waiter,) = waiting(tmp_path)
        found = psutil.Process(process.pid).children(recursive=True)
        zombies = [one for one in found if one.status() == psutil.STATUS_ZOMBIE]
        assert len(zombies) < 10  # those of the last commands may have ended after they were asked
        waiter.kill()
        assert ended(process)[0] == 0


def test_a_busy_background_process_does_not_hold_its_command_up(
    namespace: str, tmp_path: Path
) -> None:
    done = run("-", "--transcript", tmp_path, stdin="yes & sleep 0.2\n")
    assert done.returncode == 0
    nothing_left(namespace)


def test_what_a_command_leaves_in_the_background_does_not_hold_it_up(
    namespace: str, tmp_path: Path
) -> None:
    done = run("-", "--json", "--transcript", tmp_path, stdin="sleep 601 & echo done\n")
    assert done.returncode == 0
    assert told(tmp_path)[0]["output"] == "done\n"
    nothing_left(namespace)


def test_what_a_command_left_in_a_session_of_its_own_ends_with_the_run(namespace: str) -> None:
    assert run("-", stdin="setsid -f sleep 602; true\n").returncode == 0
    nothing_left(namespace)


def test_more_commands_than_the_feed_retains(tmp_path: Path) -> None:
    done = run("-", "--json", "--workers", 4, "--transcript", tmp_path, stdin="true\n" * 1500)
    figures = summary(done.stdout)
    assert done.returncode == 0
    assert figures["notices"] == {"delivered": 1500, "duplicates": 0, "lost": 0}
    assert [line["seq"] for line in told(tmp_path)] == list(range(1, 1501))


def test_the_console_script_is_the_same_command() -> None:
    script = shutil.which("shmepoch", path=sysconfig.get_path("scripts"))
    assert script is not None
    assert run("-", stdin="true\n", command=[script]).returncode == 0


@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        ("", "standard input: no commands"),
        ("true\necho 'open\n", "standard input, line 2: "),
        (b"true\n\xff\n", "standard input, line 2: "),
    ],
)
def test_a_bad_file_is_status_2_and_starts_nothing(
    namespace: str, stdin: str | bytes, words: str
) -> None:
    done = run("-", stdin=stdin)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    nothing_left(namespace)


def test_a_file_that_cannot_be_read_is_status_2(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        done = run(path)
        assert done.returncode == 2
        assert str(path) in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--sessions", 0),
        ("--workers", 0),
        ("--retries", -1),
        ("--kill-every", 0),
        ("--kill-every", "nan"),
        ("--wrong",),
    ],
)
def test_a_bad_option_is_status_2(arguments: tuple[object, ...]) -> None:
    done = run("-", *arguments, stdin="true\n")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_transcript_folder_that_cannot_be_made_is_status_2(
    namespace: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = run("-", "--transcript", tmp_path / "file", stdin="true\n")
    assert done.returncode == 2
    assert str(tmp_path / "file") in done.stderr
    nothing_left(namespace)


def test_a_transcript_that_cannot_be_written_ends_the_run(namespace: str) -> None:
    """It does not start agent after agent, which would all fail in the same way."""
    done = run("-", "--transcript", "/proc/self", stdin="true\n")
    assert done.returncode == 3
    assert "agent" in done.stderr
    nothing_left(namespace)


def test_importing_the_library_imports_nothing_of_the_command() -> None:
    code = "import shmepoch, sys; sys.exit(any(m in sys.modules for m in ('typer', 'rich')))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_the_command_says_what_to_install(missing: str) -> None:
    done = run("-", command=[sys.executable, "-c", _WITHOUT.format(missing=missing)])
    assert done.returncode == 1
    assert done.stderr == "the shmepoch command needs its extra: pip install 'shmepoch[cli]'\n"
