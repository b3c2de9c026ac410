"""The reboot drill: kill every process at a random moment, empty shared memory, start again.

    tools/reboot_drill [--rounds N] [--seed N] [--workers N]

Each round is a machine that loses power: a runtime with a persistent adapter, workers that end
operations as fast as they can, and an agent that writes down its notices. All are killed with
SIGKILL within a tenth of a second; then the segments are removed. The next round continues from the
store. Workers write down each operation before they register it, and again when the store has
acknowledged it. At the end the drill compares the three records.

In some rounds the store fails for a while: another process locks its file, or the disk is full
(a limit on the file's size). The epoch must go on, and all promises must hold. In others the
machine comes back with a store that is damaged, or in a read-only folder: the runtime must refuse
it, say why, and start nothing, until it is repaired. Root may write anywhere, so as root the drill
changes to the user nobody.
"""

from __future__ import annotations

import argparse
import collections
import os
import pwd
import random
import resource
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Final, NoReturn, TypeVar

import msgspec

from shmepoch import (
    AgentFactory,
    CompletionEntry,
    OperationId,
    OperationKind,
    OperationResult,
    OperationSpec,
    RuntimeSessionAdapter,
    SessionId,
    SessionOwned,
    SessionRuntimeBindings,
    SqliteRuntimeStore,
    StoreError,
)
from shmepoch.epoch.operations import status_of
from shmepoch.memory.files import SHM_DIR
from shmepoch.memory.namespaces import list_sessions

#: The longest time of a round after its agent has begun.
LONGEST_S: Final = 0.1
#: The longest wait for anything.
PATIENCE_S: Final = 60.0
#: The faults of a round's store; one is chosen at random.
FAULTS: Final = ("none", "none", "none", "none", "locked", "full")
#: The states of the store when the machine comes back; one is chosen at random.
STARTS: Final = ("sound", "sound", "sound", "sound", "damaged", "read-only")
#: The exit status of a runtime that was refused by its store.
REFUSED: Final = 3


class Told(msgspec.Struct, frozen=True):
    """The agent's record of one notice."""

    epoch_id: str
    seq: int
    operation_id: str
    content: str


class Begun(msgspec.Struct, frozen=True):
    """The runtime's record after it has opened the epoch."""

    epoch_id: str
    applied: int
    observed: int
    injected: int


class Records:
    """The files in which the processes write their records, each line in one write."""

    def __init__(self, folder: Path) -> None:
        self.store: Final = folder / "store.db"
        self.token: Final = folder / "token"
        self.begun: Final = folder / "begun"
        self.intended: Final = folder / "intended"
        self.acknowledged: Final = folder / "acknowledged"
        self.told: Final = folder / "told"
        self.gaps: Final = folder / "gaps"
        self.refused = folder / "refused"
        self.faults: Final = folder / "faults"

    def write(self, path: Path, line: bytes) -> None:
        """Append a line, whole or not at all: the lines of a killed process stay."""
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.write(fd, line + b"\n")
        os.close(fd)

    def lines(self, path: Path) -> list[bytes]:
        """Every line written so far."""
        return path.read_bytes().splitlines() if path.exists() else []


# --- the processes of a round -----------------------------------------------------------------


def runtime(records: Records, session_id: SessionId) -> None:
    """Open the epoch, from the store if it has one, and keep it durable."""
    try:
        store = SqliteRuntimeStore(records.store, busy_timeout=0.05, synchronous="normal")
        adapter = RuntimeSessionAdapter.persistent(store)
        bindings = adapter.prepare_bindings(session_id)
    except StoreError as error:
        records.write(records.refused, f"{type(error).__name__}: {error}".encode())
        os._exit(REFUSED)
    bindings.ops_lifecycle.check()
    cursors = bindings.cursor_state.snapshot()
    begun = Begun(
        str(bindings.epoch_id),
        cursors.agent_applied_cursor,
        cursors.runtime_observed_seq,
        cursors.runtime_last_injected_seq,
    )
    records.write(records.begun, msgspec.json.encode(begun))
    draft = records.token.with_suffix(".draft")
    draft.write_text(bindings.to_token())
    draft.rename(records.token)
    signal.pause()


def worker(records: Records, seed: int) -> None:
    """End operations, and write down those that the store has acknowledged."""
    bindings = attach(records)
    registry = bindings.ops_lifecycle
    feed = registry.completion_feed()
    chance = random.Random(seed)
    waiting: collections.deque[tuple[int, OperationId]] = collections.deque()
    while True:
        id = OperationId.new()
        records.write(records.intended, str(id).encode())
        registry.register_operation(
            OperationSpec(
                id=id,
                kind=OperationKind.BACKGROUND_TOOL_OP,
                owner_session_id=bindings.session_id,
                display_name="drill",
                source_label="reboot_drill",
            )
        )
        registry.provisioning_succeeded(id)
        content = f"{id} {'x' * chance.randrange(400)}"
        before = feed.watermark()
        registry.complete_operation(id, OperationResult(id=id, content=content))
        for entry in feed.list_since(before).entries:
            if entry.operation_id == id:
                waiting.append((entry.seq, id))
        durable = feed.durable_through()
        while waiting and waiting[0][0] <= durable:
            records.write(records.acknowledged, str(waiting.popleft()[1]).encode())
        time.sleep(chance.random() / 500)


