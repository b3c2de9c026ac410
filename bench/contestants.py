"""The names of contestants in goals and plots, available or not."""

from __future__ import annotations

from typing import Final

#: The records or operations of a batch, for contestants that have batches.
BATCH: Final = 100
SHMEPOCH: Final = "shmepoch"
TOGETHER: Final = f"{SHMEPOCH}, {BATCH} at a time"
#: The contestants that the plots show as ours.
OURS: Final = (SHMEPOCH, TOGETHER)
ATOMICSHM: Final = "atomicshm"
ATOMICS: Final = "atomics"
VALUE: Final = "multiprocessing.Value"
SEMAPHORE: Final = "posix_ipc + numpy"
MANAGER: Final = "multiprocessing.Manager"

#: Locks that stay locked if their holder is killed.
LOCKS: Final = (VALUE, SEMAPHORE)
SAFE_PEERS: Final = (ATOMICSHM, ATOMICS, *LOCKS)


def living(size: int) -> str:
    """The contestant with this number of live epochs."""
    return f"{size:,} live epochs" if size > 1 else "1 live epoch"
