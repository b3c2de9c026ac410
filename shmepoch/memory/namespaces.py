"""Namespaces: they separate deployments, and name their segments."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shmepoch.arguments import require
from shmepoch.errors import NamespaceInvalid
from shmepoch.ids import SessionId
from shmepoch.memory.files import SHM_DIR

_NAMESPACE_LIMIT: Final = 64
_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_-]+")
_FILE: Final = re.compile(r"shmepoch\.(?P<namespace>[A-Za-z0-9_-]+)\..+", re.DOTALL)
_NAME: Final = re.compile(r"shmepoch\.(?P<namespace>[A-Za-z0-9_-]+)\.(?P<session>[0-9a-f]{32})")


def resolve_namespace(namespace: str | None) -> str:
    """`namespace`, else the environment's SHMEPOCH_NAMESPACE, else "default"; checked."""
    chosen = os.environ.get("SHMEPOCH_NAMESPACE", "default") if namespace is None else namespace
    require(str, chosen, "resolve_namespace", "namespace")
    if len(chosen) > _NAMESPACE_LIMIT or not _NAMESPACE.fullmatch(chosen):
        raise NamespaceInvalid(chosen, _NAMESPACE_LIMIT)
    return chosen


def segment_path(namespace: str, session_id: SessionId) -> Path:
    """The path of a session's segment. A session has one name: a new epoch replaces the old."""
    return SHM_DIR / segment_name(namespace, session_id)


def list_sessions(namespace: str) -> Iterator[SessionId]:
    """This user's sessions of a namespace that have a segment, in no order."""
    return (session_id for _, session_id in list_segments(namespace))


def list_files(namespace: str | None = None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The namespace and the entry of each file that has a name of a namespace, whatever it is and
    of whatever user, in no order; of one namespace if that is given."""
    with os.scandir(SHM_DIR) as entries:
        for entry in entries:
            match = _FILE.fullmatch(entry.name)
            if match and namespace in (None, match["namespace"]):
                yield match["namespace"], entry


def session_of(name: str) -> SessionId | None:
    """The session whose segment has this name, if it is the name of one."""
    match = _NAME.fullmatch(name)
    return match and SessionId.from_bytes(bytes.fromhex(match["session"]))


def list_segments(namespace: str | None = None) -> Iterator[tuple[str, SessionId]]:
    """The namespace and the session of each of this user's segments, in no order; of one namespace
    if that is given."""
    prefix = "shmepoch." if namespace is None else name_prefix(namespace)
    with os.scandir(SHM_DIR) as entries:
        for entry in entries:
            if not entry.name.startswith(prefix):
                continue  # most of them, where there are many namespaces
            match = _NAME.fullmatch(entry.name)
            if match and _is_mine(entry):
                yield match["namespace"], SessionId.from_bytes(bytes.fromhex(match["session"]))


def _is_mine(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    except FileNotFoundError:  # removed since
        return False


def name_prefix(namespace: str) -> str:
    """The beginning of every file name of a namespace, and of no other: it contains no period."""
    return f"shmepoch.{namespace}."


def segment_name(namespace: str, session_id: SessionId) -> str:
    return f"{name_prefix(namespace)}{session_id.bytes.hex()}"
