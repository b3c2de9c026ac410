"""The messages between the runtime and its children, each over its own pipe.

A child may be killed while it sends; then the pipe ends in the middle of a message, and the reader
gets the end of the pipe. Children share nothing, so a killed child cannot keep a lock of another.
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
    """Child to runtime: a worker is ready for the next command, or an agent's turn is over."""


class Turn(msgspec.Struct, frozen=True):
    """Runtime to agent: there are new notices."""
