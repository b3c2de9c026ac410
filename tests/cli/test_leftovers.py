"""The segments of killed runs: the next run removes them, and no others."""

from __future__ import annotations

from pathlib import Path

from shmepoch import RuntimeSessionAdapter, SessionId
from shmepoch.cli.run import leftovers
from shmepoch.memory.namespaces import segment_path
from tests.cli.running import (
    ended,
    kill_all,
    nothing_left,
    run,
    started,
    summary,
    waiting,
    waits,
)
from tests.support import segments_in


def test_the_next_run_removes_what_killed_runs_left(namespace: str, tmp_path: Path) -> None:
    with started("-", "--sessions", 2, stdin=f"{waits(tmp_path)}; true\n" * 2) as process:
        waiting(tmp_path, 2)
        kill_all(namespace)
        ended(process)
    assert len([path for path in segments_in(namespace) if path.suffix != ".doorbells"]) == 2
    assert run("-", stdin="true\n").returncode == 0
    nothing_left(namespace)


def test_a_run_that_goes_on_keeps_its_own(namespace: str, tmp_path: Path) -> None:
    with started("-", "--json", stdin=f"{waits(tmp_path)}; true\n") as process:
        (command,) = waiting(tmp_path)
        before = segments_in(namespace)
        assert run("-", stdin="true\n").returncode == 0
        assert segments_in(namespace) == before
        command.kill()
        status, out, _ = ended(process)
    assert (status, summary(out)["notices"]["lost"]) == (0, 0)
    nothing_left(namespace)


def test_what_a_user_of_the_library_left_is_left(namespace: str) -> None:
    session_id = SessionId.new()
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.prepare_bindings(session_id)
    assert run("-", stdin="true\n").returncode == 0
    assert segments_in(namespace) == [segment_path(namespace, session_id)]
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        adapter.register_session(session_id)
        adapter.unregister_session(session_id)


def test_what_a_run_with_a_store_left_is_for_its_resumption(namespace: str, tmp_path: Path) -> None:
    store, flag = tmp_path / "store", tmp_path / "flag"
    stdin = f"true\n[ -e {flag} ] || {waits(tmp_path)}; true\n"
    arguments = ("-", "--json", "--store", store, "--workers", 1)
    with started(*arguments, stdin=stdin) as process:
        waiting(tmp_path)
        kill_all(namespace)
        ended(process)
    assert run("-", stdin="true\n").returncode == 0
    (segment,) = segments_in(namespace)
    flag.touch()
    done = run(*arguments, "--resume", stdin=stdin)
    assert done.returncode == 0, done.stderr
    figures = summary(done.stdout)
    assert (figures["finished_before"], figures["completed"], figures["terminated"]) == (1, 2, 1)
    assert figures["sessions"][0]["watermark"] == 3  # nothing was skipped: the live epoch went on
    assert not segment.exists()
    nothing_left(namespace)


def test_what_cannot_be_removed_does_not_stop_a_run(namespace: str) -> None:
    path = segment_path(namespace, leftovers.new_session())
    path.touch(0o644)  # not as a segment is made
    assert run("-", stdin="true\n").returncode == 0
    assert segments_in(namespace) == [path]
    path.unlink()


def test_the_sessions_of_such_runs_are_told_from_others() -> None:
    ids = [leftovers.new_session() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(map(leftovers.is_left_over, ids))
    assert {(id.uuid.version, id.uuid.variant) for id in ids} == {(8, "specified in RFC 4122")}
    changed = [SessionId.from_bytes(id.bytes[:-1] + bytes([id.bytes[-1] ^ 1])) for id in ids]
    assert not any(map(leftovers.is_left_over, changed))
    assert not any(leftovers.is_left_over(SessionId.new()) for _ in range(1000))
