"""The goals of shmepoch, each a ratio between contestants of one measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.contestants import ATOMICSHM, LOCKS, SAFE_PEERS, SHMEPOCH, TOGETHER, living
from bench.harness import Result


@dataclass(frozen=True)
class Goal:
    """`subject` is `factor` times as fast as each of `peers`; below 1, no slower than that."""

    name: str
    measure: str
    peers: tuple[str, ...]
    factor: float
    subject: str = SHMEPOCH

    def row(self, results: Mapping[str, Result]) -> str:
        """The goal and the measured ratio, as a row of a Markdown table."""
        wanted = f"| {self.name} | {self.factor:.2f} "
        result = results.get(self.measure)
        if result is None:
            return f"{wanted}| not measured: not in this run | |"
        present = [peer for peer in self.peers if peer in result.figures]
        if not present or self.subject not in result.figures:
            why = "; ".join(result.skipped.values()) or "not in this run"
            return f"{wanted}| not measured: {why} | |"
        ratios = {peer: result.ratio(peer, self.subject) for peer in present}
        closest = min(present, key=ratios.__getitem__)
        met = "yes" if ratios[closest] >= self.factor else "**no**"
        absent = [peer for peer in self.peers if peer not in present]
        without = f"; without {', '.join(absent)}" if absent else ""
        return f"{wanted}| {ratios[closest]:.2f} ({closest}{without}) | {met} |"


_APART = "wake round trip, separate cores"
_STREAM = "completion stream, 200 B, 1 to 1 reader"

GOALS = (
    Goal("load: no slower than atomicshm", "load", (ATOMICSHM,), 1.0),
    Goal("advance: 3.5 times the best safe peer", "advance", SAFE_PEERS, 3.5),
    Goal("advance: 12 times a lock", "advance", LOCKS, 12.0),
    Goal(
        "compare and swap: no slower than atomicshm",
        "compare and swap, successful",
        (ATOMICSHM,),
        1.0,
    ),
    Goal(
        "snapshot: faster than three loads of atomicshm",
        "snapshot of three cursors",
        (ATOMICSHM,),
        1.0,
    ),
    *(
        Goal(
            f"advance by {processes} processes: ahead of every safe peer",
            f"advance, {processes} processes on one cursor",
            SAFE_PEERS,
            1.0,
        )
        for processes in (2, 4, 8)
    ),
    Goal(
        "writers of different cursors: slowed by less than 10%",
        "advance, one process a cursor of one epoch",
        ("one process alone",),
        1 / 1.1,
    ),
    Goal(
        "the same, beside cursors of two epochs, which share nothing",
        "advance, one process a cursor of one epoch",
        ("cursors of two epochs",),
        1 / 1.1,
    ),
    Goal("wake-up: within 5 times of spinning in C", _APART, ("spinning in C",), 1 / 5),
    Goal("wake-up: 50 times a Pipe", _APART, ("multiprocessing.Pipe",), 50.0),
    Goal(
        "wake-up of sleepers: within 1.25 times of futexes in C",
        f"{_APART}, asleep",
        ("futexes in C",),
        1 / 1.25,
    ),
    Goal(
        "wake-up on one core: within 1.5 times of sleeping",
        "wake round trip, one core",
        ("futexes in C",),
        1 / 1.5,
    ),
    Goal(
        "register, start and complete: under one SQLite insert",
        "operation, 100 B",
        ("SQLite, normal",),
        1.0,
    ),
    Goal(
        "operation beside a busy process: p90 within 2 times of one that only writes",
        "operation, p90, beside a writer whose process has a busy thread",
        ("beside a writer alone",),
        1 / 2,
    ),
    Goal(
        "completion stream, one by one: ahead of Redis and SQLite",
        _STREAM,
        ("Redis stream, one by one", "SQLite, normal, 1 a commit"),
        1.0,
    ),
    Goal(
        "completion stream, 100 at a time: ahead of Redis and NATS",
        _STREAM,
        ("Redis stream, pipelined", "NATS JetStream, pipelined"),
        1.0,
        subject=TOGETHER,
    ),
    Goal(
        "completion stream, 100 at a time: ahead of SQLite",
        _STREAM,
        ("SQLite, normal, 100 a commit",),
        1.0,
        subject=TOGETHER,
    ),
    Goal(
        "list_since: within 1.5 times of decoding",
        "list_since of 100 entries",
        ("msgspec alone",),
        1 / 1.5,
    ),
    Goal(
        "attach a segment: within 2 times of bare",
        "attach and leave a segment",
        ("shm_open + mmap + close",),
        1 / 2,
    ),
    Goal(
        "attach bindings: within 6 times of bare",
        "attach and leave bindings by token",
        ("shm_open + mmap + close",),
        1 / 6,
    ),
    Goal("make a session: at most 0.3 ms", "make a session", ("0.3 ms",), 1.0),
    *(
        Goal(
            f"{short} with 10,000 live epochs: within 1.2 times of one",
            measure,
            (living(1),),
            1 / 1.2,
            subject=living(10_000),
        )
        for short, measure in (
            ("advance", "advance, among others"),
            ("operation", "operation, among others"),
            ("attach", "attach and leave a segment, among others"),
            ("wake-up", "wake round trip, separate cores, among others"),
        )
    ),
    Goal(
        "an epoch of the default size: at most half a megabyte",
        "shared memory of an epoch of the default size",
        ("half a megabyte",),
        1.0,
    ),
    Goal(
        "an epoch of the smallest size: at most 32 KB",
        "shared memory of an epoch of the smallest size",
        ("32 KB",),
        1.0,
    ),
    Goal(
        "64 MB of shared memory hold 120 sessions of the default size",
        "64 MB of shared memory, for each session they hold",
        ("120 sessions",),
        1.0,
    ),
    Goal(
        "import: within numpy's own and 25 ms",
        "start a process that imports",
        ("numpy, and 25 ms",),
        1.0,
    ),
    Goal("list 10,000 epochs: in less than 2 s", "list 10,000 epochs", ("2 s",), 1.0),
    Goal(
        "judge 10,000 epochs for removal: in less than 2 s",
        "judge 10,000 epochs for removal",
        ("2 s",),
        1.0,
    ),
)


def table(results: Mapping[str, Result]) -> str:
    """All goals with the measured ratios, as Markdown."""
    head = "| goal | times as fast: wanted | measured (closest peer) | met |"
    return "\n".join([head, "| --- | --- | --- | --- |", *(goal.row(results) for goal in GOALS)])
