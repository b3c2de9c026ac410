"""The agent process: is told of completions, a turn at a time, and writes its transcript."""

from __future__ import annotations

import contextlib
from multiprocessing.connection import Connection
from pathlib import Path

from shmepoch.cli.run.messages import Idle
from shmepoch.cli.run.transcript import Transcript
from shmepoch.epoch.bindings import SessionOwned, SessionRuntimeBindings
from shmepoch.runtime.factory import AgentFactory


def main(pipe: Connection, token: str, transcript: Path) -> None:
    """Take a turn at once, then one for each message, until the runtime closes the pipe.

    The first turn is taken unasked: the agent before this one may have been killed between being
    told to take it and taking it.
    """
    bindings = SessionRuntimeBindings.from_token(token)
    boundary = AgentFactory().build(bindings.session_id, SessionOwned(bindings))
    # The runtime may close its end at any moment, also while this process is still starting.
    runtime_left = contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError)
    with Transcript(transcript) as written, runtime_left:
        while True:
            with boundary.drain() as notices:
                # On the disk before the cursor moves: killed in between, a notice comes twice.
                written.append(bindings.epoch_id, notices)
            pipe.send(Idle())
            pipe.recv()
    bindings.close()
