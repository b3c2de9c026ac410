"""`shmepoch dump` and `shmepoch restore`, as people and their pipes use them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import stat
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest

from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings
from shmepoch import _native as at
from shmepoch.epoch.operations import OperationStatus, Terminated
from tests.cli.running import COMMAND, DEADLINE_S
from tests.cli.test_streams import shell
from tests.cli.test_terminal import Terminal, of_a_terminal
from tests.epoch.operations import end, reach
from tests.processes.children import Channel, start
from tests.support import empty_shared_memory, eventually, names_in


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.fixture
def elsewhere(namespace: str) -> Iterator[str]:
    """Another namespace, in which epochs are restored."""
    name = f"{namespace}-restored"
    yield name
    empty_shared_memory(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "dumps"
    folder.mkdir()
    return folder


def _work(bindings: SessionRuntimeBindings, channel: Channel) -> None:
    channel.say(reach(bindings.ops_lifecycle, OperationStatus.RUNNING))
    channel.hear()


def test_a_support_case(bindings: SessionRuntimeBindings, elsewhere: str, folder: Path) -> None:
    """An epoch in which a worker stands still is dumped, restored, looked at and gone on with."""
    end(bindings.ops_lifecycle, "not needed")
    file = folder / "case.zip"
    with start(_work, bindings) as worker:
        running = worker.hear()
        worker.signal(signal.SIGSTOP)
        dumped = command("dump", str(bindings.session_id)[:30], file)
        worker.kill()
    assert (dumped.returncode, dumped.stdout, dumped.stderr) == (0, "", "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(folder) == ["case.zip"]

    restored = command("restore", file, "--namespace", elsewhere)
    line = f"restored: shmepoch show {bindings.session_id} --namespace {elsewhere}\n"
    assert (restored.returncode, restored.stdout, restored.stderr) == (0, line, "")
    shown = command("tail", bindings.epoch_id, "-n", elsewhere, "--no-follow")
    assert "cancelled   work  not needed" in shown.stdout

    with RuntimeSessionAdapter.ephemeral(namespace=elsewhere) as adapter:
        again = adapter.prepare_bindings(bindings.session_id)
        last = again.ops_lifecycle.completion_feed().list_since(1).entries[-1]
        assert last.operation_id == running
        assert isinstance(last.terminal_outcome, Terminated)
        assert again.ops_lifecycle.check() == ()
        adapter.unregister_session(bindings.session_id)


def test_a_file_that_is_there(bindings: SessionRuntimeBindings, folder: Path) -> None:
    file, link = folder / "dump", folder / "link"
    file.write_text("precious")
    link.symlink_to(folder / "nowhere")
    for there in (file, link, folder):
        refused = command("dump", bindings.session_id, there)
        assert (refused.returncode, "--force replaces it" in refused.stderr) == (2, True)
    assert file.read_text() == "precious"
    assert command("dump", bindings.session_id, file, "--force").returncode == 0
    assert zipfile.is_zipfile(file)
    assert sorted(os.listdir(folder)) == ["dump", "link"]


def test_what_cannot_be_a_dump(bindings: SessionRuntimeBindings, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for target, why in (
        (folder / "no" / "dump", "there is no folder"),
        (folder / "pipe", "no regular file"),
        (folder, "no regular file"),
        (Path("/dev/null"), "no regular file"),
    ):
        refused = command("dump", bindings.session_id, target, "--force")
        assert (refused.returncode, why in refused.stderr) == (2, True)
    assert os.listdir(folder) == ["pipe"]


def test_standard_output(bindings: SessionRuntimeBindings) -> None:
    dumped = subprocess.run(
        [*COMMAND, "dump", str(bindings.session_id), "-"], capture_output=True, check=True
    )
    with zipfile.ZipFile(io.BytesIO(dumped.stdout)) as archive:
        assert archive.testzip() is None
        assert json.loads(archive.read("epoch.json"))["moving"] is False


def test_a_terminal_gets_no_dump(
    bindings: SessionRuntimeBindings, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_a_terminal(monkeypatch)
    screen = Terminal(200, "dump", bindings.session_id, "-")
    try:
        assert screen.status() == 2
    finally:
        screen.close()
    assert screen.text.strip().endswith("it is a terminal; send it to a file")


def test_a_pipe_that_is_read_no_more(bindings: SessionRuntimeBindings) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    left = subprocess.run(
        [*COMMAND, "dump", str(bindings.session_id), "-"],
        stdout=ours,
        stderr=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=False,
    )
    os.close(ours)
    assert (left.returncode, left.stderr) == (141, b"")


def test_a_device_that_is_full(bindings: SessionRuntimeBindings, folder: Path) -> None:
    full = shell(">/dev/full", "dump", bindings.session_id, "-")
    assert (full.returncode, "No space left" in full.stderr) == (3, True)
    # A file system that takes no more leaves no half of a dump.
    full = subprocess.run(
        [
            *("sh", "-c", 'ulimit -f 0; exec "$@"', "-"),
            *(*COMMAND, "dump", str(bindings.session_id), str(folder / "dump")),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (full.returncode, "File too large" in full.stderr) == (3, True)
    assert os.listdir(folder) == []


_STOPS: Final = """
import os, signal, shmepoch.cli
from shmepoch.monitoring import dumps
write = dumps.write
def stopped(*args):
    os.kill(os.getpid(), signal.SIGSTOP)
    write(*args)
