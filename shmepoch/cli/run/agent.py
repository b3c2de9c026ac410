"""The agent process: it is told of completions in turns, and writes its transcript."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from shmepoch.cli.run.messages import Idle
from shmepoch.cli.run.transcript import Transcript
from shmepoch.epoch.bindings import SessionOwned, SessionRuntimeBindings
from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.persisted import SkippedRange
from shmepoch.ids import RuntimeEpochId
from shmepoch.runtime.factory import AgentFactory
from shmepoch.stores import SqliteRuntimeStore


def main(pipe: Connection, token: str, transcript: Path, store: Path | None) -> None:
    """Take a turn at once, then one for each message, until the runtime closes the pipe.

    The first turn needs no message: the agent before this one may have been killed between a
    message and its turn.
    """
    bindings = SessionRuntimeBindings.from_token(token)
    factory = AgentFactory(None if store is None else _Stored(store))
    boundary = factory.build(bindings.session_id, SessionOwned(bindings))
    # The runtime may close its end at any moment, also while this process is still starting.
    runtime_left = contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError)
    with Transcript(transcript) as written, runtime_left:
        while True:
            with boundary.drain() as notices:
                # On the disk before the cursor moves: after a kill in between, a notice comes
                # twice.
                written.append(bindings.epoch_id, notices)
            pipe.send(Idle())
            pipe.recv()
    bindings.close()


class _Stored:
    """Completions that the feed has dropped, from a store. It is opened for each call: calls are
    rare."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def list_entries(
        self, epoch_id: RuntimeEpochId, after_seq: CompletionSeq, through_seq: CompletionSeq
    ) -> Sequence[CompletionEntry]:
        with SqliteRuntimeStore(self._path) as store:
            return store.list_entries(epoch_id, after_seq, through_seq)

    def list_skipped(self, epoch_id: RuntimeEpochId) -> Sequence[SkippedRange]:
        with SqliteRuntimeStore(self._path) as store:
            return store.list_skipped(epoch_id)
