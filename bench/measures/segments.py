"""(e) Making, attaching and ending; tokens and pickles."""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Iterator
from contextlib import ExitStack

import posix_ipc

from bench import cells
from bench.harness import Contestant, Measure, Sample
from bench.loops import calls
from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings
from shmepoch.memory.segment import SharedSegment


def _bare(name: str) -> None:
    """What any attach must do."""
    memory = posix_ipc.SharedMemory(name)
    mmap.mmap(memory.fd, memory.size).close()
    memory.close_fd()


def measures(stack: ExitStack, count: int) -> Iterator[Measure]:
    """The group, for so many calls a sample."""
    bindings = cells.epoch(stack)
    segment = bindings.shared_segment()
    namespace, session_id, token = segment.namespace, bindings.session_id, bindings.to_token()
    bare = Contestant(
        "shm_open + mmap + close", calls(lambda: _bare(f"/{segment.name}"), count), "checks nothing"
    )
    yield Measure(
        "attach and leave a segment",
        [
            Contestant(
                "shmepoch",
                calls(lambda: SharedSegment.attach(namespace, session_id).close(), count),
            ),
            bare,
        ],
    )
    here = _Elsewhere(token)
    stack.callback(here.close)
    yield Measure(
        "attach and leave bindings by token", [Contestant("shmepoch", here.sample(count)), bare]
    )
    yield Measure(
        "pickle and back, attached already",
        [Contestant("shmepoch", calls(lambda: pickle.loads(pickle.dumps(bindings)), count))],
    )
    adapter = stack.enter_context(
        RuntimeSessionAdapter.ephemeral(namespace=f"bench-{os.getpid()}-made")
    )

    def make() -> None:
        session_id = SessionId.new()
        adapter.prepare_bindings(session_id)
        adapter.unregister_session(session_id)

    yield Measure("make and end a session", [Contestant("shmepoch", calls(make, count // 10))])


class _Elsewhere:
    """Attaches in a forked child, since a process has one attachment of an epoch."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._ask, theirs = os.pipe(), os.pipe()
        self._answer = theirs
        self._pid = os.fork()
        if self._pid == 0:
            self._serve()

    def _serve(self) -> None:
        os.close(self._ask[1])
        while text := os.read(self._ask[0], 64):
            seconds = calls(
                lambda: SessionRuntimeBindings.from_token(self._token).close(), int(text)
            )
            os.write(self._answer[1], repr(seconds()).encode())
        os._exit(0)

    def sample(self, count: int) -> Sample:
        """Have the child take a sample."""

        def sample() -> float:
            os.write(self._ask[1], str(count).encode())
            return float(os.read(self._answer[0], 64))

        return sample

    def close(self) -> None:
        os.close(self._ask[1])
        os.waitpid(self._pid, 0)