def agent(records: Records) -> None:
    """Drain notices, write them down, commit; again and again."""
    bindings = attach(records)
    boundary = AgentFactory(SqliteRuntimeStore(records.store)).build(
        bindings.session_id, SessionOwned(bindings)
    )
    feed = bindings.ops_lifecycle.completion_feed()
    while True:
        with boundary.drain() as notices:
            for notice in notices:
                if isinstance(notice, CompletionEntry):
                    records.write(records.told, msgspec.json.encode(told(bindings, notice)))
                else:
                    records.write(records.gaps, str(notice).encode())
        feed.wait_for_advance(bindings.cursor_state.agent_applied_cursor.load())


def told(bindings: SessionRuntimeBindings, entry: CompletionEntry) -> Told:
    """The agent's record of an entry."""
    outcome = entry.terminal_outcome.to_json().decode()
    status = status_of(entry.terminal_outcome)
    return Told(str(bindings.epoch_id), entry.seq, str(entry.operation_id), f"{status} {outcome}")


def attach(records: Records) -> SessionRuntimeBindings:
    """The bindings that this round's runtime has prepared."""
    eventually(records.token.exists, "the runtime has not opened the epoch")
    return SessionRuntimeBindings.from_token(records.token.read_text())


# --- faults -----------------------------------------------------------------------------------


def lock_store(records: Records, _: int) -> Callable[[], object]:
    """Another process writes to the file and does not finish."""
    other = sqlite3.connect(records.store, isolation_level=None, timeout=PATIENCE_S)
    other.execute("BEGIN IMMEDIATE")
    return other.close


def fill_disk(records: Records, pid: int) -> Callable[[], object]:
    """Set a limit, so that no file of the runtime can grow."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (records.store.stat().st_size, -1))
    return lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, (-1, -1))


def damage_store(records: Records) -> Callable[[], object]:
    """Change bytes of the file, like a bad disk."""
    written = {path: path.read_bytes() for path in records.store.parent.glob("store.db*")}
    for path in written:
        path.unlink()
    records.store.write_bytes(random.Random(0).randbytes(len(written[records.store])))

    def mend() -> None:
        for path, content in written.items():
            path.write_bytes(content)

    return mend


def protect_store(records: Records) -> Callable[[], object]:
    """Make the folder and the file in it read-only."""
    folder = records.store.parent
    records.store.chmod(0o400)
    folder.chmod(0o500)

    def mend() -> None:
        folder.chmod(0o700)
        records.store.chmod(0o600)

    return mend


def try_unusable(records: Records, session_id: SessionId, how: str) -> None:
    """Start a runtime on a store that is unusable for now: it must refuse."""
    # The runtime cannot write beside the store, so it reports through a pipe.
    said, complaint = os.pipe()
    mend = (damage_store if how == "damaged" else protect_store)(records)
    try:
        pid = os.fork()
        if pid == 0:
            records.refused = Path(f"/proc/self/fd/{complaint}")
            _become(runtime, records, session_id)
        _, status = os.waitpid(pid, 0)
    finally:
        mend()
        os.close(complaint)
    with open(said, "rb") as pipe:
        text = pipe.read()
    if os.waitstatus_to_exitcode(status) != REFUSED or not text:
        raise RuntimeError(f"a {how} store was not refused: status {status}, {text!r}")
    if list(list_sessions(os.environ["SHMEPOCH_NAMESPACE"])):
        raise RuntimeError(f"a runtime that a {how} store refused has left a segment")
    records.write(records.refused, text.strip())
    records.write(records.faults, how.encode())


# --- the drill ----------------------------------------------------------------------------------

T = TypeVar("T")


def eventually(look: Callable[[], T], complaint: str) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(complaint)
        time.sleep(0.001)
    return answer


def start(target: Callable[..., None], *args: object) -> int:
    """Run `target` in a child; its process id."""
    pid = os.fork()
    if pid == 0:
        _become(target, *args)
    return pid


def _become(target: Callable[..., None], *args: object) -> NoReturn:
    status = 1
    try:
        target(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill(pids: list[int]) -> None:
    """Kill them in this order; report any that had ended by itself."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"a process ended by itself, with status {status}")


def reboot() -> None:
    """Empty shared memory, like a restart of the machine."""
    for path in SHM_DIR.glob(f"shmepoch.{os.environ['SHMEPOCH_NAMESPACE']}.*"):
        path.unlink()


