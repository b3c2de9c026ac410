"""How a segment loses its name without its owner, and how half-made files are removed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from shmepoch._native import PRESENCE_BYTE, RUNTIME_BYTE, is_locked, try_lock
from shmepoch.ids import SessionId
from shmepoch.memory.files import open_owned, provisional_paths, unlink
from shmepoch.memory.namespaces import name_prefix, segment_path


def remove_unused(
    namespace: str, session_id: SessionId, *, still: Callable[[], bool] | None = None
) -> bool:
    """Remove a session's segment if no process has it attached; whether it was removed.

    `still` is asked while no process can attach the segment: whether it is to be removed still.

    Safe with any attach: an attachment holds the presence byte shared before it checks the name the
    last time, and this holds it exclusively. Safe with `abandon` in another process, which may give
    the name to a new segment at once: both hold the runtime byte.
    """
    path = segment_path(namespace, session_id)
    return _remove_if_free(path, PRESENCE_BYTE, RUNTIME_BYTE, still=still)


def abandon(namespace: str, session_id: SessionId) -> bool:
    """Remove a session's segment, even a damaged one, unless it has a live runtime; whether it was
    removed. A process that has it attached keeps the memory, and notices that the name is gone."""
    return _remove_if_free(segment_path(namespace, session_id), RUNTIME_BYTE)


def remove_leftovers(namespace: str) -> None:
    """Remove the files that creators of this namespace left half-made when they were killed."""
    try:
        paths = provisional_paths(name_prefix(namespace))
    except OSError:
        return  # without shared memory there are none, and making a segment fails with an error
    for path in paths:
        with contextlib.suppress(OSError):  # of another user, or not a regular file
            remove_leftover(path)


def remove_leftover(path: str | Path) -> bool:
    """Remove a file with a provisional name if its creator was killed; whether it was removed.

    A live creator holds its file's presence byte, or has not yet checked that the file still
    exists. Raises `OSError` for what is no file of this user's alone.
    """
    return _remove_if_free(path, PRESENCE_BYTE)


def is_held(path: str | Path) -> bool:
    """Whether a process has the segment attached, or makes the file. Raises what `open_owned`
    does."""
    opened = open_owned(path)
    try:
        return is_locked(opened, PRESENCE_BYTE)
    finally:
        opened.close()


def _remove_if_free(path: str | Path, *bytes: int, still: Callable[[], bool] | None = None) -> bool:
    try:
        opened = open_owned(path)
    except FileNotFoundError:
        return False
    try:
        free = all(try_lock(opened, byte, False) for byte in bytes)
        return free and (still is None or still()) and unlink(opened, Path(path))
    finally:
        opened.close()
