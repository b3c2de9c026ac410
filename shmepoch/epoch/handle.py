"""The handle of an epoch, with which another process attaches to it, and its text, the token."""

from __future__ import annotations

import binascii
import hashlib
import hmac
from typing import Annotated, Final

import msgspec

from shmepoch._native import ID_SIZE
from shmepoch.arguments import require
from shmepoch.epoch.codec import to_wire, wire_decoder
from shmepoch.errors import TokenInvalid
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.memory.namespaces import resolve_namespace

_PREFIX: Final = "shmepoch1."
_MAC_SIZE: Final = 8


class EpochHandle(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The facts needed to attach to an epoch. A capability: `repr` does not show its key."""

    namespace: str
    session_id: SessionId
    epoch_id: RuntimeEpochId
    witness: Annotated[bytes, msgspec.Meta(min_length=ID_SIZE, max_length=ID_SIZE)]

    def to_token(self) -> str:
        """The handle as text, for an environment variable or a command line."""
        payload = to_wire(self)
        text = binascii.b2a_base64(payload + _mac(payload, self.witness), newline=False).decode()
        return _PREFIX + text.rstrip("=").replace("+", "-").replace("/", "_")

    @classmethod
    def from_token(cls, text: str) -> EpochHandle:
        """Read a token that `to_token` wrote; `TokenInvalid` if it was cut or edited, or is no
        token."""
        if not isinstance(text, str):
            hint = "pass the text that to_token() gave"
            require(str, text, "from_token", "text", hint=hint)
        token = text.strip()
        if not token.startswith(_PREFIX):
            raise TokenInvalid(_other_beginning(token))
        body = token[len(_PREFIX) :].replace("-", "+").replace("_", "/")
        try:
            data = binascii.a2b_base64(body + "==")
            handle = _handle_decoder.decode(data[:-_MAC_SIZE])
            # A handle has one token only. The decoders are not strict: base64 has spare bits and
            # ignores unknown characters, and msgpack can write one length in several widths.
            whole = hmac.compare_digest(handle.to_token(), token)
        except (msgspec.DecodeError, ValueError) as error:
            raise TokenInvalid("it was cut or edited") from error
        if not whole:
            raise TokenInvalid("it was cut or edited")
        resolve_namespace(handle.namespace)
        return handle

    def __repr__(self) -> str:
        return (
            f"EpochHandle(namespace={self.namespace!r}, session_id={self.session_id!r}, "
            f"epoch_id={self.epoch_id!r})"
        )


_handle_decoder: Final = wire_decoder(EpochHandle)


def _other_beginning(token: str) -> str:
    head, dot, _ = token.partition(".")
    if dot and head.startswith("shmepoch"):
        return f"its version is {head!r}, this release reads {_PREFIX[:-1]!r}"
    return f"it does not begin with {_PREFIX!r}"


def _mac(payload: bytes, witness: bytes) -> bytes:
    return hashlib.blake2b(payload, key=witness, digest_size=_MAC_SIZE).digest()
