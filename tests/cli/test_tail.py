"""`shmepoch tail`: what it shows first, what it shows then, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from shmepoch import (
    OpsLifecycleConfig,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
    remove_unused,
)
from shmepoch import _native as at
from shmepoch.epoch.completions import CompletionEntry
from tests.cli.running import COMMAND, DEADLINE_S
from tests.cli.test_streams import shell
from tests.cli.test_terminal import Terminal, of_a_terminal
from tests.epoch.operations import end
from tests.processes.children import Channel, start
from tests.support import damage_record, eventually, held_writer, result, spec


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own way to write to a pipe, which keeps what is not flushed."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def tail(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    return subprocess.run(
        [*COMMAND, "tail", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


class Tail:
    """The command while it follows an epoch."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> str:
        """The next line; it waits for that."""
        return self._out.readline().rstrip("\n")

    def names(self, count: int) -> list[str]:
        """The names of the operations in the next lines of JSON."""
        return [json.loads(self.line())["display_name"] for _ in range(count)]

    def leave(self) -> None:
        """Read no more."""
        self._out.close()
        self.process.stdout = None

    @property
    def _out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def ended(self) -> tuple[int, str, str]:
        """Its status, what it still printed, and its standard error."""
        out, err = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, out, err


@contextlib.contextmanager
def tailing(*arguments: object) -> Iterator[Tail]:
    with subprocess.Popen(
        [*COMMAND, "tail", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Tail(process)
        finally:
            process.kill()


def complete(bindings: SessionRuntimeBindings, *names: str) -> None:
    registry = bindings.ops_lifecycle
    for name in names:
        one = spec(name)
        registry.register_operation(one)
        registry.provisioning_succeeded(one.id)
        registry.complete_operation(one.id, result(one.id))


def numbered(first: int, last: int) -> list[str]:
    return [f"job {n}" for n in range(first, last + 1)]


def sleepers(bindings: SessionRuntimeBindings) -> bool:
    """Whether the epoch's event says that a waiter sleeps."""
    word = bindings.shared_segment().memory.load(at.EVENT_AT)
    return word.to_bytes(8, sys.byteorder)[4:] != bytes(4)


def test_the_last_ones_and_then_each_that_comes(bindings: SessionRuntimeBindings) -> None:
    complete(bindings, *numbered(1, 12))
    with tailing(bindings.session_id, "--json") as shown:
        assert shown.names(10) == numbered(3, 12)
        for turn in range(13, 16):
            complete(bindings, f"job {turn}")
            assert shown.names(1) == [f"job {turn}"]  # it is not kept back for more
        # It is there, and not in the epoch: no process waits for it or counts it.
        assert [one.pid for one in bindings.participants()] == [os.getpid()]


def test_a_line_says_when_and_how(bindings: SessionRuntimeBindings) -> None:
    complete(bindings, "index \x1b[31mthe\nrepository")
    end(bindings.ops_lifecycle, "not needed\nany more")
    shown = tail(str(bindings.epoch_id)[:30], "--no-follow")
    assert (shown.returncode, shown.stderr) == (0, "")
    first, second = shown.stdout.splitlines()
    assert first.split()[0] == "1"
    assert first.endswith(r"  completed   index \x1b[31mthe\nrepository  in 1 ms")
    assert second.endswith("  cancelled   work  not needed")


def test_json_is_the_entry(bindings: SessionRuntimeBindings) -> None:
    complete(bindings, *numbered(1, 3))
    shown = tail(bindings.session_id, "--no-follow", "--json")
    entries = tuple(CompletionEntry.from_json(line) for line in shown.stdout.splitlines())
    assert entries == bindings.ops_lifecycle.completion_feed().list_since(0).entries


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--last", 2), numbered(4, 5)),
        (("--last", 0), []),
        (("--last", 99), numbered(1, 5)),
        (("--since", 0), numbered(1, 5)),
        (("--since", 4), numbered(5, 5)),
        (("--since", 5), []),
        (("--since", 2**64 - 1), []),
    ],
)
def test_where_it_begins(
    bindings: SessionRuntimeBindings, options: tuple[object, ...], expected: list[str]
) -> None:
    complete(bindings, *numbered(1, 5))
    shown = tail(bindings.session_id, "--no-follow", "--json", *options)
    assert shown.returncode == 0
    assert [json.loads(line)["display_name"] for line in shown.stdout.splitlines()] == expected


