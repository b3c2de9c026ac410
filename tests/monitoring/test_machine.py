"""The checks of a machine, on machines that are made up where they have to be."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmepoch import RuntimeEpochId, SessionId
from shmepoch.memory.files import SHM_DIR
from shmepoch.memory.segment import SharedSegment
from shmepoch.monitoring import machine
from shmepoch.monitoring.machine import Finding, Level, Places, examine
from tests.support import segments_in

_MB = 2**20


def write(path: Path, text: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")
    return path


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A machine without control groups, on which systemd runs."""
    (tmp_path / "systemd").mkdir()
    write(tmp_path / "proc/self/cgroup", "0::/")
    return Places(
        proc=tmp_path / "proc",
        cgroups=tmp_path / "cgroups",
        systemd=tmp_path / "systemd",
        logind=(tmp_path / "etc",),
        linger=tmp_path / "linger",
    )


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, places: Places) -> Iterator[Finding]:
        raise ZeroDivisionError("of all things")
        yield

    monkeypatch.setattr(machine, "_CHECKS", {"first": fail, "versions": machine.versions})
    first, second = examine()
    assert (first.check, first.level) == ("first", Level.WARNING)
    assert "ZeroDivisionError: of all things" in first.found
    assert (second.check, second.level) == ("versions", Level.OK)


# --- control groups -------------------------------------------------------------------------------


def second_version(places: Places, limit: object, current: int = 0) -> None:
    group = places.cgroups / "service" / "own"
    write(group / "memory.max", "max")
    write(group / "memory.current", current)
    write(group.parent / "memory.max", limit)
    write(group.parent / "memory.current", current)
    write(places.proc / "self/cgroup", "0::/service/own")


def first_version(places: Places, limit: object, current: int = 0) -> None:
    group = places.cgroups / "memory" / "service"
    write(group / "memory.limit_in_bytes", limit)
    write(group / "memory.usage_in_bytes", current)
    write(group.parent / "memory.limit_in_bytes", 2**63 - 4096)
    write(group.parent / "memory.usage_in_bytes", current)
    write(places.proc / "self/cgroup", "9:name=systemd:/\n4:memory:/service\n0::/")


def container(places: Places, limit: object, current: int = 0) -> None:
    """It is told its path on the host, and sees its own group as the root."""
    write(places.cgroups / "memory" / "memory.limit_in_bytes", limit)
    write(places.cgroups / "memory" / "memory.usage_in_bytes", current)
    write(places.proc / "self/cgroup", "4:cpu,memory:/docker/0123\n2:memory:/docker/0123")


@pytest.mark.parametrize("limited", [second_version, first_version, container])
def test_the_memory_of_the_control_group_is_a_limit(
    places: Places, limited: Callable[..., None]
) -> None:
    def level() -> Level:
        return only(machine.memory("memory", places)).level

    limited(places, 4096 * _MB, 96 * _MB)
    found = only(machine.memory("memory", places))
    assert found.level is Level.OK
    assert found.found.startswith("memory of its control group: 4,000.0 MB of 4,096.0 MB free")
    limited(places, 64 * _MB, 32 * _MB)
    assert level() is Level.WARNING
    limited(places, 64 * _MB, 64 * _MB)
    assert level() is Level.PROBLEM
    limited(places, 64 * _MB, 80 * _MB)
    assert level() is Level.PROBLEM


def test_no_limit_is_none(places: Places) -> None:
    for limited, most in ((second_version, "max"), (first_version, 2**63 - 4096)):
        limited(places, most)
        assert only(machine.memory("memory", places)).found.endswith("no limit")


@pytest.mark.parametrize(("used", "level"), [(10, Level.OK), (80, Level.WARNING)])
def test_processes_are_limited_by_the_control_group(
    places: Places, used: int, level: Level
) -> None:
    write(places.cgroups / "own" / "pids.max", 100)
    write(places.cgroups / "own" / "pids.current", used)
    write(places.proc / "self/cgroup", "0::/own")
    finding = only(machine.processes("processes", places))
    assert finding.level is level
    assert finding.found == (
        f"processes and threads of its control group: 100, {100 - used} more possible"
    )


