"""How a segment loses its name: by its owner, or by whoever finds that nobody uses it."""

from __future__ import annotations

from pathlib import Path

from shmepoch._native import PRESENCE_BYTE, RUNTIME_BYTE, Descriptor, try_lock
from shmepoch.ids import SessionId
from shmepoch.memory.files import is_same, open_owned
from shmepoch.memory.namespaces import segment_path


def remove_unused(namespace: str, session_id: SessionId) -> bool:
    """Remove a session's segment if no process has it attached; whether it was removed.

    Safe against any attach: an attachment holds the presence byte shared before it looks at the
    name a last time, and this holds it exclusively.
    """
    path = segment_path(namespace, session_id)
    try:
        opened = open_owned(path)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(opened, PRESENCE_BYTE, False):
            return False
        return remove(opened, path)
    finally:
        opened.close()


def abandon(namespace: str, session_id: SessionId) -> bool:
    """Remove a session's segment whatever is in it, unless it has a live runtime; whether it was
    removed. A process that has it attached keeps the memory, and finds that the name is gone."""
    path = segment_path(namespace, session_id)
    try:
        opened = open_owned(path)
    except FileNotFoundError:
        return False
    try:
        return try_lock(opened, RUNTIME_BYTE, False) and remove(opened, path)
    finally:
        opened.close()


def remove(fd: Descriptor, path: Path) -> bool:
    """Remove a segment's name, if it is still this file's; whether it was. The caller is its owner,
    or holds a lock that keeps owners out."""
    if not is_same(fd, path):
        return False
    # Of a runtime that was killed while it replaced this one. It goes first, as long as the name
    # keeps others from making a segment and a replacement of that.
    replacement(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return True


def replacement(path: Path) -> Path:
    """Where a segment lies for the moment before it takes over an old one's name."""
    return path.with_name(f"{path.name}.new")
