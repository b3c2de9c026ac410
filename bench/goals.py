"""What shmepoch sets out to be, each a ratio between two contestants of one measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench import cells
from bench.harness import Result


@dataclass(frozen=True)
class Goal:
    """To be `factor` times as fast as each of `peers`; below 1, it may be so much slower."""

    name: str
    measure: str
    peers: tuple[str, ...]
    factor: float

    def measured(self, result: Result) -> float:
        """How many times as fast as the best of the peers."""
        return min(result.ratio(peer, "shmepoch") for peer in self.peers)


GOALS = (
    Goal("load: no slower than atomicshm", "load", ("atomicshm",), 1.0),
    Goal(
        "advance: 3.5 times the best safe peer",
        "advance",
        tuple(cells.SAFE_PEERS),
        3.5,
    ),
    Goal("advance: 12 times a lock", "advance", tuple(cells.LOCKS), 12.0),
    Goal(
        "compare and swap: no slower than atomicshm",
        "compare and swap, successful",
        ("atomicshm",),
        1.0,
    ),
    Goal(
        "snapshot: faster than three loads of atomicshm",
        "snapshot of three cursors",
        ("atomicshm",),
        1.0,
    ),
    Goal(
        "register, start and complete: under one SQLite insert",
        "operation, 100 B",
        ("SQLite, normal",),
        1.0,
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
)


def table(results: Mapping[str, Result]) -> str:
    """Each goal with what was measured, as Markdown."""
    lines = ["| goal | times as fast: wanted | measured | met |", "| --- | --- | --- | --- |"]
    for goal in GOALS:
        measured = goal.measured(results[goal.measure])
        met = "yes" if measured >= goal.factor else "no"
        lines.append(f"| {goal.name} | {goal.factor:.2f} | {measured:.2f} | {met} |")
    return "\n".join(lines)
