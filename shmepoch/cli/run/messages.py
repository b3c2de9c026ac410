"""What the runtime and its children say to each other, each over a pipe of its own.

A child may be killed while it sends; then the pipe ends in the middle of a message, which reads as
its end. Nothing is shared between children, so none can take another's lock with it.
"""

from __future__ import annotations

import msgspec

from shmepoch.ids import OperationId


class Assignment(msgspec.Struct, frozen=True):
    """Runtime to worker: run this command as this operation."""

    operation_id: OperationId
    line: int
    command: str


class Idle(msgspec.Struct, frozen=True):
    """Child to runtime: ready for the next command, or the turn is over."""


class Turn(msgspec.Struct, frozen=True):
    """Runtime to agent: there is something to be told of."""
