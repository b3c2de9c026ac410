"""The work that is measured: an epoch, and operations in it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Final

from shmepoch import (
    OperationId,
    OperationKind,
    OperationResult,
    OperationSpec,
    OpsLifecycleConfig,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
)

#: An epoch so small that ten thousand fit on a machine.
LITTLE: Final = OpsLifecycleConfig(
    max_completed=1, max_operations=1, feed_bytes=8192, max_participants=4
)


def epoch(stack: ExitStack, config: OpsLifecycleConfig | None = None) -> SessionRuntimeBindings:
    """A live epoch, ended with `stack`."""
    adapter = stack.enter_context(
        RuntimeSessionAdapter.ephemeral(namespace=f"bench-{os.getpid()}", config=config)
    )
    bindings = adapter.prepare_bindings(SessionId.new())
    stack.callback(adapter.unregister_session, bindings.session_id)
    return bindings


def specified(id: OperationId, bindings: SessionRuntimeBindings) -> OperationSpec:
    """The spec of an operation of that epoch."""
    return OperationSpec(
        id=id,
        kind=OperationKind.BACKGROUND_TOOL_OP,
        owner_session_id=bindings.session_id,
        display_name="index",
        source_label="bench",
    )


def operate_together(bindings: SessionRuntimeBindings, content: str, count: int) -> None:
    """Register, start and complete `count` operations, in batches."""
    ids, registry = [OperationId.new() for _ in range(count)], bindings.ops_lifecycle
    registry.register_operations([specified(id, bindings) for id in ids])
    registry.start_operations(ids)
    registry.complete_operations([OperationResult(id=id, content=content) for id in ids])


def operate(bindings: SessionRuntimeBindings, content: str) -> None:
    """Register, start and complete one operation."""
    id, registry = OperationId.new(), bindings.ops_lifecycle
    registry.register_operation(specified(id, bindings))
    registry.provisioning_succeeded(id)
    registry.complete_operation(id, OperationResult(id=id, content=content))