def test_processes_are_limited_for_a_user(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (places.proc / f"{number}" / "task" / "1").mkdir(parents=True)
        (places.proc / f"{number}" / "task" / "2").mkdir()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, 10))
    owner = os.geteuid()
    assert machine._tasks(places) == 6
    monkeypatch.setattr(os, "geteuid", lambda: owner + 4242)
    finding = only(machine.processes("processes", places))
    assert finding.level is Level.WARNING
    assert finding.found == "processes and threads of this user: at most 10, 10 more possible"


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft", "level"),
    [(256, Level.WARNING), (1024, Level.OK), (resource.RLIM_INFINITY, Level.OK)],
)
def test_descriptors_are_counted(
    places: Places, monkeypatch: pytest.MonkeyPatch, soft: int, level: Level
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    assert only(machine.descriptors("open files", places)).level is level


def test_rare_limits_are_named_where_they_are_set(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {resource.RLIMIT_AS: 16 * _MB, resource.RLIMIT_FSIZE: 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (limits[limit], limits[limit]))
    room, size = machine.address_space("limits", places)
    assert (room.level, size.level) == (Level.WARNING, Level.PROBLEM)
    limits.update(dict.fromkeys(limits, resource.RLIM_INFINITY))
    assert list(machine.address_space("limits", places)) == []


# --- logging out ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "setting", "lingers", "systemd", "level", "why"),
    [
        (70_000, "yes", False, True, Level.WARNING, "RemoveIPC=yes"),
        (70_000, None, False, True, Level.WARNING, "the default"),
        (70_000, "no", False, True, Level.OK, "RemoveIPC=no"),
        (70_000, "yes", True, True, Level.OK, "who lingers"),
        (70_000, "yes", False, False, Level.OK, "systemd does not run here"),
        (100, "yes", False, True, Level.OK, "a system user"),
        (0, "yes", False, True, Level.OK, "a system user"),
    ],
)
def test_a_logout_may_take_epochs_away(
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
    uid: int,
    setting: str | None,
    lingers: bool,
    systemd: bool,
    level: Level,
    why: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    if setting is not None:
        write(places.logind[0] / "logind.conf", f"[Login]\nRemoveIPC={setting}")
    if lingers:
        write(places.linger / "70000", "")
    if not systemd:
        places.systemd.rmdir()
    finding = only(machine.removal_at_logout("logout", places))
    assert finding.level is level
    assert why in finding.found
    if level is Level.WARNING:
        assert finding.advice is not None
        assert finding.advice.startswith("loginctl enable-linger 70000")


# --- shared memory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mounts", "level", "found"),
    [
        ("tmpfs tmpfs rw", Level.OK, "/dev/shm is a tmpfs"),
        ("tmpfs tmpfs ro", Level.PROBLEM, "ro"),
        ("ext4 /dev/sda rw", Level.WARNING, "is a ext4"),
    ],
)
def test_what_is_mounted_is_looked_up(
    places: Places, mounts: str, level: Level, found: str
) -> None:
    lines = [
        "1 0 0:1 / / ro - ext4 /dev/root ro",
        "2 1 0:2 / /dev rw - devtmpfs dev rw",
        "3 1 0:3 / /dev/shm ro - overlay hidden ro",
        f"4 1 0:4 / /dev/shm rw,nosuid - {mounts}",
        "5 1 0:5 / /dev/shm2 rw - other other rw",
    ]
    write(places.proc / "self/mountinfo", "\n".join(lines))
    finding = only(machine.shared_memory("shared memory", places))
    assert finding.level is level
    assert found in finding.found


def test_what_lies_in_shared_memory_is_told_by_namespace(namespace: str, places: Places) -> None:
    made = []
    for _ in range(5):
        segment = SharedSegment.allocate(
            namespace, None, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
        )
        segment.publish()
        made.append(segment)
    made[0].seal()
    for segment in made[1:4]:
        segment.memory.store(8, 2)
    for segment in made[:4]:
        segment.close()
    foreign = SHM_DIR / f"shmepoch.{namespace}.{'0' * 32}"
    foreign.mkdir()
    try:
        findings = [
            finding
            for finding in machine.segments("segments", places)
            if finding.found.startswith(f"namespace {namespace}: ")
        ]
    finally:
        foreign.rmdir()
        made[4].close()
        for path in segments_in(namespace):
            path.unlink()
    told = {finding.found.split(": ")[1]: finding for finding in findings}
    assert {what: finding.level for what, finding in told.items()} == {
        "1 in use": Level.OK,
        "1 sealed": Level.WARNING,
        "3 damaged": Level.WARNING,
        "1 unsafe": Level.WARNING,
    }
    assert told["1 sealed"].advice == f"shmepoch gc -n {namespace}"
    assert told["3 damaged"].advice == (
        f"end its processes, then shmepoch gc -n {namespace} --damaged"
    )
    assert told["3 damaged"].found.count("it has layout version 2") == 3
    assert f"{foreign.name}: its type is directory" in told["1 unsafe"].found
