"""The command that says whether a machine is fit, on real mounts and under real limits."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from shmepoch.monitoring.machine import Finding
from tests.cli.running import COMMAND, DEADLINE_S
from tests.cli.test_gc import own_mounts

_ABSENT = """
mkdir /tmp/dev.$$
mount --bind /dev /tmp/dev.$$
mount -t tmpfs tmpfs /dev
for name in null urandom; do touch /dev/$name; mount --bind /tmp/dev.$$/$name /dev/$name; done
umount -l /tmp/dev.$$
rmdir /tmp/dev.$$
"""


def doctor(
    *options: str, before: Sequence[str] = (), prepare: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*before, *COMMAND, "doctor", *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        preexec_fn=prepare,
    )
    assert done.stderr == ""
    return done


def findings(done: subprocess.CompletedProcess[str]) -> list[Finding]:
    found = [Finding.from_json(line) for line in done.stdout.splitlines()]
    assert done.returncode == (1 if any(one.level == "problem" for one in found) else 0)
    return found


def with_shm(mounts: str) -> list[Finding]:
    """Its findings where shared memory is like this."""
    before = [*own_mounts(), "sh", "-ec", f'{mounts}\nexec "$@"', "-"]
    return findings(doctor("--json", before=before))


def levels(found: list[Finding], check: str) -> list[str]:
    return [one.level for one in found if one.check == check]


def test_a_machine_that_passes_these_tests_is_fit(namespace: str) -> None:
    done = doctor()
    assert done.returncode == 0, done.stdout
    assert "ok       kernel: Linux: waking (a futex in a shared file)" in done.stdout
    found = findings(doctor("--json"))
    assert {one.check for one in found} >= {
        *("versions", "shared memory", "room", "open files", "processes", "memory", "logout"),
        *("kernel", "segments"),
    }
    assert levels(found, "kernel") == ["ok"] * 5


def test_what_is_printed_for_machines_is_an_object_a_line() -> None:
    for line in doctor("--json").stdout.splitlines():
        assert set(json.loads(line)) == {"check", "level", "found", "advice"}


@pytest.mark.parametrize(
    ("mounts", "check", "level", "said"),
    [
        (_ABSENT, "shared memory", "problem", "/dev/shm is not there"),
        ("mount -t tmpfs -o ro tmpfs /dev/shm", "shared memory", "problem", "ro"),
        ("mount -t tmpfs -o mode=777 tmpfs /dev/shm", "shared memory", "warning", "mode 777"),
        ("mount -t tmpfs -o noexec,nosuid tmpfs /dev/shm", "shared memory", "ok", "noexec"),
        (
            "mount -t tmpfs -o size=64m tmpfs /dev/shm",
            "room",
            "warning",
            "64.0 MB of 64.0 MB free, room for",
        ),
        ("mount -t tmpfs -o size=64k tmpfs /dev/shm", "room", "problem", "room for 0 epochs"),
        ("mount -t tmpfs -o size=0 tmpfs /dev/shm", "room", "ok", "no limit of its own"),
        (
            "mount -t tmpfs -o size=1g,nr_inodes=20 tmpfs /dev/shm",
            "room",
            "warning",
            "19 of 20 files",
        ),
    ],
)
def test_shared_memory_is_looked_at(mounts: str, check: str, level: str, said: str) -> None:
    found = with_shm(mounts)
    matching = [one for one in found if one.check == check and one.level == level]
    assert any(said in one.found for one in matching), found
    for one in found:
        assert one.level == "ok" or one.advice is not None or "not tried" in one.found


def test_a_container_is_told_how_to_get_more() -> None:
    (room,) = (
        one for one in with_shm("mount -t tmpfs -o size=64m tmpfs /dev/shm") if one.check == "room"
    )
    assert "what containers get by default" in room.found
    for remedy in ("docker run --shm-size", "shm_size", "emptyDir"):
        assert remedy in str(room.advice)


def test_a_full_shared_memory_is_a_problem_and_no_traceback() -> None:
    fill = "mount -t tmpfs -o size=1m tmpfs /dev/shm; head -c 1m /dev/zero >/dev/shm/full"
    found = with_shm(fill)
    assert levels(found, "room") == ["problem"]
    untried = [one.found for one in found if one.check == "kernel" and one.level == "warning"]
    assert len(untried) == 3
    assert all("not tried, for want of room" in one for one in untried)


def test_limits_are_looked_at() -> None:
    few = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (100, 100))
    found = findings(doctor("--json", prepare=few))
    assert levels(found, "open files") == ["warning"]
    small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (8192, 8192))
    found = findings(doctor("--json", prepare=small))
    assert levels(found, "limits") == ["problem"]


def test_it_leaves_nothing() -> None:
    with_shm("mount -t tmpfs tmpfs /dev/shm")
    before = [
        *own_mounts(),
        "sh",
        "-ec",
        'mount -t tmpfs tmpfs /dev/shm; "$@" >/dev/null; ls /dev/shm',
        "-",
    ]
    assert doctor(before=before).stdout == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")
def test_another_user_is_told_of_a_directory_that_is_closed() -> None:
    closed = "mount -t tmpfs -o mode=755 tmpfs /dev/shm"
    become = "exec setpriv --reuid 65001 --regid 65001 --clear-groups"
    before = [*own_mounts(), "sh", "-ec", f'{closed}\n{become} "$@"', "-"]
    found = findings(doctor("--json", before=before))
    assert levels(found, "shared memory") == ["problem"]
    assert any("this user may not write there" in one.found for one in found)
