"""The agent factory: it builds an agent's boundary from bindings, and makes no competing ones."""

from __future__ import annotations

from typing import Final

from shmepoch.arguments import SessionIdLike, require, session_id_of
from shmepoch.epoch.bindings import (
    History,
    RuntimeBuildMode,
    SessionRuntimeBindings,
    StandaloneEphemeral,
)
from shmepoch.errors import BindingsMismatch
from shmepoch.runtime.boundary import AgentBoundary

_HINT: Final = (
    "write SessionOwned(bindings) with the bindings that the session's runtime prepared, "
    "or StandaloneEphemeral() for private memory of its own"
)


class AgentFactory:
    """Builds agents.

    Their boundaries read completions that the feed has dropped from `history`, such as the
    deployment's store. In the process of a persistent adapter this is its store by default.
    """

    def __init__(self, history: History | None = None) -> None:
        require(History | None, history, "AgentFactory", "history")
        self._history = history

    def build(
        self, session_id: SessionIdLike, build_mode: RuntimeBuildMode, *, sharing: bool = False
    ) -> AgentBoundary:
        """The boundary of the agent of `session_id`.

        With `SessionOwned` it starts at the shared cursor, also if that is zero: zero is a position
        like any other. With `StandaloneEphemeral` it starts at the watermark of its own new feed.

        A session has one live agent. It may have several if all are built with `sharing`: they
        share one cursor, and each is told of completions that no agent has applied yet. The
        boundary is the agent until it is closed or collected. When an agent has died, another can
        be built at once.

        Raises `ArgumentInvalid`, a `TypeError`, for anything but the two build modes, for example
        for raw bindings; `BindingsMismatch` for another session's bindings, `EpochSealed` or
        `EpochGone` for an epoch that has ended, `BindingsClosed` for bindings that this process has
        closed, and `AgentAlreadyActive`.
        """
        session_id = session_id_of(session_id, "AgentFactory.build")
        require(RuntimeBuildMode, build_mode, "AgentFactory.build", "build_mode", hint=_HINT)
        if isinstance(build_mode, StandaloneEphemeral):
            bindings = SessionRuntimeBindings.standalone(session_id)
            watermark = bindings.ops_lifecycle.completion_feed().watermark()
            bindings.cursor_state.agent_applied_cursor.advance(watermark)
            return AgentBoundary(bindings, sharing=sharing)
        bindings = build_mode.bindings
        if bindings.session_id != session_id:
            raise BindingsMismatch(session_id, bindings.session_id)
        bindings.require_open()
        return AgentBoundary(bindings, self._history, sharing=sharing)
