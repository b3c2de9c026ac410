"""How a segment loses its name without its owner, and how half-made files are removed."""

from __future__ import annotations

import contextlib
from pathlib import Path

from shmepoch._native import PRESENCE_BYTE, RUNTIME_BYTE, try_lock
from shmepoch.ids import SessionId
from shmepoch.memory.files import open_owned, provisional_paths, unlink
from shmepoch.memory.namespaces import name_prefix, segment_path


def remove_unused(namespace: str, session_id: SessionId) -> bool:
    """Remove a session's segment if no process has it attached; whether it was removed.

    Safe with any attach: an attachment holds the presence byte shared before it checks the name the
    last time, and this holds it exclusively.
    """
    return _remove_if_free(segment_path(namespace, session_id), PRESENCE_BYTE)


def abandon(namespace: str, session_id: SessionId) -> bool:
    """Remove a session's segment, even a damaged one, unless it has a live runtime; whether it was
    removed. A process that has it attached keeps the memory, and notices that the name is gone."""
    return _remove_if_free(segment_path(namespace, session_id), RUNTIME_BYTE)


def remove_leftovers(namespace: str) -> None:
    """Remove the files that creators of this namespace left half-made when they were killed.

    A live creator holds its file's presence byte, or has not yet checked that the file still
    exists.
    """
    try:
        paths = provisional_paths(name_prefix(namespace))
    except OSError:
        return  # without shared memory there are none, and making a segment fails with an error
    for path in paths:
        with contextlib.suppress(OSError):  # of another user, or not a regular file
            _remove_if_free(path, PRESENCE_BYTE)


def _remove_if_free(path: Path, byte: int) -> bool:
    try:
        opened = open_owned(path)
    except FileNotFoundError:
        return False
    try:
        return try_lock(opened, byte, False) and unlink(opened, path)
    finally:
        opened.close()