def one_round(records: Records, session_id: SessionId, chance: random.Random, workers: int) -> None:
    """Start everything, let it run for a moment, and kill it in a random order."""
    records.token.unlink(missing_ok=True)
    start_on = chance.choice(STARTS)
    if start_on != "sound" and records.store.exists():
        try_unusable(records, session_id, start_on)
    begun = len(records.lines(records.begun))
    pids = [start(runtime, records, session_id)]
    eventually(lambda: len(records.lines(records.begun)) > begun, "the runtime did not begin")
    pids.append(start(agent, records))
    pids += [start(worker, records, chance.getrandbits(32)) for _ in range(workers)]
    fault = chance.choice(FAULTS)
    mend: Callable[[], object] = lambda: None  # noqa: E731
    time.sleep(chance.random() * LONGEST_S / 2)
    if fault != "none":
        records.write(records.faults, fault.encode())
        mend = (lock_store if fault == "locked" else fill_disk)(records, pids[0])
    time.sleep(chance.random() * LONGEST_S / 2)
    if chance.random() < 0.5:
        mend()
        time.sleep(chance.random() * LONGEST_S / 2)
    chance.shuffle(pids)
    kill(pids)
    if fault == "locked":
        mend()


def settle(records: Records, session_id: SessionId) -> None:
    """A last round without workers, in which the agent is told of all remaining completions."""
    records.token.unlink(missing_ok=True)
    pids = [start(runtime, records, session_id)]
    bindings = attach(records)
    pids.append(start(agent, records))
    feed, cursor = bindings.ops_lifecycle.completion_feed(), bindings.cursor_state
    eventually(
        lambda: cursor.agent_applied_cursor.load() >= feed.watermark(),
        "the agent was not told of everything",
    )
    bindings.ops_lifecycle.check()
    kill(pids)
    bindings.close()


def complaints(records: Records) -> list[str]:
    """Every promise that was broken."""
    found = []
    intended = set(records.lines(records.intended))
    acknowledged = set(records.lines(records.acknowledged))
    notices = [msgspec.json.decode(line, type=Told) for line in records.lines(records.told)]
    delivered = {notice.operation_id.encode() for notice in notices}
    begun = [msgspec.json.decode(line, type=Begun) for line in records.lines(records.begun)]
    if lost := acknowledged - delivered:
        found.append(f"{len(lost)} acknowledged completions were never delivered")
    if invented := delivered - intended:
        found.append(f"{len(invented)} operations were delivered that were never registered")
    if gaps := records.lines(records.gaps):
        found.append(f"{len(gaps)} gaps were shown where nothing was missing, first {gaps[0]!r}")
    meanings: dict[tuple[str, int], Told] = {}
    for notice in notices:
        first = meanings.setdefault((notice.epoch_id, notice.seq), notice)
        if first != notice:
            found.append(f"sequence {notice.seq} came again as something else: {first} {notice}")
    for before, after in pairwise(begun):
        if before.epoch_id != after.epoch_id:
            found.append(f"the epoch changed from {before.epoch_id} to {after.epoch_id}")
        found += [
            f"{cursor} moved back: {before} {after}"
            for cursor in ("applied", "observed", "injected")
            if getattr(after, cursor) < getattr(before, cursor)
        ]
    return found


def main() -> int:
    """Run the drill; 0 if every promise held."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if os.getuid() == 0:
        os.setresuid(*[pwd.getpwnam("nobody").pw_uid] * 3)
    chance, session_id = random.Random(options.seed), SessionId.new()
    namespace = f"drill-{os.getpid()}"
    os.environ["SHMEPOCH_NAMESPACE"] = namespace
    print(f"{options.rounds} rounds, seed {options.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shmepoch-drill-") as folder:
        records = Records(Path(folder))
        try:
            for _ in range(options.rounds):
                one_round(records, session_id, chance, options.workers)
                reboot()
            settle(records, session_id)
        finally:
            reboot()
        found = complaints(records)
        counts = {
            name: len(records.lines(path))
            for name, path in (
                ("operations", records.intended),
                ("acknowledged as durable", records.acknowledged),
                ("notices delivered", records.told),
            )
        }
        distinct = len(set(records.lines(records.told)))
        faults = collections.Counter(line.decode() for line in records.lines(records.faults))
        refusals = {line.decode().partition("; ")[0] for line in records.lines(records.refused)}
    for complaint in found[:20]:
        print(complaint, file=sys.stderr)
    print("faults:", ", ".join(f"{count} {fault}" for fault, count in sorted(faults.items())))
    for refusal in sorted({text.replace(folder, "...") for text in refusals}):
        print("refused:", refusal)
    figures = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(
        f"{options.rounds} rounds, {figures}, {counts['notices delivered'] - distinct} duplicates, "
        f"{len(found)} broken promises, {time.monotonic() - began:.0f} s"
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