dumps.write = stopped
shmepoch.cli.main()
"""


@contextlib.contextmanager
def stopped_in_the_middle(
    bindings: SessionRuntimeBindings, file: Path
) -> Iterator[subprocess.Popen[str]]:
    """A dump that is stopped while it has a file open, but nothing in it."""
    arguments = ["dump", str(bindings.session_id), str(file)]
    with subprocess.Popen(
        [*COMMAND[:1], "-c", _STOPS, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            eventually(
                lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, within=60
            )
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_leaves_no_half(
    bindings: SessionRuntimeBindings, folder: Path, number: signal.Signals, status: int
) -> None:
    with stopped_in_the_middle(bindings, folder / "dump") as process:
        (made,) = folder.iterdir()
        assert stat.S_IMODE(made.stat().st_mode) == 0o600
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (status, "")
    assert os.listdir(folder) == []


def test_a_file_that_appears_meanwhile(bindings: SessionRuntimeBindings, folder: Path) -> None:
    with stopped_in_the_middle(bindings, folder / "dump") as process:
        (folder / "dump").write_text("precious")
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, "--force replaces it" in err) == (2, True)
    assert (folder / "dump").read_text() == "precious"
    assert os.listdir(folder) == ["dump"]


def test_a_damaged_epoch(namespace: str, elsewhere: str, folder: Path) -> None:
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        path = bindings.shared_segment().path
    with open(path, "r+b") as segment:
        segment.seek(at.MAGIC_AT)
        segment.write(b"\x1b[31mred")
    dumped = command("dump", bindings.session_id, folder / "dump")
    assert dumped.returncode == 0
    assert "the epoch is damaged: " in dumped.stderr
    assert "magic" in dumped.stderr
    with zipfile.ZipFile(folder / "dump") as archive:
        facts = json.loads(archive.read("epoch.json"))
        memory = archive.read("memory.bin")
    assert facts["summary"]["state"] == "damaged"
    assert "magic" in facts["summary"]["problem"]
    assert memory[64:80] == bytes(16)
    image = path.read_bytes()
    assert memory == image[:64] + bytes(16) + image[80:]
    path.unlink()
    refused = command("restore", folder / "dump", "-n", elsewhere)
    assert (refused.returncode, "its magic is" in refused.stderr) == (2, True)
    assert names_in(elsewhere) == []


def test_what_restore_refuses(
    bindings: SessionRuntimeBindings, namespace: str, elsewhere: str, folder: Path
) -> None:
    file, text = folder / "dump", folder / "text\x1b"
    assert command("dump", bindings.session_id, file).returncode == 0
    text.write_text("no dump")
    for arguments, why in (
        ((file,), "exists already"),
        ((text, "-n", elsewhere), "it is no whole zip file"),
        ((folder / "missing", "-n", elsewhere), "No such file"),
        ((folder, "-n", elsewhere), "Is a directory"),
        ((file, "-n", "a/b"), "namespace 'a/b' is not usable"),
    ):
        refused = command("restore", *arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert why in refused.stderr
        assert "\x1b" not in refused.stderr
        assert "Traceback" not in refused.stderr
    assert names_in(elsewhere) == []
    assert len(names_in(namespace)) == 1


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_without_a_standard_stream(
    bindings: SessionRuntimeBindings, elsewhere: str, folder: Path, closing: str
) -> None:
    dumped = shell(closing, "dump", bindings.session_id, folder / "dump")
    assert (dumped.returncode, dumped.stderr) == (0, "")
    restored = shell(closing, "restore", folder / "dump", "-n", elsewhere)
    assert (restored.returncode, restored.stderr) == (0, "")
    assert len(names_in(elsewhere)) == 1
