"""The names by which goals and plots know who did a job; whether they can be had is not asked."""

from __future__ import annotations

from typing import Final

#: Records or operations that a batch has, with those who can pass on several at once.
BATCH: Final = 100
SHMEPOCH: Final = "shmepoch"
TOGETHER: Final = f"{SHMEPOCH}, {BATCH} at a time"
#: What the plots show as ours.
OURS: Final = (SHMEPOCH, TOGETHER)
ATOMICSHM: Final = "atomicshm"
ATOMICS: Final = "atomics"
VALUE: Final = "multiprocessing.Value"
SEMAPHORE: Final = "posix_ipc + numpy"
MANAGER: Final = "multiprocessing.Manager"

#: The latter two are safe as long as nobody is killed in the middle.
LOCKS: Final = (VALUE, SEMAPHORE)
SAFE_PEERS: Final = (ATOMICSHM, ATOMICS, *LOCKS)


def living(size: int) -> str:
    """The contestant with so many live epochs."""
    return f"{size:,} live epochs" if size > 1 else "1 live epoch"
