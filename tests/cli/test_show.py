"""What `shmepoch show` tells of one epoch, whatever has become of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from shmepoch import OperationId, SessionRuntimeBindings
from shmepoch import _native as at
from shmepoch.epoch.operations import OperationProgressUpdate
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import SharedSegment
from shmepoch.monitoring.details import EpochDetails
from tests.cli.running import COMMAND, DEADLINE_S
from tests.epoch.operations import end
from tests.monitoring.looks import content, published, registry_of
from tests.monitoring.test_details import stopped_in_a_transition
from tests.support import held_writer, spec

HOSTILE = "\x1b[31mred\u202e [bold]name"


def show(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "show", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def text(*arguments: object) -> str:
    """What it prints, with one space in place of several."""
    done = show(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return "\n".join(" ".join(line.split()) for line in done.stdout.splitlines())


def facts(*arguments: object) -> dict[str, Any]:
    done = show("--json", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    [line] = done.stdout.splitlines()
    EpochDetails.from_json(line)
    found: dict[str, Any] = json.loads(line)
    return found


def test_an_epoch_at_work(bindings: SessionRuntimeBindings) -> None:
    registry, id = bindings.ops_lifecycle, OperationId.new()
    registry.register_operation(spec(HOSTILE, id=id))
    registry.provisioning_succeeded(id)
    registry.report_progress(id, OperationProgressUpdate(f"on {HOSTILE}", 50.0))
    for number in range(3):
        ended = OperationId.new()
        registry.register_operation(spec(f"work {number} {HOSTILE}", id=ended))
        registry.fail_operation(ended, f"broke {HOSTILE}\nand more")
    bindings.cursor_state.agent_applied_cursor.advance(1)
    shown = text(bindings.session_id, "--entries", 2)
    found = facts(bindings.epoch_id, "--entries", 2)
    registry.terminate_owner("done")

    me = f"process {os.getpid()}"
    for line in (
        f"session {bindings.session_id}",
        f"epoch {bindings.epoch_id}",
        "state open",
        "last sign of life now",
        f"file {bindings.shared_segment().path}",
        f"attached by {me}",
        "writer lock free",
        f"runtime lock held by {me}",
        "agent lock free",
        "watermark 3",
        "ended, retained failed 3",
        "agent_applied_cursor 1 2",
        "runtime_observed_seq 0 3",
        "operations 1 128 0%",
        "retained 3 256 1%",
    ):
        assert line in shown.splitlines()
    assert f"0 runtime {os.getpid()} alive" in shown
    assert f"{id} running" in shown
    visible = r"\x1b[31mred\u202e [bold]name"
    assert f"runtime {os.getpid()}, alive {visible} 50% on {visible}" in shown
    assert f"failed work 2 {visible} broke {visible}" in shown
    assert "work 0" not in shown

    assert found["session_id"] == str(bindings.session_id)
    assert (found["state"], found["watermark"]) == ("open", 3)
    assert [entry["seq"] for entry in found["entries"]] == [2, 3]
    assert [one["display_name"] for one in found["unfinished"]] == [HOSTILE]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_one_that_is_chosen_by_a_beginning(namespace: str, form: tuple[str, ...]) -> None:
    with published(namespace) as one, published(namespace) as other:
        for id in (one.session_id, one.epoch_id):
            for beginning in (str(id)[:-1], id.bytes.hex().upper()):
                shown = show(beginning, *form)
                assert (shown.returncode, shown.stderr) == (0, "")
                assert str(one.session_id) in shown.stdout
                assert str(other.session_id) not in shown.stdout


def test_which_one_is_meant_is_not_clear(namespace: str) -> None:
    with published(namespace) as one, published(namespace) as two:
        refused = show(str(one.session_id)[:2])
        assert (refused.returncode, refused.stdout) == (2, "")
        assert str(one.session_id) in refused.stderr
        assert str(two.session_id) in refused.stderr
        mistaken = str(one.session_id)[:-1] + "z"
        refused = show(mistaken)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert str(one.session_id) in refused.stderr
        assert "shmepoch ls" in refused.stderr
        assert show(one.session_id, "-n", "elsewhere").returncode == 2
        assert show(one.session_id, "-A").returncode == 0


@pytest.mark.parametrize("arguments", [("x", "--entries", "-1"), ("x", "--entries", "many"), ()])
def test_what_is_refused(namespace: str, arguments: tuple[str, ...]) -> None:
    refused = show(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "Traceback" not in refused.stderr


def test_one_that_vanishes_between_choosing_and_reading(namespace: str) -> None:
    """The command, in a process in which the epoch is gone once it is chosen."""
    script = (
        "import os, sys\n"
        "from shmepoch.cli import main\n"
        "from shmepoch.cli.commands import show\n"
        "choose, path = show.select, sys.argv.pop()\n"
        "def select(text, namespace):\n"
        "    found = choose(text, namespace)\n"
        "    os.unlink(path)\n"
        "    return found\n"
        "show.select = select\n"
        "main()\n"
    )
    with published(namespace) as segment:
        done = subprocess.run(
            [sys.executable, "-c", script, "show", str(segment.session_id), str(segment.path)],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"session {segment.session_id} has no epoch in shared memory" in done.stderr


def test_a_writer_that_is_stopped_and_then_killed(namespace: str) -> None:
    with published(namespace) as segment:
        with stopped_in_a_transition(segment) as pid:
            before = content(segment)
            shown = text(segment.session_id)
            assert content(segment) == before
            assert f"writer lock held by process {pid} (stopped)" in shown.splitlines()
            assert f"0 worker {pid} stopped" in shown
            assert "broken off" not in shown
        shown = text(segment.session_id)
        assert "writer lock free" in shown.splitlines()
        assert "transition broken off; the next writer repairs what it has left" in shown
        assert f"0 worker {pid} dead" in shown
        assert f"worker {pid}, dead" in shown
        assert "state abandoned" in shown.splitlines()
        assert "repairs 1" not in shown
        end(registry_of(segment))
        assert "repairs 1, of what writers have left that were killed" in text(segment.session_id)


def test_a_holder_that_is_not_visible(namespace: str) -> None:
    """The command, in a process that is shown none of the others."""
    with published(namespace) as segment, held_writer(segment):
        script = (
            "from shmepoch.cli import main\n"
            "from shmepoch.monitoring import details\n"
            "details.holders = lambda file: []\n"
            "main()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, "show", str(segment.session_id)],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert "held by a process that is not visible from here" in done.stdout


def damage(offset: int, segment: SharedSegment) -> None:
    segment.memory.store(offset, 99)


def foreign(segment: SharedSegment) -> None:
    os.fchmod(segment.fd, 0o644)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (partial(damage, at.MAGIC_AT), "magic is 99"),
        (partial(damage, at.VERSION_AT), "layout version 99"),
        (foreign, "mode is 0o644"),
    ],
)
def test_one_that_cannot_be_read(
    namespace: str, spoil: Callable[[SharedSegment], None], problem: str
) -> None:
    with published(namespace) as segment:
        segment.join(Role.WORKER)
        spoil(segment)
        shown = text(segment.session_id)
        assert facts(segment.session_id)["state"] == "damaged"
        os.fchmod(segment.fd, 0o600)
        assert "state damaged" in shown.splitlines()
        assert problem in shown
        assert f"attached by process {os.getpid()}" in shown.splitlines()
        assert f"file {segment.path}" in shown.splitlines()
        assert f"size {segment.layout.size:,} bytes" in shown.splitlines()
        assert "watermark" not in shown


def test_one_that_is_damaged_in_a_slot(namespace: str) -> None:
    with published(namespace) as segment:
        registry_of(segment).register_operations([spec("one"), spec("two")])
        damage(segment.layout.slot(0) + at.SLOT_SPEC, segment)
        shown = text(segment.session_id)
        assert "state damaged" in shown.splitlines()
        assert "slot[0]" in shown
        assert " two" in shown


def test_one_that_is_sealed_and_one_of_cursors_only(namespace: str) -> None:
    with published(namespace) as sealed, published(namespace, None) as bare:
        sealed.seal()
        assert "state sealed" in text(sealed.session_id).splitlines()
        shown = text(bare.session_id)
        assert "state abandoned" in shown.splitlines()
        assert "participants 0 64 0%" in shown.splitlines()
        assert "feed bytes" not in shown


def test_a_pipe_that_is_read_no_more(namespace: str) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    with published(namespace) as segment:
        done = subprocess.run(
            [*COMMAND, "show", str(segment.session_id)],
            stdout=ours,
            stderr=subprocess.PIPE,
            timeout=DEADLINE_S,
            check=False,
        )
    os.close(ours)
    assert (done.returncode, done.stderr) == (141, b"")
