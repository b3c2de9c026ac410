"""What `shmepoch ls` lists, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import Any

import pytest

from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings
from shmepoch import _native as at
from shmepoch.monitoring.epochs import EpochSummary
from shmepoch.monitoring.selection import select
from tests.cli.running import COMMAND, DEADLINE_S
from tests.monitoring.looks import content, published, registry_of
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, end
from tests.support import held_writer, spec


def ls(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "ls", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def listed(*arguments: object) -> list[dict[str, Any]]:
    done = ls("--json", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def table(*arguments: object) -> list[list[str]]:
    """The cells of each row; cells have no two spaces inside, and one that is empty ends a row."""
    done = ls(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return [
        [cell.strip() for cell in line.split("  ") if cell.strip()]
        for line in done.stdout.splitlines()
    ]


def test_a_table(bindings: SessionRuntimeBindings, namespace: str) -> None:
    end(bindings, TOOL, TOOL)
    registry = bindings.ops_lifecycle
    registry.register_operation(spec())
    bindings.cursor_state.agent_applied_cursor.advance(2)
    with published(namespace) as other:
        other.memory.store(at.MAGIC_AT, 0)
        heading, *rows = table()
    registry.terminate_owner("done")
    assert heading == [
        *("session", "epoch", "age", "state", "participants", "operations", "ended"),
        *("watermark", "applied", "observed", "injected", "bytes", "problem"),
    ]
    [row] = [row for row in rows if row[0] == str(bindings.session_id)]
    assert str(bindings.epoch_id).startswith(row[1])
    assert row[3:11] == [
        *("open", "runtime 1", "provisioning 1", "2", "2", "2", "0 (-2)", "0 (-2)"),
    ]
    [bad] = [row for row in rows if row[0] == str(other.session_id)]
    assert bad[1:4] == ["-", "-", "damaged"]
    assert "magic is 0" in bad[-1]
    assert "remove_unused" not in bad[-1], "what to do is for `show` to say"


def test_the_epochs_that_are_shown_can_be_chosen(namespace: str) -> None:
    with published(namespace) as one, published(namespace) as two, published(namespace) as three:
        _, *rows = table()
        chosen = [select(row[1], namespace) for row in rows]
        assert chosen == [(namespace, each.session_id) for each in (one, two, three)]


def test_lines_of_json(bindings: SessionRuntimeBindings, namespace: str) -> None:
    end(bindings, TOOL)
    [line] = listed()
    summary = EpochSummary.from_json(json.dumps(line))
    assert summary.session_id == bindings.session_id
    assert (summary.ended, summary.watermark) == (1, 1)


def test_filters_and_order(namespace: str) -> None:
    with published(namespace, None) as one, published(namespace) as two:
        for _ in range(2):
            registry_of(two).register_operation(spec())
        sessions = [str(one.session_id), str(two.session_id)]
        assert [line["session_id"] for line in listed()] == sessions
        assert [line["session_id"] for line in listed("--sort", "-bytes")] == sessions[::-1]
        for filters in (
            ("--filter", "provisioning>1"),
            ("--filter", "state=abandoned", "--filter", f"session={sessions[1]}"),
        ):
            assert [line["session_id"] for line in listed(*filters)] == sessions[1:]


def test_of_one_namespace_or_of_all(namespace: str) -> None:
    other = f"{namespace}-2"
    with published(namespace) as one, published(other) as two:
        assert [line["session_id"] for line in listed()] == [str(one.session_id)]
        assert [line["session_id"] for line in listed("-n", other)] == [str(two.session_id)]
        heading, *rows = table("--all-namespaces", "--filter", f"namespace={other}")
        assert heading[:2] == ["namespace", "session"]
        assert [row[:2] for row in rows] == [[other, str(two.session_id)]]
        assert len(listed("-A")) >= 2


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_nothing_to_list(namespace: str, form: tuple[str, ...]) -> None:
    done = ls(*form)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"shmepoch: there is no epoch in namespace {namespace}\n"
    with published(namespace):
        done = ls("--filter", "state=sealed", *form)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"shmepoch: no epoch matches, of 1 epoch in namespace {namespace}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--filter", "age"), "FIELD=VALUE"),
        (("--filter", "age>\x1b[31m"), "\\x1b[31m"),
        (("--sort", "colour"), "applied_lag"),
        (("--sort=-colour",), "applied_lag"),
        (("--namespace", "a b"), "'a b'"),
        (("--namespace", "one", "-A"), "--namespace"),
    ],
)
def test_what_is_refused(namespace: str, arguments: tuple[str, ...], said: str) -> None:
    done = ls(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def own(_: SessionRuntimeBindings | None, test: Channel, namespace: str) -> None:
    bindings = RuntimeSessionAdapter.ephemeral(namespace=namespace).prepare_bindings(
        SessionId.new()
    )
    end(bindings, TOOL)
    test.say(bindings.session_id)
    test.hear()


def test_an_epoch_whose_processes_are_dead(namespace: str) -> None:
    with start(own, None, namespace) as runtime:
        session_id = runtime.hear()
        runtime.signal(signal.SIGSTOP)
        assert [line["state"] for line in listed()] == ["open"]
        runtime.kill()
    [line] = listed()
    assert (line["session_id"], line["state"], line["dead"]) == (str(session_id), "abandoned", 1)
    os.unlink(f"/dev/shm/shmepoch.{namespace}.{session_id.bytes.hex()}")


def test_while_a_writer_is_stopped_in_a_transition_and_nothing_changes(namespace: str) -> None:
    with published(namespace) as segment, held_writer(segment):
        segment.memory.store(at.INTENT_AT, 1)
        before = content(segment)
        assert [line["state"] for line in listed()] == ["abandoned"]
        assert table()[1][0] == str(segment.session_id)
        assert content(segment) == before


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_pipe_that_is_read_no_more(namespace: str, form: tuple[str, ...]) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    with published(namespace):
        done = subprocess.run(
            [*COMMAND, "ls", *form],
            stdout=ours,
            stderr=subprocess.PIPE,
            timeout=DEADLINE_S,
            check=False,
        )
    os.close(ours)
    assert (done.returncode, done.stderr) == (141, b"")
