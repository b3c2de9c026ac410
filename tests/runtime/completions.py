"""Completions for the consumers in these tests."""

from __future__ import annotations

from shmepoch import OperationId, OperationKind, SessionRuntimeBindings
from tests.support import spec

TOOL = OperationKind.BACKGROUND_TOOL_OP
CHILD = OperationKind.MOB_MEMBER_CHILD


def end(
    bindings: SessionRuntimeBindings, *kinds: OperationKind, reason: str = "ended"
) -> list[int]:
    """End one fresh operation of each kind; returns their sequences."""
    registry = bindings.ops_lifecycle
    seqs = []
    for kind in kinds:
        id = OperationId.new()
        registry.register_operation(spec(kind=kind, id=id))
        registry.cancel_operation(id, reason)
        seqs.append(registry.completion_feed().watermark())
    return seqs


def drop_through(bindings: SessionRuntimeBindings, seq: int) -> int:
    """End child operations until retention has dropped everything up to `seq`; returns
    `dropped_through`."""
    while (batch := bindings.ops_lifecycle.completion_feed().list_since(0)).dropped_through < seq:
        end(bindings, CHILD, reason="x" * 400)
    return batch.dropped_through
