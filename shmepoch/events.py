"""The events that shmepoch logs: their names, and the fields of a record besides its text."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmepoch.ids import RuntimeEpochId, SessionId


class Event(StrEnum):
    """The events. A name never changes. docs/logging.md has the meaning and the remedy of each."""

    # The beginning and the end of an epoch.
    EPOCH_CREATED = "epoch_created"
    EPOCH_CONTINUED = "epoch_continued"
    EPOCH_RECOVERED = "epoch_recovered"
    EPOCH_ENLARGED = "epoch_enlarged"
    EPOCH_ROTATED = "epoch_rotated"
    SESSION_UNREGISTERED = "session_unregistered"
    SESSION_GIVEN_UP = "session_given_up"
    SESSION_GIVEN_UP_LATE = "session_given_up_late"
    SEGMENT_ABANDONED = "segment_abandoned"
    STORED_EPOCH_ABANDONED = "stored_epoch_abandoned"
    OPERATIONS_LOST = "operations_lost"
    UNSTORED_LOST = "unstored_lost"
    # A runtime's supervision of its epochs.
    PARTICIPANTS_ENDED = "participants_ended"
    EPOCH_REPAIRED = "epoch_repaired"
    NAME_LOST = "name_lost"
    SUPERVISION_FAILED = "supervision_failed"
    SUPERVISION_DEFERRED = "supervision_deferred"
    SUPERVISION_ENDED = "supervision_ended"
    # Agents, their cursors and their loop.
    AGENT_GAP = "agent_gap"
    CURSOR_AHEAD = "cursor_ahead"
    CURSOR_CAPPED = "cursor_capped"
    LOOP_STOPPED = "loop_stopped"
    LOOP_ENDED = "loop_ended"
    LOOP_FAILED = "loop_failed"
    INJECTION_CANCELLED = "injection_cancelled"
    INJECTION_FAILED = "injection_failed"
    # Operations.
    OPERATION_NOT_ENDED = "operation_not_ended"
    # Stores, and the channel that fills them.
    STORE_FAILED = "store_failed"
    STORE_WORKS = "store_works"
    STORE_GAP = "store_gap"
    EPOCH_REFUSED = "epoch_refused"
    EPOCH_TAKEN = "epoch_taken"
    EPOCH_GIVEN_UP = "epoch_given_up"
    EPOCH_NOT_AWAITED = "epoch_not_awaited"
    CHANNEL_CLOSED_BEHIND = "channel_closed_behind"
    ROW_DAMAGED = "row_damaged"
    # Monitoring.
    TRACING_FAILED = "tracing_failed"
    # Processes.
    FORK_FAILED = "fork_failed"
    WAKE_FAILED = "wake_failed"
    # The command.
    COMMAND_FAILED = "command_failed"
    EPOCH_FOLLOWED = "epoch_followed"
    EPOCH_LEFT = "epoch_left"
    SESSION_NOT_FOLLOWED = "session_not_followed"
    SESSIONS_NOT_FOUND = "sessions_not_found"


def about(
    event: Event,
    *,
    session: SessionId | str | None = None,
    epoch: RuntimeEpochId | str | None = None,
    seq: int | None = None,
    **facts: str | int | list[int],
) -> dict[str, object]:
    """The `extra` of a log record: the event, its subject, and further facts by name."""
    fields: dict[str, object] = {"event": event.value}
    if session is not None:
        fields["session"] = str(session)
    if epoch is not None:
        fields["epoch"] = str(epoch)
    if seq is not None:
        fields["seq"] = seq
    return fields | facts
