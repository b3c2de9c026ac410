"""Checks whether a machine is fit for shmepoch: one check for each thing that epochs depend on."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import pwd
import resource
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.codec import Record
from shmepoch.memory.files import SHM_DIR
from shmepoch.memory.layout import Layout
from shmepoch.monitoring import garbage, logind, trials
from shmepoch.monitoring.garbage import Found, Wanted, What

#: The shared memory of an epoch of the default size.
_EPOCH: Final = Layout(OpsLifecycleConfig()).size
#: The size that Docker and Kubernetes give to a container by default.
_CONTAINER_SHM: Final = 64 * 2**20
_ENLARGE: Final = (
    "enlarge it: docker run --shm-size=1g; Compose shm_size: 1g; Kubernetes: an emptyDir with "
    "medium: Memory mounted there; elsewhere: mount -o remount,size=1g /dev/shm"
)
_MOUNT: Final = "mount -t tmpfs -o mode=1777 tmpfs /dev/shm"
#: A process that attaches fewer epochs than this is hardly a runtime.
_FEW_EPOCHS: Final = 128
_FEW_DESCRIPTORS: Final = 1024
_FEW_PROCESSES: Final = 64
#: A limit of this size is no limit: in some places an unlimited value is a large number.
_NO_LIMIT: Final = 2**60
#: The last id of a system user, on nearly every distribution.
_SYSTEM_USERS: Final = 999
#: The number of files of a kind that are named.
_NAMED: Final = 3
_HINTS: Final = {
    What.SEALED: "{gc}",
    What.LEFTOVER: "{gc}",
    What.DOORBELLS: "{gc}",
    What.ABANDONED: "{gc} --older-than 1d, if no runtime is to go on with them",
    What.DAMAGED: "end its processes, then {gc} --damaged",
    What.UNSAFE: "see who made it (ls -l /dev/shm), and remove it",
    What.UNKNOWN: "see who made it (ls -l /dev/shm)",
}
#: The kinds that are no fault.
_FINE: Final = (What.IN_USE, What.OTHERS, What.ABANDONED)


class Level(StrEnum):
    """The weight of a finding."""

    OK = "ok"
    WARNING = "warning"
    """It works now, but may fail later."""
    PROBLEM = "problem"
    """Epochs cannot be used, or cannot be used safely."""


class Finding(Record, kw_only=True, frozen=True):
    """The result of one check."""

    check: str
    level: Level
    found: str
    """The value that was found, and its limit."""
    advice: str | None = None
    """The remedy."""


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """The places from which the facts are read."""

    proc: Path = Path("/proc")
    cgroups: Path = Path("/sys/fs/cgroup")
    systemd: Path = Path("/run/systemd/system")
    logind: tuple[Path, ...] = logind.FOLDERS
    linger: Path = Path("/var/lib/systemd/linger")


def examine(places: Places | None = None) -> Iterator[Finding]:
    """Every check in turn. A check that raises an error is a finding, and the others still run."""
    for name, check in _CHECKS.items():
        try:
            yield from check(name, places or Places())
        except Exception as error:
            found = f"it could not be looked at: {type(error).__name__}: {error}"
            yield Finding(check=name, level=Level.WARNING, found=found)


# --- /dev/shm -----------------------------------------------------------------------------------


def shared_memory(name: str, places: Places) -> Iterator[Finding]:
    """There is a tmpfs, in which this user may make files."""
    if not SHM_DIR.is_dir():
        yield _problem(name, f"{SHM_DIR} is not there", _MOUNT)
        return
    kind, options = _mount_of(SHM_DIR.resolve(), places)
    mode = stat.S_IMODE(SHM_DIR.stat().st_mode)
    found = f"{SHM_DIR} is a {kind}, mode {mode:o}, mounted {','.join(sorted(options))}"
    if "ro" in options:
        yield _problem(name, found, "mount -o remount,rw /dev/shm")
    elif not os.access(SHM_DIR, os.R_OK | os.W_OK | os.X_OK):
        yield _problem(name, f"{found}; this user may not write there", "chmod 1777 /dev/shm")
    elif kind != "tmpfs":
        yield _warning(name, f"{found}: it may write epochs to a disk", _MOUNT)
    elif mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        advice = "chmod 1777 /dev/shm"
        yield _warning(name, f"{found}: other users may remove and replace epochs", advice)
    else:
        yield _ok(name, found)


def _mount_of(path: Path, places: Places) -> tuple[str, set[str]]:
    """The type and the options of the file system that is mounted where `path` is."""
    depth, kind, flags = -1, "file system that is not known", set[str]()
    for line in (places.proc / "self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        point, own = Path(mount.split()[4]), mount.split()[5]
        # A later mount hides an earlier one at the same point.
        if path.is_relative_to(point) and len(point.parts) >= depth:
            kind, _, options = source.split(maxsplit=2)
            depth, flags = len(point.parts), {*own.split(","), *options.split(",")}
    return kind, flags - {"rw"} if "ro" in flags else flags


def room(name: str, _: Places) -> Iterator[Finding]:
    """Epochs fit in."""
    if not SHM_DIR.is_dir():
        return
    file_system = os.statvfs(SHM_DIR)
    size = file_system.f_blocks * file_system.f_frsize
    free = file_system.f_bavail * file_system.f_frsize
    if size == 0 or size > _NO_LIMIT:
        yield _ok(name, f"{SHM_DIR} has no limit of its own")
    else:
        found = f"{SHM_DIR}: {_mb(free)} of {_mb(size)} free, {_epochs(free)}"
        if free < _EPOCH:
            yield _problem(name, found, f"shmepoch gc -A --dry-run says what can go; {_ENLARGE}")
        elif size <= _CONTAINER_SHM:
            told = "; that is what containers get by default" if size == _CONTAINER_SHM else ""
            yield _warning(name, found + told, _ENLARGE)
        elif free < _FEW_EPOCHS * _EPOCH:
            yield _warning(name, found, f"shmepoch gc -A --dry-run says what can go; {_ENLARGE}")
        else:
            yield _ok(name, found)
    if file_system.f_files > 0 and file_system.f_favail < _FEW_EPOCHS:
        level = _warning if file_system.f_favail else _problem
        found = f"{SHM_DIR}: {file_system.f_favail} of {file_system.f_files} files can be made"
        yield level(name, found, "mount -o remount,nr_inodes=1m /dev/shm")


# --- limits -------------------------------------------------------------------------------------


def descriptors(name: str, _: Places) -> Iterator[Finding]:
    """An attachment takes a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        yield _ok(name, "open files: no limit")
        return
    most = "no" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    found = f"open files: {soft:,} a process (hard limit: {most}); an attached epoch takes one"
    if soft >= _FEW_DESCRIPTORS:
        yield _ok(name, found)
    else:
        advice = "ulimit -n 65536; systemd: LimitNOFILE=65536; docker run --ulimit nofile=65536"
        yield _warning(name, found, advice)


