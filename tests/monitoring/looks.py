"""Looking at an epoch in every way, and the states in which epochs are found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.registry import RuntimeOpsLifecycleRegistry
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.segment import SharedSegment
from shmepoch.monitoring.details import EpochDetails, describe
from shmepoch.monitoring.epochs import EpochSummary, summarize

Look: TypeAlias = Callable[[str, SessionId], EpochSummary | None]

LOOKS: Final[tuple[Look, ...]] = (summarize, describe)

CONFIG: Final = OpsLifecycleConfig(
    max_operations=4, max_completed=2, feed_bytes=12 * 1024, max_participants=4
)


@contextmanager
def published(
    namespace: str, config: OpsLifecycleConfig | None = CONFIG
) -> Iterator[SharedSegment]:
    """An epoch that this process has attached, as no participant."""
    segment = SharedSegment.allocate(
        namespace, config, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.publish()
    try:
        yield segment
    finally:
        segment.unlink()
        segment.close()


def registry_of(segment: SharedSegment) -> RuntimeOpsLifecycleRegistry:
    return RuntimeOpsLifecycleRegistry(segment)


def content(segment: SharedSegment) -> bytes:
    """Every byte of the file."""
    return os.pread(segment.fd, os.fstat(segment.fd).st_size, 0)


def summary_of(segment: SharedSegment) -> EpochSummary:
    found = summarize(segment.namespace, segment.session_id)
    assert found is not None
    return found


def details_of(segment: SharedSegment, *, entries: int = 10) -> EpochDetails:
    found = describe(segment.namespace, segment.session_id, entries=entries)
    assert found is not None
    return found
