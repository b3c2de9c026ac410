"""What several tests need: waiting for a condition, and short ways to make operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from shmepoch.epoch.operations import OperationKind, OperationResult, OperationSpec
from shmepoch.ids import OperationId, SessionId

T = TypeVar("T")


def eventually(look: Callable[[], T], *, within: float = 20.0) -> T:
    """The first true answer of `look`; fails when there is none by the deadline."""
    deadline = time.monotonic() + within
    while not (answer := look()):
        assert time.monotonic() < deadline, f"not within {within} s: {look}"
        time.sleep(0.002)
    return answer


def spec(
    name: str = "work",
    *,
    kind: OperationKind = OperationKind.BACKGROUND_TOOL_OP,
    id: OperationId | None = None,
) -> OperationSpec:
    """The spec of a fresh operation."""
    return OperationSpec(
        id=id or OperationId.new(),
        kind=kind,
        owner_session_id=SessionId.new(),
        display_name=name,
        source_label="test",
    )


def result(id: OperationId, content: str = "done") -> OperationResult:
    """A result for an operation."""
    return OperationResult(id=id, content=content, duration_ms=1)