def processes(name: str, places: Places) -> Iterator[Finding]:
    """There is room for processes and threads."""
    advice = "ulimit -u; systemd: TasksMax=infinity; docker run --pids-limit=-1"
    tightest = None
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:  # the kernel exempts root
        tightest = soft - _tasks(places), f"processes and threads of this user: at most {soft:,}"
    for current, most in _control_groups("pids", ("pids.current", "pids.max"), places):
        if tightest is None or most - current < tightest[0]:
            tightest = most - current, f"processes and threads of its control group: {most:,}"
    if tightest is None:
        yield _ok(name, "processes and threads: no limit")
        return
    free, told = tightest
    found = f"{told}, {max(0, free):,} more possible"
    yield _ok(name, found) if free >= _FEW_PROCESSES else _warning(name, found, advice)


def _tasks(places: Places) -> int:
    """The number of threads of this user."""
    count = 0
    for process in places.proc.glob("[0-9]*"):
        try:
            if process.stat().st_uid == os.geteuid():
                count += len(os.listdir(process / "task"))
        except OSError:
            continue  # it has ended
    return count


def memory(name: str, places: Places) -> Iterator[Finding]:
    """Shared memory counts as memory of the control group whose process touches it first."""
    names = (("memory.current", "memory.max"), ("memory.usage_in_bytes", "memory.limit_in_bytes"))
    limits = [found for each in names for found in _control_groups("memory", each, places)]
    if not limits:
        yield _ok(name, "memory of its control group: no limit")
        return
    current, most = min(limits, key=lambda limit: limit[1] - limit[0])
    free = max(0, most - current)
    found = f"memory of its control group: {_mb(free)} of {_mb(most)} free, {_epochs(free)}"
    found += "; shared memory counts"
    advice = "docker run --memory=4g; Kubernetes: resources.limits.memory; systemd: MemoryMax=4G"
    if free < _EPOCH:
        yield _problem(name, found, advice)
    elif free < _FEW_EPOCHS * _EPOCH:
        yield _warning(name, found, advice)
    else:
        yield _ok(name, found)


