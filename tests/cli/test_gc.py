"""The command that removes what no process holds: what it says, and what it never takes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from shmepoch import (
    AgentFactory,
    OpsLifecycleConfig,
    RuntimeEpochId,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    ShmepochError,
)
from shmepoch.memory.files import SHM_DIR
from shmepoch.memory.segment import SharedSegment
from shmepoch.monitoring import garbage
from shmepoch.monitoring.garbage import Wanted
from tests.cli.running import COMMAND, DEADLINE_S
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, end
from tests.support import names_in, segments_in

_SMALL = OpsLifecycleConfig(max_completed=8, max_operations=8, max_participants=8, feed_bytes=16384)


def gc(
    *options: object, before: Sequence[str] = (), status: int = 0
) -> subprocess.CompletedProcess[str]:
    """The command, in this test's namespace."""
    done = subprocess.run(
        [*before, *COMMAND, "gc", *map(str, options)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == status, done.stderr
    return done


def verdicts(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The verdict on each file, by its kind."""
    lines = [line.split() for line in done.stdout.splitlines()[:-1]]
    return {line[3]: line[0] for line in lines}


def objects(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def left(namespace: str) -> Iterator[dict[str, Path]]:
    """One of each kind, and one that is in use."""
    made = {}
    for kind in ("sealed", "abandoned", "damaged", "leftover", "used"):
        segment = SharedSegment.allocate(
            namespace, _SMALL, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
        )
        made[kind] = segment
        if kind != "leftover":
            segment.publish()
    made["sealed"].seal()
    made["damaged"].memory.store(0, 1)
    paths = {kind: segment.path for kind, segment in made.items()}
    (paths["leftover"],) = SHM_DIR.glob(f"{made['leftover'].name}.*.new")
    made["leftover"]._new = None  # it is left as a killed creator leaves it
    for kind in ("sealed", "abandoned", "damaged", "leftover"):
        made[kind].close()
    at_s = (
        paths["abandoned"].stat().st_mtime - 3.5 * 24 * 3600
    )  # it is days old whenever it is asked
    os.utime(paths["abandoned"], (at_s, at_s))
    yield paths
    made["used"].close()
    for path in segments_in(namespace):
        path.unlink()


def present(left: dict[str, Path]) -> set[str]:
    return {kind for kind, path in left.items() if path.exists()}


def test_without_options_what_nobody_can_want_goes(left: dict[str, Path]) -> None:
    done = gc()
    assert verdicts(done) == {
        "sealed": "remove",
        "abandoned": "keep",
        "damaged": "keep",
        "leftover": "remove",
    }
    assert present(left) == {"abandoned", "damaged", "used"}
    size = f"{2 * left['used'].stat().st_size:,}"
    total, _, kept = done.stdout.splitlines()[-1].partition("; kept ")
    assert total == f"removed 2 files, {size} bytes"
    assert sorted(kept.split(", ")) == [
        "1 abandoned (--older-than removes them)",
        "1 damaged (--damaged removes them)",
        "1 in use",
    ]


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        ("--older-than 0", {"damaged", "used"}),
        ("--older-than 3d", {"damaged", "used"}),
        ("--older-than 84h", {"damaged", "used"}),
        ("--older-than 5d", {"abandoned", "damaged", "used"}),
        ("--damaged", {"abandoned", "used"}),
        ("--older-than 0s --damaged", {"used"}),
        ("--older-than 0 --damaged --namespace other", None),
        ("--older-than 0 --damaged --dry-run", None),
    ],
)
def test_options_say_what_goes_besides(
    left: dict[str, Path], options: str, stay: set[str] | None
) -> None:
    gc(*options.split())
    assert present(left) == (set(left) if stay is None else stay)


def test_a_dry_run_says_the_same(left: dict[str, Path]) -> None:
    options = ("--older-than", "7d", "--damaged")
    tried = gc(*options, "--dry-run").stdout.splitlines()
    assert present(left) == set(left)
    done = gc(*options).stdout.splitlines()
    assert tried[:-1] == done[:-1]
    assert done[-1].startswith("removed 3 files, ")
    assert tried[-1].startswith("would remove 3 files, ")
    assert "nothing was removed" in tried[-1]


def test_json_has_an_object_a_line(left: dict[str, Path], namespace: str) -> None:
    tried, done = objects(gc("--json", "--dry-run")), objects(gc("--json"))
    assert [one | {"removed": False} for one in done] == tried
    by_kind = {one["what"]: one for one in done}
    assert set(by_kind) == {"sealed", "abandoned", "damaged", "leftover"}
    for kind, one in by_kind.items():
        assert one["namespace"] == namespace
        assert one["name"] == left[kind].name
        assert one["remove"] is one["removed"] is (kind in ("sealed", "leftover"))
        assert one["bytes"] == left["used"].stat().st_size


def test_nothing_is_found_in_an_empty_namespace(namespace: str) -> None:
    assert gc().stdout == "removed 0 files, 0 bytes\n"
    assert gc("--json").stdout == ""


@pytest.mark.parametrize("duration", ["5", "-1d", "1.5h", "7w", "nan", "", "٣d", "1" * 12 + "d"])
def test_a_wrong_length_of_time_is_refused(left: dict[str, Path], duration: str) -> None:
    done = gc("--older-than", duration, status=2)
    assert "is not a length of time" in " ".join(done.stderr.replace("│", "").split())
    assert present(left) == set(left)


def test_all_namespaces_and_one_of_them_are_refused(left: dict[str, Path]) -> None:
    gc("-A", "--namespace", "some", status=2)
    gc("--namespace", "a/b", status=2)
    assert present(left) == set(left)


_READ_ONLY = 'mount -t tmpfs -o ro tmpfs /dev/shm; exec "$@"'


def own_mounts() -> list[str]:
    """A prefix that gives a command mounts of its own."""
    command = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let this user have mounts of its own")
    return command


def test_without_shared_memory_it_cannot_be_carried_out() -> None:
    done = gc(before=[*own_mounts(), "sh", "-ec", _READ_ONLY, "-"], status=3)
    assert done.stderr.startswith("shmepoch: shared memory cannot be used")


def test_what_cannot_be_removed_is_said(left: dict[str, Path]) -> None:
    """As where another program holds the directory: a name can be looked at and not removed."""
    pinned = left["sealed"]
    mounts = f'mount --bind "{pinned}" "{pinned}"; exec "$@"'
    done = gc(before=[*own_mounts(), "sh", "-ec", mounts, "-"], status=1)
    assert verdicts(done)["sealed"] == "failed"
    assert "not removed: Device or resource busy" in done.stdout
    assert "could not remove 1 file" in done.stdout.splitlines()[-1]
    assert present(left) == {"sealed", "abandoned", "damaged", "used"}


def test_a_closed_pipe_ends_it(left: dict[str, Path]) -> None:
    command = " ".join((*COMMAND, "gc", "--dry-run"))
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -0; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


_UNLISTED = """
import errno, os, shmepoch.cli
def refuse(path):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
os.scandir = refuse
shmepoch.cli.main()
"""


def test_what_cannot_be_listed_cannot_be_carried_out(left: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _UNLISTED, "gc"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "shmepoch: /dev/shm: Too many open files\n"
    assert present(left) == set(left)


def test_what_cannot_be_printed_is_of_the_output(left: dict[str, Path]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "gc", "--dry-run"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert done.returncode == 3
    assert done.stderr == "shmepoch: standard output: No space left on device\n"


# --- beside processes that come and go ------------------------------------------------------------


def come_and_go(_: None, test: Channel, namespace: str, seed: int, rounds: int) -> int:
    """Be a runtime of some sessions, again and again; how many completions were committed."""
    chosen = random.Random(seed)
    sessions = [SessionId.new() for _ in range(2)]
    committed = 0
    for _turn in range(rounds):
        with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=_SMALL) as adapter:
            for session_id in sessions:
                bindings = adapter.prepare_bindings(session_id)
                (seq,) = end(bindings, TOOL)
                bindings.require_open()
                visit(bindings, seq)
                bindings.require_open()
                committed += 1
                end_somehow = chosen.randrange(4)
                if end_somehow == 0:
                    adapter.unregister_session(session_id)
                elif end_somehow == 1:
                    bindings.shared_segment().seal()  # and be killed, as it were
                elif end_somehow == 2:
                    adapter.reset_session(session_id)
    return committed


def visit(bindings: SessionRuntimeBindings, seq: int) -> None:
    """Be the agent in another process, which is killed then."""
    pid = os.fork()
    if pid == 0:
        try:
            with AgentFactory().build(bindings.session_id, SessionOwned(bindings)) as boundary:
                with boundary.drain() as notices:
                    assert notices
                bindings.require_open()
                assert bindings.cursor_state.snapshot().agent_applied_cursor >= seq
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, "an agent lost its epoch"


def be_killed_while_making(_: None, test: Channel, namespace: str) -> None:
    """Make epochs until death."""
    while True:
        segment = SharedSegment.allocate(
            namespace, _SMALL, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
        )
        test.say(None)
        segment.publish()
        segment.close()


def collect(_: None, test: Channel, namespace: str) -> int:
    """Remove all that may go, again and again; how many that were."""
    wanted, removed = Wanted(older_than_ms=0, damaged=True), 0
    while test.silent:
        for found in garbage.find(namespace, wanted):
            if found.remove:
                done = garbage.remove(found, wanted)
                assert done.problem is None, done
                removed += done.removed
    return removed


def test_no_live_process_ever_loses_its_epoch(namespace: str) -> None:
    with ExitStack() as stack:
        collector = stack.enter_context(start(collect, None, namespace))
        users = [stack.enter_context(start(come_and_go, None, namespace, i, 40)) for i in range(3)]
        while any(user.silent for user in users):
            with start(be_killed_while_making, None, namespace) as maker:
                maker.hear()
                maker.kill()
            gc("--older-than", 0, "--damaged")
        assert [user.result() for user in users] == [80, 80, 80]
        collector.say("stop")
        assert collector.result() > 0, "nothing was collected meanwhile"

    gc("--older-than", 0, "--damaged")
    assert names_in(namespace) == []


def test_a_session_that_is_prepared_meanwhile_is_made_anew(namespace: str) -> None:
    """A runtime that finds its segment gone, or on its way out, is not refused."""
    session_id = SessionId.new()
    with start(collect, None, namespace) as collector:
        for _ in range(100):
            with RuntimeSessionAdapter.ephemeral(namespace=namespace, config=_SMALL) as adapter:
                bindings = adapter.prepare_bindings(session_id)
                try:
                    end(bindings, TOOL)
                except ShmepochError as error:
                    pytest.fail(f"a live runtime lost its epoch: {error}")
        collector.say("stop")
        collector.result()
    for path in segments_in(namespace):
        path.unlink()
