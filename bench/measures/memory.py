"""(j) The shared memory of an epoch, and how many epochs fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Final

from bench.contestants import SHMEPOCH
from bench.harness import Contestant, Measure, goal
from bench.processes import together
from bench.work import LITTLE, epoch
from shmepoch import (
    OpsLifecycleConfig,
    RuntimeSessionAdapter,
    SessionId,
    SharedMemoryExhausted,
)
from tests.processes.private_shm import NoPrivateMounts, mount_private_shm

#: The default size of /dev/shm in a container, rounded down.
_ROOM: Final = 64_000_000


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group; a count has no meaning here."""
    default = _bytes(stack, OpsLifecycleConfig())
    for name, size, most in (
        ("default", default, goal("half a megabyte", 500_000.0)),
        ("smallest", _bytes(stack, LITTLE), goal("32 KB", 32_000.0)),
    ):
        yield Measure(
            f"shared memory of an epoch of the {name} size",
            [Contestant(SHMEPOCH, partial(float, size)), most],
            "B",
        )
    why_not = together([_private_shm])[0]
    yield Measure(
        "64 MB of shared memory, for each session they hold",
        [
            Contestant(SHMEPOCH, lambda: _ROOM / (_ROOM // default), f"by their size: {why_not}")
            if why_not
            else Contestant(SHMEPOCH, lambda: _ROOM / together([_fill])[0]),
            goal("120 sessions", _ROOM / 120),
        ],
        "B",
    )


def _bytes(stack: ExitStack, config: OpsLifecycleConfig) -> int:
    return os.fstat(epoch(stack, config).shared_segment().fd).st_blocks * 512


def _private_shm() -> str:
    """Give this process a small private /dev/shm; returns the reason if that fails."""
    try:
        mount_private_shm(_ROOM)
    except NoPrivateMounts as error:
        return str(error)
    return ""


def _fill() -> int:
    """Make sessions until there is no room; returns their number. Their files are gone with the
    process."""
    _private_shm()
    held = 0
    with RuntimeSessionAdapter.ephemeral(namespace=f"bench-{os.getpid()}-full") as adapter:
        while True:
            try:
                adapter.prepare_bindings(SessionId.new())
            except SharedMemoryExhausted:
                return held
            held += 1
