"""The time until a completion is durable, the durable completions per second, and the time of a
recovery.

    .venv/bin/python -m bench.durability [--folder FOLDER]

The store is in a temporary folder, or in FOLDER if it is given. Most of the measured time is that
of the disk, to make a write durable. Every recovery is compared with the stored epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Final

from bench.work import operate
from shmepoch import (
    Completed,
    CompletionEntry,
    OperationId,
    OperationKind,
    OperationResult,
    OpsLifecycleConfig,
    PersistedOpsSnapshot,
    PersistenceChannel,
    RuntimeEpochId,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
    SqliteRuntimeStore,
)
from shmepoch.memory.files import SHM_DIR
from shmepoch.stores import EpochCapture, Synchronous

LATENCIES: Final = 200
BACKLOG: Final = 20_000
SUSTAINED: Final = 10_000
CONTENT: Final = "x" * 200
#: Completions that each stored session has.
STORED: Final = 10
RECOVERIES: Final = (10, 1_000, 10_000)
#: Single recoveries from the smallest and from the largest store.
SINGLE: Final = 60
BATCH: Final = 1_000

#: An epoch so small that 10,000 fit; and one that holds the backlog.
LITTLE: Final = OpsLifecycleConfig(
    max_completed=1, max_operations=1, feed_bytes=8192, max_participants=2
)
LARGE: Final = OpsLifecycleConfig(max_completed=BACKLOG // 4, feed_bytes=16 * 1024 * 1024)


@contextlib.contextmanager
def followed(
    store: SqliteRuntimeStore, config: OpsLifecycleConfig, max_delay: float
) -> Iterator[tuple[SessionRuntimeBindings, PersistenceChannel]]:
    """An epoch, and a channel that does not follow it yet."""
    with (
        RuntimeSessionAdapter.ephemeral(config=config) as adapter,
        PersistenceChannel(store, max_delay=max_delay) as channel,
    ):
        bindings = adapter.prepare_bindings(SessionId.new())
        yield bindings, channel
        channel.unfollow(bindings)
        adapter.unregister_session(bindings.session_id)


def latencies(store: SqliteRuntimeStore, max_delay: float) -> list[float]:
    """Milliseconds from each commit until it is durable."""
    found = []
    with followed(store, OpsLifecycleConfig(), max_delay) as (bindings, channel):
        channel.follow(bindings)
        feed = bindings.ops_lifecycle.completion_feed()
        for _ in range(LATENCIES):
            channel.flush()
            operate(bindings, CONTENT)
            began = perf_counter()
            feed.wait_durable(feed.watermark(), 60)
            found.append((perf_counter() - began) * 1000)
    return found


def backlog_rate(store: SqliteRuntimeStore) -> float:
    """Completions per second, when all of them are committed before."""
    with followed(store, LARGE, 0.05) as (bindings, channel):
        for _ in range(BACKLOG):
            operate(bindings, CONTENT)
        began = perf_counter()
        channel.follow(bindings)
        channel.flush()
        taken = perf_counter() - began
        stored = len(store.list_entries(bindings.epoch_id))
        require(stored == BACKLOG, f"{stored} of {BACKLOG} completions were stored")
    return BACKLOG / taken


def sustained_rate(store: SqliteRuntimeStore) -> float:
    """Operations per second of one writer that waits for the store."""
    config = OpsLifecycleConfig(store_wait_ms=60_000)
    with followed(store, config, 0.05) as (bindings, channel):
        channel.follow(bindings)
        began = perf_counter()
        for _ in range(SUSTAINED):
            operate(bindings, CONTENT)
        channel.flush()
        taken = perf_counter() - began
        require(channel.status().missed == 0, "completions were dropped before they were stored")
    return SUSTAINED / taken


def fill(store: SqliteRuntimeStore, sessions: int) -> list[SessionId]:
    """Store this number of sessions, each with its own completions."""
    ids = [SessionId.new() for _ in range(sessions)]
    for first in range(0, sessions, BATCH):
        store.save([capture(id) for id in ids[first : first + BATCH]])
    return ids


def capture(session_id: SessionId) -> EpochCapture:
    """An epoch with completions only."""
    ids = [OperationId.new() for _ in range(STORED)]
    entries = tuple(
        CompletionEntry(
            seq=seq,
            operation_id=id,
            kind=OperationKind.BACKGROUND_TOOL_OP,
            display_name="work",
            terminal_outcome=Completed(OperationResult(id=id, content=CONTENT)),
            completed_at_ms=1_700_000_000_000 + seq,
        )
        for seq, id in enumerate(ids, 1)
    )
    return EpochCapture(
        session_id=session_id,
        snapshot=PersistedOpsSnapshot(epoch_id=RuntimeEpochId.new(), entries=entries),
    )


def recover(store: SqliteRuntimeStore, ids: list[SessionId]) -> float:
    """Seconds that an adapter takes to recover these sessions, after a restart."""
    try:
        with RuntimeSessionAdapter.persistent(store, config=LITTLE) as adapter:
            began = perf_counter()
            for id in ids:
                adapter.register_session(id)
            taken = perf_counter() - began
            for id in ids:
                feed = adapter.ops_lifecycle_registry(id).completion_feed()
                kept = len(feed.list_since(0).entries)
                require(kept == STORED, f"{kept} of {STORED} completions were recovered")
    finally:
        restart()
    return taken


def restart() -> None:
    """Empty shared memory, like a restart of the machine."""
    for path in SHM_DIR.glob(f"shmepoch.{os.environ['SHMEPOCH_NAMESPACE']}.*"):
        path.unlink()


def require(held: bool, complaint: str) -> None:
    """Exit with `complaint` unless `held`: figures of broken code are worthless."""
    if not held:
        raise SystemExit(complaint)


def spread(values: list[float]) -> str:
    """The median and the 99th percentile."""
    return (
        f"p50 {statistics.median(values):6.2f}   p99 {statistics.quantiles(values, n=100)[98]:6.2f}"
    )


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder
    os.environ["SHMEPOCH_NAMESPACE"] = f"bench-{os.getpid()}"
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.ExitStack() as exit, tempfile.TemporaryDirectory(dir=folder) as made:

        def opened(name: str, synchronous: Synchronous = "full") -> SqliteRuntimeStore:
            store = SqliteRuntimeStore(Path(made) / name, synchronous=synchronous)
            return exit.enter_context(contextlib.closing(store))

        full, normal = opened("full.db"), opened("normal.db", "normal")
        print("from commit to durable, ms")
        for label, store, max_delay in (
            ("max_delay 50 ms (default)", full, 0.05),
            ("max_delay 0", full, 0),
            ("max_delay 0, synchronous normal", normal, 0),
        ):
            print(f"    {label:34} {spread(latencies(store, max_delay))}", flush=True)
        print("completions made durable, a second")
        rates: tuple[tuple[str, Callable[[], float]], ...] = (
            (f"a backlog of {BACKLOG:,}", lambda: backlog_rate(full)),
            ("one writer that waits for the store", lambda: sustained_rate(full)),
        )
        for label, rate in rates:
            print(f"    {label:34} {rate():8,.0f}", flush=True)
        print(f"recovery of sessions with {STORED} completions each")
        stores = {}
        for count in RECOVERIES:
            stores[count] = store = opened(f"{count}.db")
            ids = fill(store, count)
            stores[count], taken = store, recover(store, ids)
            each = taken / count * 1000
            print(f"    {count:6,} sessions {taken:8.2f} s {each:8.2f} ms each", flush=True)
        print("recovery of one session, ms")
        few, many = (stores[count] for count in (RECOVERIES[0], RECOVERIES[-1]))
        singles: dict[int, list[float]] = {RECOVERIES[0]: [], RECOVERIES[-1]: []}
        for _ in range(SINGLE):  # in turn, so that other load affects both alike
            for count, store in ((RECOVERIES[0], few), (RECOVERIES[-1], many)):
                (id,) = fill(store, 1)
                singles[count].append(recover(store, [id]) * 1000)
        for count, taken_ms in singles.items():
            print(f"    among {count:6,} {'':20} {spread(taken_ms)}", flush=True)


if __name__ == "__main__":
    main()
