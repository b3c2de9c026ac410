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

    Safe against any attach: an attachment holds the presence byte shared before it looks at the
    name a last time, and this holds it exclusively.
    """
    return _remove_if_free(segment_path(namespace, session_id), PRESENCE_BYTE)


def abandon(namespace: str, session_id: SessionId) -> bool:
    """Remove a session's segment whatever is in it, unless it has a live runtime; whether it was
    removed. A process that has it attached keeps the memory, and finds that the name is gone."""
    return _remove_if_free(segment_path(namespace, session_id), RUNTIME_BYTE)


def remove_leftovers(namespace: str) -> None:
    """Remove the files that creators of this namespace left half-made when they were killed.

    A creator holds its file's presence byte, or has not looked yet whether the file is there still.
    """
    try:
        paths = provisional_paths(name_prefix(namespace))
    except OSError:
        return  # without shared memory there is none; making a segment says so
    for path in paths:
        with contextlib.suppress(OSError):  # another user's, or no regular file
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
