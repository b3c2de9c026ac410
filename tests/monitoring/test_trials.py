"""Trials of the kernel: each finds the fault that it is for, and leaves nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmepoch.monitoring import trials
from shmepoch.monitoring.trials import TRIALS, TrialFailed


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test whose trial leaves a file."""
    made: list[Path] = []
    make = trials._path

    def path() -> Path:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(trials, "_path", path)
    yield
    assert not [one for one in made if one.exists()]


@pytest.mark.parametrize("name", list(TRIALS))
def test_this_kernel_is_fit(name: str) -> None:
    TRIALS[name]()


def refuse(*args: object) -> bool:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.parametrize(
    ("name", "call", "does", "trial"),
    [
        ("os.posix_fallocate", None, lambda *a: None, trials.try_memory),
        ("os.posix_fallocate", None, refuse, trials.try_memory),
        ("rename_new", "trials", lambda a, b: os.replace(a, b), trials.try_rename),
        ("rename_new", "trials", refuse, trials.try_rename),
        ("try_lock", "trials", lambda *a: True, trials.try_locks),
        ("try_lock", "trials", lambda *a: False, trials.try_locks),
        ("try_lock", "trials", refuse, trials.try_locks),
        ("try_lock", "trials", lambda *a: True, trials.try_deaths),
        ("is_locked", "trials", lambda *a: True, trials.try_deaths),
        ("is_locked", "trials", lambda *a: False, trials.try_deaths),
        ("_futex", "trials", lambda *a: 0, trials.try_wakes),
        ("_futex", "trials", refuse, trials.try_wakes),
    ],
)
def test_what_a_kernel_lacks_is_found(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    call: str | None,
    does: Callable[..., object],
    trial: Callable[[], None],
) -> None:
    monkeypatch.setattr(trials, "_PATIENCE_S", 1.0)
    monkeypatch.setattr(trials if call else os, name.removeprefix("os."), does)
    with pytest.raises((OSError, TrialFailed)):
        trial()


def test_a_machine_whose_futex_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    with pytest.raises(TrialFailed, match="pdp11"):
        trials.try_wakes()


def test_this_kernel_is_linux() -> None:
    assert trials.is_gvisor() is ("gvisor" in Path("/proc/cmdline").read_text())
