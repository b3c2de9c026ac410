"""`shmepoch history`: the completions of a session from a store."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shmepoch import (
    Completed,
    Failed,
    OperationResult,
    RuntimeEpochId,
    SessionId,
    SqliteRuntimeStore,
    Terminated,
)
from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.persisted import PersistedOpsSnapshot
from shmepoch.ids import OperationId
from shmepoch.stores import EpochCapture
from tests.cli.running import COMMAND, run
from tests.stores.samples import Epoch, completion, running
from tests.support import eventually, spec

#: Local time, as the command takes and shows it.
NOON = datetime(2026, 3, 1, 12)


def at(minutes: int) -> int:
    return round((NOON + timedelta(minutes=minutes)).timestamp() * 1000)


def save(
    store: SqliteRuntimeStore,
    session_id: SessionId,
    entries: Sequence[CompletionEntry],
    *,
    sealed: bool = False,
) -> RuntimeEpochId:
    epoch_id = RuntimeEpochId.new()
    snapshot = PersistedOpsSnapshot(epoch_id=epoch_id, entries=tuple(entries))
    store.save([EpochCapture(session_id=session_id, snapshot=snapshot, sealed=sealed)])
    return epoch_id


def history(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "history", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def lines(*arguments: object) -> list[dict[str, Any]]:
    shown = history(*arguments, "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    return [json.loads(line) for line in shown.stdout.splitlines()]


@pytest.fixture
def session_id() -> SessionId:
    return SessionId.new()


@pytest.fixture
def path(tmp_path: Path, session_id: SessionId) -> Path:
    """A store with two epochs of `session_id`, and another session."""
    id = OperationId.new()
    done = Completed(OperationResult(id=id, content="out\n", duration_ms=12))
    path = tmp_path / "store"
    with SqliteRuntimeStore(path) as store:
        first = (
            completion(1, id=id, outcome=done, at_ms=at(0)),
            completion(2, outcome=Failed("exit status 3\nand its output"), at_ms=at(10)),
        )
        save(store, session_id, first, sealed=True)
        gone = completion(1, outcome=Terminated("[gone]"), at_ms=at(20))
        save(store, session_id, [msgspec.structs.replace(gone, display_name="[work]")])
        save(store, SessionId.new(), [completion(1, at_ms=at(5))])
    return path


def test_a_table_for_each_epoch(path: Path, session_id: SessionId) -> None:
    shown = history(session_id, "--store", path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.count("epoch ") == 2
    first, failed, last = (
        " ".join(line.split()) for line in shown.stdout.splitlines() if "2026-03-01" in line
    )
    assert first == "1 2026-03-01 12:00:00 completed work 1 in 12 ms"
    assert failed == "2 2026-03-01 12:10:00 failed work 2 exit status 3"
    assert last == "1 2026-03-01 12:20:00 terminated [work] [gone]"


def test_lines_of_json(path: Path, session_id: SessionId) -> None:
    first, failed, last = lines(session_id, "--store", path)
    assert [line["entry"]["seq"] for line in (first, failed, last)] == [1, 2, 1]
    assert first["epoch_id"] == failed["epoch_id"] != last["epoch_id"]
    assert first["entry"]["terminal_outcome"]["result"]["content"] == "out\n"


@pytest.mark.parametrize(
    ("filters", "minutes"),
    [
        (("--status", "failed"), [10]),
        (("--status", "completed", "--status", "terminated"), [0, 20]),
        (("--since", "2026-03-01T12:10:00"), [10, 20]),
        (("--until", "2026-03-01T12:10:00"), [0]),
        (("--since", "2026-03-01T12:00:01", "--until", "2026-03-01 12:20:00"), [10]),
        (("--since", "2026-03-02"), []),
    ],
)
def test_filters(
    path: Path, session_id: SessionId, filters: tuple[str, ...], minutes: list[int]
) -> None:
    shown = lines(session_id, "--store", path, *filters)
    assert [line["entry"]["completed_at_ms"] for line in shown] == [at(m) for m in minutes]


def test_without_a_session_they_are_listed(path: Path, session_id: SessionId) -> None:
    run("-", "--store", path, stdin="true\n")
    shown = history("--store", path)
    assert (shown.returncode, shown.stderr) == (0, "")
    first, second, third = shown.stdout.split("session ")[1:]
    name, old, counts, new, late = first.splitlines()
    assert name == str(session_id)
    assert re.fullmatch("  epoch [0-9a-f-]{36}, ended", old)
    assert counts == "    1 completed, 1 failed, 2026-03-01 12:00:00 to 2026-03-01 12:10:00"
    assert re.fullmatch("  epoch [0-9a-f-]{36}, current", new)
    assert late == "    1 terminated, 2026-03-01 12:20:00"
    assert "1 completed, 2026-03-01 12:05:00" in second
    (line,) = lines(third.splitlines()[0], "--store", path)
    assert line["entry"]["display_name"] == "true"


def test_sessions_as_lines_of_json(path: Path, session_id: SessionId) -> None:
    first, second = lines("--store", path)
    assert first["session_id"] == str(session_id)
    old, new = first["epochs"]
    assert old.pop("epoch_id") != new.pop("epoch_id")
    assert old == {
        "sealed": True,
        "ended": {"completed": 1, "failed": 1},
        "unfinished": 0,
        "first_at_ms": at(0),
        "last_at_ms": at(10),
    }
    assert (new["sealed"], new["ended"]) == (False, {"terminated": 1})
    assert [epoch["ended"] for epoch in second["epochs"]] == [{"completed": 1}]


def test_an_epoch_with_operations_that_have_not_ended(
    tmp_path: Path, session_id: SessionId
) -> None:
    work = spec()
    with SqliteRuntimeStore(tmp_path / "store") as store:
        store.save([Epoch(session_id).capture(operations=[running(work)], specs=[work])])
        store.save([Epoch().capture()])
    shown = history("--store", tmp_path / "store").stdout.splitlines()
    assert [line for line in shown if line.startswith("    ")] == [
        "    1 unfinished",
        "    no operations",
    ]
    first, second = lines("--store", tmp_path / "store")
    assert [one["epochs"][0]["unfinished"] for one in (first, second)] == [1, 0]


def test_the_beginning_of_an_id_is_enough(tmp_path: Path) -> None:
    ids = [SessionId.parse(f"0199{n}000-0000-7000-8000-000000000000") for n in "aab"[1:]]
    path = tmp_path / "store"
    with SqliteRuntimeStore(path) as store:
        for id in ids:
            save(store, id, [completion(1)])
    for text in ("0199a", "0199A000-00", str(ids[0]), ids[0].bytes.hex()):
        assert len(lines(text, "--store", path)) == 1
    several = history("0199", "--store", path)
    assert (several.returncode, several.stdout) == (2, "")
    assert f"'0199' may be any of 2 sessions of {path}" in several.stderr
    assert all(str(id) in several.stderr for id in ids)
    wrong = history("0198a0000000", "--store", path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert (
        f"no session with an id that begins with '0198a0000000'; the nearest: {ids[0]}"
        in wrong.stderr
    )
    for text in ("", " ", "-"):
        assert (
            "knows no session with an id that begins with" in history(text, "--store", path).stderr
        )


def test_the_newest_are_chosen_after_the_rest(path: Path, session_id: SessionId) -> None:
    shown = lines(session_id, "--store", path, "--last", 2)
    assert [line["entry"]["completed_at_ms"] for line in shown] == [at(10), at(20)]
    shown = lines(session_id, "--store", path, "--last", 1, "--status", "completed")
    assert [line["entry"]["completed_at_ms"] for line in shown] == [at(0)]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
@pytest.mark.parametrize(
    ("filters", "count"),
    [
        (("--since", "0001-01-01"), 3),
        (("--until", "9999-12-31"), 3),
        (("--since", "0001-01-01", "--until", "9999-12-31T23:59:59"), 3),
        (("--until", "0001-01-01"), 0),
        (("--since", "9999-12-31T23:59:59"), 0),
    ],
)
def test_the_ends_of_the_calendar(
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    session_id: SessionId,
    zone: str,
    filters: tuple[str, ...],
    count: int,
) -> None:
    monkeypatch.setenv("TZ", zone)
    assert len(lines(session_id, "--store", path, *filters)) == count


def test_a_time_in_no_calendar_is_shown(tmp_path: Path, session_id: SessionId) -> None:
    with SqliteRuntimeStore(tmp_path / "store") as store:
        save(store, session_id, [completion(1, at_ms=2**62)])
    shown = history(session_id, "--store", tmp_path / "store")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"{2**62} ms" in shown.stdout


def test_what_cannot_be_shown_is_refused(path: Path, tmp_path: Path) -> None:
    unknown, text = SessionId.new(), tmp_path / "text"
    text.write_text("this is no database, " * 100)
    for arguments, why in (
        ((unknown, "--store", path), f"knows no session with an id that begins with '{unknown}'"),
        (("session-1", "--store", path), "'session-1'"),
        ((unknown, "--store", tmp_path / "missing"), "there is no such file"),
        ((unknown, "--store", text), f"{text} cannot be used as a store"),
        ((unknown, "--store", tmp_path), f"{tmp_path} cannot be used as a store"),
        ((unknown, "--store", path, "--status", "done"), "'done' is not one of"),
    ):
        refused = history(*arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert why in " ".join(refused.stderr.replace("│", "").split())
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "missing").exists()


def test_whoever_reads_it_may_leave(tmp_path: Path, session_id: SessionId) -> None:
    path = tmp_path / "store"
    with SqliteRuntimeStore(path) as store:
        save(store, session_id, [completion(seq, content="x" * 500) for seq in range(1, 1001)])
    command = [*COMMAND, "history", str(session_id), "--store", str(path), "--json"]
    shown = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | head -1', "-", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.stdout.count("\n") == 1
    assert (shown.returncode, shown.stderr) == (141, "")


def test_ctrl_c_while_it_prints(tmp_path: Path, session_id: SessionId) -> None:
    path = tmp_path / "store"
    with SqliteRuntimeStore(path) as store:
        save(store, session_id, [completion(seq, content="x" * 500) for seq in range(1, 1001)])
    command = [*COMMAND, "history", str(session_id), "--store", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        # The pipe is full, and is not read.
        eventually(lambda: "pipe_write" in Path(f"/proc/{process.pid}/wchan").read_text())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_it_needs_no_right_to_write(path: Path, session_id: SessionId) -> None:
    """Such as for a backup, a read-only mount, or a store of another user."""
    folder = path.parent / "backup"
    folder.mkdir()
    copy = Path(shutil.copy(path, folder))
    copy.chmod(0o444)
    folder.chmod(0o555)
    # Root may write everywhere; without its capabilities it is a user like any other.
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    for arguments in ((), (str(session_id),), (str(session_id), "--json")):
        shown = subprocess.run(
            [*powerless, *COMMAND, "history", "--store", str(copy), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (shown.returncode, shown.stderr) == (0, "")
        assert ("completed" if arguments else str(session_id)) in shown.stdout
    assert list(folder.iterdir()) == [copy]
    folder.chmod(0o755)


@pytest.mark.parametrize("json", [False, True])
def test_what_is_damaged_is_left_out_counted_and_named(
    path: Path, session_id: SessionId, json: bool
) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE entries SET entry = CAST(? AS TEXT) WHERE rowid = 2", (b'{"seq":\xff\x1b[2J}',)
        )
    connection.close()
    shown = history(session_id, "--store", path, *(["--json"] if json else []))
    assert shown.returncode == 0
    assert "work 1" in shown.stdout
    assert "[work]" in shown.stdout
    assert "work 2" not in shown.stdout
    row, count = shown.stderr.splitlines()
    assert row.startswith(f"shmepoch: {path}: completion 2 of epoch ")
    assert "\x1b" not in row
    assert count == f"shmepoch: {path}: damaged rows that are not shown: 1"
