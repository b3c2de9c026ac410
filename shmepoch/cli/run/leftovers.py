"""The segments that killed runs left in shared memory: how they are recognised and removed.

A killed run without a store cannot be resumed. Other programs have segments in the same namespace,
and may still need them. So the session identifiers of such a run are marked.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from typing import Final

from shmepoch.errors import ShmepochError
from shmepoch.ids import SessionId
from shmepoch.memory.namespaces import list_sessions
from shmepoch.memory.removal import remove_unused

#: How many of an identifier's last bytes are a hash of the others.
_MARK_BYTES: Final = 5
_VERSION_AT: Final = 6
_VARIANT_AT: Final = 8
#: The UUID version for custom formats (RFC 9562); libraries make it on request only.
_VERSION: Final = 8 << 4
_VARIANT: Final = 2 << 6


def new_session() -> SessionId:
    """A session that is worthless after its run, however the run ended."""
    raw = bytearray(secrets.token_bytes(16))
    raw[_VERSION_AT] = _VERSION | raw[_VERSION_AT] & 0x0F
    raw[_VARIANT_AT] = _VARIANT | raw[_VARIANT_AT] & 0x3F
    return SessionId.from_bytes(_marked(bytes(raw)))


def is_left_over(session_id: SessionId) -> bool:
    """Whether it is the session of a run that cannot be resumed."""
    raw = session_id.bytes
    return raw[_VERSION_AT] & 0xF0 == _VERSION and raw == _marked(raw)


def remove_left_over(namespace: str) -> None:
    """Remove the segments of killed runs that no process has attached."""
    for session_id in list_sessions(namespace):
        if is_left_over(session_id):
            with contextlib.suppress(ShmepochError, OSError):  # another user's
                remove_unused(namespace, session_id)


def _marked(raw: bytes) -> bytes:
    kept = raw[:-_MARK_BYTES]
    return kept + hashlib.blake2b(kept, digest_size=_MARK_BYTES, person=b"shmepoch run").digest()
