"""The jobs file: its commands, and the errors of bad lines."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from shmepoch.cli.run.jobs import Job, JobsInvalid, read


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


def test_commands_keep_the_number_of_their_line(file: Path) -> None:
    file.write_text("# first\n\necho one\n  # indented\n\t echo two # not a line of its own \n")
    assert read(file) == [Job(3, "echo one"), Job(5, "echo two # not a line of its own")]


def test_the_last_line_needs_no_end_and_lines_may_end_as_on_windows(file: Path) -> None:
    file.write_bytes(b"echo one\r\necho two")
    assert read(file) == [Job(1, "echo one"), Job(2, "echo two")]


def test_only_a_newline_ends_a_line(file: Path) -> None:
    file.write_text("printf 'a\x0cb\u2028c\x85d'\ntrue\n")
    assert [job.line for job in read(file)] == [1, 2]


def test_a_command_may_hold_any_text(file: Path) -> None:
    file.write_text("echo 'käse \U0001f9c0'\n", encoding="utf-8")
    assert read(file)[0].command == "echo 'käse \U0001f9c0'"


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"true\n")))
    assert read(Path("-")) == [Job(1, "true")]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xef\xbb\xbfecho one\necho two\n", id="utf-8 with a mark"),
        pytest.param(b"\xef\xbb\xbfecho one\r\necho two\r\n", id="and CRLF"),
        pytest.param(b"echo one\n\xef\xbb\xbfecho two", id="joined files"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_command(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert read(file) == [Job(1, "echo one"), Job(2, "echo two")]


def test_a_comment_may_begin_with_a_byte_order_mark(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf# a comment\r\n\r\ntrue")
    assert read(file) == [Job(3, "true")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_another_unicode_is_refused_with_what_to_do(file: Path, encoding: str) -> None:
    for mark in ("", "\ufeff"):
        file.write_bytes(f"{mark}echo one\r\necho two\r\n".encode(encoding))
        with pytest.raises(JobsInvalid, match=r"line 1: .*UTF-16.*save it as UTF-8"):
            read(file)


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        pytest.param(b"true\necho caf\xe9\n", 2, "byte 9 is 0xe9.*as UTF-8", id="latin-1"),
        pytest.param(b"true\recho two\r", 1, "CR alone", id="carriage returns"),
        pytest.param(b"true\necho \0\n", 2, "NUL", id="nul"),
        pytest.param(b"true\n\necho \xff\n", 3, "UTF-8", id="undecodable"),
        pytest.param(b"# a 'quote'\necho 'open\ntrue'\n", 2, "not a shell command", id="quote"),
        pytest.param(b"true\nif true; then\ntrue\nfi\n", 2, "not a shell command", id="if"),
        pytest.param(b"true )\n", 1, "not a shell command", id="parenthesis"),
        pytest.param(b"true\necho one \\\ntwo\n", 2, "backslash", id="continuation"),
        pytest.param(b"}; true; {\n", 1, "not a shell command", id="braces"),
    ],
)
def test_a_bad_line_is_named(file: Path, content: bytes, line: int, reason: str) -> None:
    file.write_bytes(content)
    with pytest.raises(JobsInvalid, match=reason) as caught:
        read(file)
    assert (caught.value.path, caught.value.line) == (str(file), line)
    assert f"{file}, line {line}: " in str(caught.value)


def test_the_first_of_several_bad_lines_is_named(file: Path) -> None:
    file.write_text("true\n" * 100 + "echo 'a\n" + "true\n" * 100 + "echo 'b\n")
    with pytest.raises(JobsInvalid) as caught:
        read(file)
    assert caught.value.line == 101


def test_a_backslash_that_is_quoted_continues_nothing(file: Path) -> None:
    file.write_text("echo a\\\\\necho '\\'\n")
    assert len(read(file)) == 2


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "# only\n  # comments\n"])
def test_a_file_without_commands_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(JobsInvalid, match="no commands") as caught:
        read(file)
    assert caught.value.line is None


def test_checking_runs_nothing(file: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    file.write_text(f"touch {made}\n}}; touch {made}; {{\n")
    with pytest.raises(JobsInvalid):
        read(file)
    assert not made.exists()