def test_none_of_those_before(bindings: SessionRuntimeBindings) -> None:
    complete(bindings, "before")
    with tailing(bindings.session_id, "--json", "--last", 0) as shown:
        eventually(lambda: sleepers(bindings))
        complete(bindings, "after")
        assert shown.names(1) == ["after"]


SMALL = OpsLifecycleConfig(max_operations=1, max_completed=1, feed_bytes=at.PAGE + 1024)


@pytest.fixture
def small(namespace: str) -> Iterator[SessionRuntimeBindings]:
    """An epoch that soon drops what has ended."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=SMALL) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        yield bindings
        adapter.unregister_session(bindings.session_id)


def test_what_was_dropped_before_it_was_read(small: SessionRuntimeBindings) -> None:
    complete(small, *numbered(1, 200))
    dropped = small.ops_lifecycle.completion_feed().list_since(0).dropped_through
    assert 0 < dropped < 200
    gap, first, *_ = tail(small.session_id, "--no-follow", "--json", "--since", 2).stdout.split(
        "\n"
    )
    assert json.loads(gap) == {
        "gap": {"after_seq": 2, "dropped_through": dropped, "missing": dropped - 2}
    }
    assert json.loads(first)["seq"] == dropped + 1
    line, *_ = tail(small.session_id, "--no-follow", "--since", 2).stdout.split("\n")
    assert line == f"{dropped - 2} dropped before they were read: 3 to {dropped}"


def test_it_goes_on_after_a_gap(small: SessionRuntimeBindings) -> None:
    complete(small, "job 1")
    with tailing(small.session_id, "--json") as shown:
        assert shown.names(1) == ["job 1"]
        shown.process.send_signal(signal.SIGSTOP)
        complete(small, *numbered(2, 200))
        shown.process.send_signal(signal.SIGCONT)
        seen = 1
        while seen < 200:
            found = json.loads(shown.line())
            if "gap" in found:
                assert found["gap"]["after_seq"] == seen
                seen = found["gap"]["dropped_through"]
            else:
                assert found["seq"] == seen + 1
                seen += 1
        complete(small, "job 201")
        assert shown.names(1) == ["job 201"]


def test_the_end_of_the_epoch(adapter: RuntimeSessionAdapter) -> None:
    """What is left is shown, and a reset is the end of what was followed."""
    bindings = adapter.prepare_bindings(SessionId.new())
    complete(bindings, "job 1")
    with tailing(bindings.session_id, "--json") as shown:
        assert shown.names(1) == ["job 1"]
        shown.process.send_signal(signal.SIGSTOP)
        complete(bindings, "job 2", "job 3")
        adapter.reset_session(bindings.session_id)
        shown.process.send_signal(signal.SIGCONT)
        assert shown.names(2) == ["job 2", "job 3"]
        status, out, err = shown.ended()
    assert (status, out) == (0, "")
    assert err == f"shmepoch: epoch {bindings.epoch_id} is sealed, and this was all of it\n"
    adapter.unregister_session(bindings.session_id)


def test_a_sealed_epoch_is_shown(bindings: SessionRuntimeBindings) -> None:
    complete(bindings, "job 1")
    bindings.shared_segment().seal()
    shown = tail(bindings.session_id)
    assert (shown.returncode, "job 1" in shown.stdout, "sealed" in shown.stderr) == (0, True, True)


def test_a_name_that_is_gone(namespace: str) -> None:
    """Where no process uses the epoch, the command finds it by itself; it holds up no removal."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        complete(bindings, "job 1")
        shared = bindings.shared_segment().memory
    with tailing(bindings.session_id, "--json") as shown:
        assert shown.names(1) == ["job 1"]
        assert remove_unused(bindings.session_id, namespace=namespace)
        status, out, err = shown.ended()
    assert shared.load(at.STATE_AT) == at.OPEN
    assert (status, out) == (1, "")
    assert f"epoch {bindings.epoch_id} of session {bindings.session_id} is gone" in err


def test_a_name_that_another_process_misses(namespace: str) -> None:
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        complete(bindings, "job 1")
        with tailing(bindings.session_id, "--json") as shown:
            assert shown.names(1) == ["job 1"]
            bindings.shared_segment().path.unlink()
            eventually(lambda: bindings.ended)  # the adapter says so
            status, _, err = shown.ended()
    assert status == 1
    assert "is gone" in err


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_end_it_quietly(
    bindings: SessionRuntimeBindings, number: signal.Signals, status: int
) -> None:
    complete(bindings, "job 1")
    with tailing(bindings.session_id, "--json") as shown:
        assert shown.names(1) == ["job 1"]
        shown.process.send_signal(number)
        assert shown.ended() == (status, "", "")


