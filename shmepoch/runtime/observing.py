"""Observing the sessions of a namespace without being their runtime."""

from __future__ import annotations

from shmepoch.arguments import SessionIdLike, session_id_of
from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.errors import SessionNotFound
from shmepoch.ids import SessionId
from shmepoch.memory import namespaces, removal
from shmepoch.memory.namespaces import resolve_namespace
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import ObservedSegment


def observe_session(
    session_id: SessionIdLike, *, namespace: str | None = None
) -> SessionRuntimeBindings:
    """Bindings that observe a session's epoch, sealed or not, and change nothing.

    They read everything, and wait like others. Every call that would change the epoch raises
    `ObserverReadOnly`. They are a separate attachment, even if this process has other bindings of
    the epoch; `close` them after use. They are listed as a participant if a slot is free. They do
    not keep a runtime from starting, and do not become one. `namespace` is that of the session's
    adapter (default: SHMEPOCH_NAMESPACE, else "default").

    Raises `SessionNotFound`, `NamespaceInvalid`, and the errors of a segment that is not valid.
    """
    session_id = session_id_of(session_id, "observe_session")
    chosen = resolve_namespace(namespace)
    try:
        segment = ObservedSegment.attach(chosen, session_id)
    except FileNotFoundError:
        raise SessionNotFound(session_id, chosen) from None
    try:
        segment.join(Role.OBSERVER)
        return SessionRuntimeBindings(segment)
    except BaseException:
        segment.close()
        raise


def list_sessions(*, namespace: str | None = None) -> list[SessionId]:
    """The sessions of a namespace that have an epoch in shared memory, in order.

    Includes those that no process has attached. Raises `NamespaceInvalid`.
    """
    return sorted(namespaces.list_sessions(resolve_namespace(namespace)))


def remove_unused(session_id: SessionIdLike, *, namespace: str | None = None) -> bool:
    """Remove a session's epoch from shared memory if no process has it attached; whether it was.

    Never disturbs a process that uses it, or is just attaching. Anything of the epoch that is not
    in a store is lost. A segment that is damaged, or of another release, is removed as well. Raises
    `SegmentForeign` for a segment of another user, and `NamespaceInvalid`.
    """
    session_id = session_id_of(session_id, "remove_unused")
    return removal.remove_unused(resolve_namespace(namespace), session_id)