def address_space(name: str, _: Places) -> Iterator[Finding]:
    """Limits of a process that are rarely set: a limit that is not set is not reported."""
    for limit, what, flag in (
        (resource.RLIMIT_AS, "address space", "-v"),
        (resource.RLIMIT_FSIZE, "size of a file", "-f"),
    ):
        soft, _hard = resource.getrlimit(limit)
        if soft == resource.RLIM_INFINITY:
            continue
        found = f"{what}: {_mb(soft)} a process; an epoch takes {_mb(_EPOCH)}"
        least = _EPOCH if limit == resource.RLIMIT_FSIZE else _FEW_EPOCHS * _EPOCH
        if soft < _EPOCH:
            yield _problem(name, found, f"ulimit {flag} unlimited")
        elif soft < least:
            yield _warning(name, found, f"ulimit {flag} unlimited")
        else:
            yield _ok(name, found)


def _control_groups(
    controller: str, names: tuple[str, str], places: Places
) -> Iterator[tuple[int, int]]:
    """The use and the limit of this process's control group and of those above it, if limited.

    `names` are the files of the use and the limit; the two versions have different ones.
    """
    for line in (places.proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = places.cgroups / (controllers if controllers else "")
        group = root / path.lstrip("/")
        if not group.is_dir():
            group = root  # a container that sees only its own part of the tree
        while group.is_relative_to(root):
            current, most = (_number(group / name) for name in names)
            if current is not None and most is not None and most < _NO_LIMIT:
                yield current, most
            group = group.parent


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None  # of the other version, or of a group without this controller
    return int(text) if text.isdigit() else None


# --- other ways to lose epochs ---------------------------------------------------------------


def removal_at_logout(name: str, places: Places) -> Iterator[Finding]:
    """systemd does not remove a user's epochs when that user logs out."""
    uid = os.geteuid()
    if not places.systemd.is_dir():
        yield _ok(name, "systemd does not run here, and removes nothing at a logout")
        return
    removes, path = logind.removes_ipc(places.logind)
    said = f"RemoveIPC={'yes' if removes else 'no'} ({path or 'the default'})"
    if not removes:
        yield _ok(name, said)
    elif uid <= _SYSTEM_USERS:
        yield _ok(name, f"{said}; it does not concern user {uid}, a system user")
    elif (places.linger / _user_name(uid)).exists():
        yield _ok(name, f"{said}; it does not concern {_user_name(uid)}, who lingers")
    else:
        found = f"{said}: the last logout of {_user_name(uid)} removes this user's epochs"
        yield _warning(
            name,
            found,
            f"loginctl enable-linger {_user_name(uid)}; or RemoveIPC=no in the section [Login] of "
            "/etc/systemd/logind.conf.d/shmepoch.conf, and systemctl restart systemd-logind; or "
            "run the deployment as a system user",
        )


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# --- the kernel ---------------------------------------------------------------------------------


def kernel(name: str, _: Places) -> Iterator[Finding]:
    """The kernel does what shmepoch needs of it, tried for real."""
    system = "gVisor" if trials.is_gvisor() else "Linux"
    if not (SHM_DIR.is_dir() and os.access(SHM_DIR, os.W_OK | os.X_OK)):
        yield _warning(name, f"{system}: not tried, for want of shared memory")
        return
    for what, trial in trials.TRIALS.items():
        try:
            trial()
        except (OSError, trials.TrialFailed) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                yield _warning(name, f"{system}: {what} not tried, for want of room")
                continue
            said = error.strerror if isinstance(error, OSError) and error.strerror else error
            advice = "run it on Linux" if system == "gVisor" else "allow these calls in the sandbox"
            yield _problem(name, f"{system}: {what} failed: {said}", advice)
        else:
            yield _ok(name, f"{system}: {what}")


def versions(name: str, _: Places) -> Iterator[Finding]:
    """The parts, for a report."""
    parts = [
        f"shmepoch {importlib.metadata.version('shmepoch')}",
        f"{platform.python_implementation()} {platform.python_version()}",
        f"{platform.system()} {platform.release()} on {platform.machine()}",
        f"native module {Path(at.__file__).name}, layout {at.VERSION}",
    ]
    yield _ok(name, "; ".join(parts))


# --- the files in shared memory -------------------------------------------------------------------


def segments(name: str, _: Places) -> Iterator[Finding]:
    """The files in shared memory, namespace by namespace."""
    if not SHM_DIR.is_dir():
        return
    namespaces: defaultdict[str, list[Found]] = defaultdict(list)
    for file in garbage.find(None, Wanted()):
        namespaces[file.namespace].append(file)
    if not namespaces:
        yield _ok(name, "no file of shmepoch's in shared memory")
    for namespace, files in namespaces.items():
        counts = Counter(one.what for one in files)
        fine = [f"{counts[what]} {what}" for what in _FINE if counts[what]]
        if fine:
            advice = _hint(What.ABANDONED, namespace) if counts[What.ABANDONED] else None
            found = f"namespace {namespace}: {', '.join(fine)}"
            yield Finding(check=name, level=Level.OK, found=found, advice=advice)
        for what in What:
            if counts[what] and what not in _FINE:
                some = [one for one in files if one.what is what]
                told = "; ".join(f"{one.name}: {one.why}" for one in some[:_NAMED])
                more = f"; and {len(some) - _NAMED} more" if len(some) > _NAMED else ""
                found = f"namespace {namespace}: {counts[what]} {what}: {told}{more}"
                yield _warning(name, found, _hint(what, namespace))


def _hint(what: What, namespace: str) -> str:
    return _HINTS[what].format(gc=f"shmepoch gc -n {namespace}")


_CHECKS: Final[dict[str, Callable[[str, Places], Iterator[Finding]]]] = {
    "versions": versions,
    "shared memory": shared_memory,
    "room": room,
    "open files": descriptors,
    "processes": processes,
    "memory": memory,
    "limits": address_space,
    "logout": removal_at_logout,
    "kernel": kernel,
    "segments": segments,
}


def _ok(check: str, found: str) -> Finding:
    return Finding(check=check, level=Level.OK, found=found)


def _warning(check: str, found: str, advice: str | None = None) -> Finding:
    return Finding(check=check, level=Level.WARNING, found=found, advice=advice)


def _problem(check: str, found: str, advice: str | None = None) -> Finding:
    return Finding(check=check, level=Level.PROBLEM, found=found, advice=advice)


def _mb(size: int) -> str:
    return f"{size / 2**20:,.1f} MB"


def _epochs(size: int) -> str:
    return f"room for {size // _EPOCH:,} epochs of the default size"