def test_whoever_reads_it_may_leave(bindings: SessionRuntimeBindings) -> None:
    """As `head -1` does. It need not wait for another completion to notice."""
    complete(bindings, "job 1")
    with tailing(bindings.session_id, "--json") as shown:
        assert shown.names(1) == ["job 1"]
        shown.leave()
        status, _, err = shown.ended()
    assert (status, err) == (141, "")


def test_a_sleeper_that_is_killed_disturbs_nobody(bindings: SessionRuntimeBindings) -> None:
    with tailing(bindings.session_id, "--json") as killed, tailing(bindings.session_id) as other:
        complete(bindings, "job 1")
        assert killed.names(1) == ["job 1"]
        assert "job 1" in other.line()
        eventually(lambda: sleepers(bindings))
        killed.process.kill()
        killed.process.wait(DEADLINE_S)
        complete(bindings, "job 2")
        assert "job 2" in other.line()
    complete(bindings, "job 3")
    assert not sleepers(bindings)  # nothing is left that each commit would have to wake


def _complete_later(bindings: SessionRuntimeBindings, channel: Channel) -> None:
    channel.say("here")
    while (name := channel.hear()) is not None:
        complete(bindings, name)
        channel.say(name)


def test_a_writer_that_stands_still(bindings: SessionRuntimeBindings) -> None:
    """What is committed is shown, and the rest is waited for."""
    with start(_complete_later, bindings) as worker, tailing(bindings.session_id) as shown:
        worker.hear()
        complete(bindings, "job 1")
        assert "job 1" in shown.line()
        with held_writer(bindings.shared_segment()):
            worker.say("job 2")
            assert "job 1" in tail(bindings.session_id, "--no-follow").stdout
            eventually(lambda: sleepers(bindings))
            assert worker.silent
        assert "job 2" in shown.line()
        assert worker.hear() == "job 2"
        worker.say(None)
        assert worker.join() == 0


@pytest.mark.parametrize("columns", [10, 60])
def test_a_line_fits_the_terminal(
    bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    of_a_terminal(monkeypatch)
    complete(bindings, "n" * 100, "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 50)
    screen = Terminal(columns, "tail", bindings.session_id, "--no-follow")
    try:
        assert screen.status() == 0
    finally:
        screen.close()
    lines = screen.text.splitlines()
    assert len(lines) == 2
    assert [line[-1] for line in lines] == ["…", "…"]
    assert len(lines[0]) == columns


def test_ctrl_c_is_typed(bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_terminal(monkeypatch)
    complete(bindings, "job 1")
    screen = Terminal(80, "tail", bindings.session_id)
    try:
        eventually(lambda: "job 1" in screen.text, within=60)
        screen.type(b"\x03")
        assert screen.status() == 130
    finally:
        screen.close()
    assert "Traceback" not in screen.text


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (("00000000",), 2, "no session or epoch"),
        (("00000000", "--namespace", "a/b"), 2, "namespace 'a/b' is not usable"),
        (("00000000", "--last", "1", "--since", "2"), 2, "--since with --last"),
        (("00000000", "--since", "-1"), 2, "--since"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], status: int, why: str) -> None:
    shown = tail(*arguments)
    assert (shown.returncode, shown.stdout) == (status, "")
    assert why in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_damaged_entry_is_named(namespace: str) -> None:
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        complete(bindings, *numbered(1, 3))
        damage_record(bindings.shared_segment(), 2)
        shown = tail(bindings.session_id)
        assert shown.returncode == 3
        assert "is corrupted: feed[2]" in shown.stderr
        adapter.unregister_session(bindings.session_id)


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_without_a_standard_stream(bindings: SessionRuntimeBindings, closing: str) -> None:
    complete(bindings, "job 1")
    shown = shell(closing, "tail", bindings.session_id, "--no-follow")
    assert (shown.returncode, shown.stderr) == (0, "")


def test_a_device_that_is_full(bindings: SessionRuntimeBindings, tmp_path: Path) -> None:
    complete(bindings, "job 1")
    shown = shell(">/dev/full", "tail", bindings.session_id)
    assert (shown.returncode, "No space left" in shown.stderr) == (3, True)
