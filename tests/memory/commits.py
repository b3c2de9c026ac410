"""How many commits each transition of a registry makes, as an audit build counts them.

Run by an interpreter whose native module was built with -DSHMEPOCH_AUDIT.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import pytest

from shmepoch import _native as at
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.waits import OperationCompletionWatch
from shmepoch.errors import (
    AlreadyPeerReady,
    AlreadyRegistered,
    EpochSealed,
    InvalidTransition,
    MaxConcurrentExceeded,
    NotFound,
    PayloadTooLarge,
    StoreBehind,
)
from shmepoch.ids import OperationId
from tests.epoch.operations import CHILD, PEER, UPDATE, Registry, end, result, spec

IDS: Final = [OperationId.from_bytes(bytes([i]) * 16) for i in range(1, 6)]
ONE: Final = IDS[0]

Act: TypeAlias = Callable[[Registry], object]


class Case(NamedTuple):
    """The preparation, the transition, its number of commits, and the error of a refusal."""

    prepare: Act
    act: Act
    commits: int = 1
    refused: type[Exception] | None = None
    store_wait_ms: int = 0


def provisioning(registry: Registry) -> None:
    registry.register_operations([spec(kind=CHILD, id=id) for id in IDS[:3]])


def running(registry: Registry) -> None:
    provisioning(registry)
    registry.start_operations(IDS[:3])


def peered(registry: Registry) -> None:
    running(registry)
    registry.peer_ready(ONE, PEER)


def ended(registry: Registry) -> None:
    running(registry)
    registry.complete_operations([result(id) for id in IDS[:3]])


def sealed(registry: Registry) -> None:
    running(registry)
    registry._segment.seal()


def full(registry: Registry) -> None:
    """A feed that must drop entries for the next record."""
    running(registry)
    for _ in range(4):
        end(registry, "r" * 2500)


def stored_by_nobody(registry: Registry) -> None:
    """A feed that must not drop its entries, since no store has them."""
    running(registry)
    registry.complete_operation(IDS[1], result(IDS[1], "c" * 6000))


#: A watch that was begun before a transition.
_watches: Final[list[OperationCompletionWatch]] = []


def watched(registry: Registry) -> None:
    running(registry)
    _watches.append(registry.register_watcher(ONE))


def watched_and_ended(registry: Registry) -> None:
    watched(registry)
    registry.complete_operation(ONE, result(ONE))


def places(registry: Registry) -> list[tuple[int, int]]:
    return [registry.locate(id).place for id in IDS[:3]]


def complete(registry: Registry, *ids: OperationId, size: int = 4) -> None:
    registry.complete_operations([result(id, "c" * size) for id in ids])


CASES: Final[dict[str, Case]] = {
    "register": Case(running, lambda r: r.register_operation(spec())),
    "register several": Case(running, lambda r: r.register_operations([spec(), spec()])),
    "start": Case(provisioning, lambda r: r.provisioning_succeeded(ONE)),
    "start several": Case(provisioning, lambda r: r.start_operations(IDS[:3]), 3),
    "start none": Case(provisioning, lambda r: r.start_operations([]), 0),
    "progress": Case(running, lambda r: r.report_progress(ONE, UPDATE)),
    "peer": Case(running, lambda r: r.peer_ready(ONE, PEER)),
    "retire": Case(running, lambda r: r.request_retire(ONE)),
    "complete": Case(running, lambda r: r.complete_operation(ONE, result(ONE))),
    "complete several": Case(running, lambda r: complete(r, *IDS[:3])),
    "complete none": Case(running, lambda r: complete(r), 0),
    "complete what is watched": Case(watched, lambda r: complete(r, ONE)),
    "complete over what is dropped": Case(full, lambda r: complete(r, ONE, size=2500)),
    "complete with another one's watcher": Case(watched_and_ended, lambda r: complete(r, IDS[1])),
    "fail": Case(running, lambda r: r.fail_operation(ONE, "broke")),
    "fail provisioning": Case(provisioning, lambda r: r.provisioning_failed(ONE, "no room")),
    "abort provisioning": Case(provisioning, lambda r: r.abort_provisioning(ONE)),
    "cancel": Case(running, lambda r: r.cancel_operation(ONE)),
    "mark retired": Case(running, lambda r: r.mark_retired(ONE)),
    "terminate the owner of several": Case(running, lambda r: r.terminate_owner("ended")),
    "terminate the owner of none": Case(ended, lambda r: r.terminate_owner("ended"), 0),
    "terminate where": Case(running, lambda r: r.terminate_where(lambda _: True, "died")),
    "terminate and forget": Case(
        watched, lambda r: r.terminate_where(lambda _: True, "died", dead=[0, 1])
    ),
    "terminate and seal": Case(running, lambda r: r.terminate_and_seal("ended"), 2),
    "terminate none and seal": Case(ended, lambda r: r.terminate_and_seal("ended"), 1),
    "collect": Case(ended, lambda r: r.collect_completed()),
    "watch": Case(running, lambda r: _watches.append(r.register_watcher(ONE))),
    "watch several": Case(running, lambda r: r.try_watch(places(r)), 3),
    "unwatch": Case(watched, lambda _: _watches.pop().close()),
    "unwatch what has ended": Case(watched_and_ended, lambda _: _watches.pop().close()),
    "seal": Case(running, lambda r: r._segment.seal()),
    "check": Case(running, lambda r: r.check(), 0),
    "restore": Case(lambda _: None, lambda r: r._epoch.restore((), 7, 9, 8)),
    # Refusals.
    "register again": Case(
        running, lambda r: r.register_operations([spec(), spec(id=ONE)]), 0, AlreadyRegistered
    ),
    "register too many": Case(
        running,
        lambda r: r.register_operations([spec() for _ in range(4)]),
        0,
        MaxConcurrentExceeded,
    ),
    "start again": Case(running, lambda r: r.provisioning_succeeded(ONE), 0, InvalidTransition),
    "start twice": Case(
        provisioning,
        lambda r: r.start_operations([ONE, IDS[1], ONE]),
        0,
        InvalidTransition,
    ),
    "progress of what provisions": Case(
        provisioning, lambda r: r.report_progress(ONE, UPDATE), 0, InvalidTransition
    ),
    "another peer": Case(peered, lambda r: r.peer_ready(ONE, PEER), 0, AlreadyPeerReady),
    "retire what provisions": Case(
        provisioning, lambda r: r.request_retire(ONE), 0, InvalidTransition
    ),
    "complete again": Case(ended, lambda r: complete(r, ONE), 0, InvalidTransition),
    "complete what is unknown": Case(running, lambda r: complete(r, ONE, IDS[4]), 0, NotFound),
    "complete too large": Case(
        running, lambda r: complete(r, *IDS[:2], size=10_000), 0, PayloadTooLarge
    ),
    "complete before a store": Case(
        stored_by_nobody, lambda r: complete(r, ONE, size=6000), 0, StoreBehind, store_wait_ms=1
    ),
    "collect what others have": Case(ended, lambda r: r._epoch.collect(1, 2), 0, at.Refused),
    "watch what is unknown": Case(running, lambda r: r.register_watcher(IDS[4]), 0, NotFound),
    "watch what has ended": Case(ended, lambda r: r.register_watcher(ONE), 0),
    "register in a sealed epoch": Case(
        sealed, lambda r: r.register_operation(spec()), 0, EpochSealed
    ),
    "complete in a sealed epoch": Case(sealed, lambda r: complete(r, ONE), 0, EpochSealed),
    "terminate and seal a sealed epoch": Case(
        sealed, lambda r: r.terminate_and_seal("ended"), 0, EpochSealed
    ),
    "collect in a sealed epoch": Case(sealed, lambda r: r.collect_completed(), 0, EpochSealed),
}


def commits_of(case: Case) -> int:
    """How many commits its transition makes."""
    registry = Registry.with_config(
        OpsLifecycleConfig(
            max_operations=6,
            max_completed=4,
            feed_bytes=at.PAGE + 8 * 1024,
            store_wait_ms=case.store_wait_ms,
        )
    )
    case.prepare(registry)
    epoch: Any = registry._epoch
    before: int = epoch.commits
    if case.refused is None:
        case.act(registry)
    else:
        with pytest.raises(case.refused):
            case.act(registry)
    made: int = epoch.commits - before
    return made


def main() -> None:
    """Print the commits of each case."""
    print(json.dumps({name: commits_of(case) for name, case in CASES.items()}))
