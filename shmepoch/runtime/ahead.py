"""Cursors ahead of the feed: their consumer misses everything until the feed reaches them."""

from __future__ import annotations

import logging

from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.epoch.completions import CompletionSeq
from shmepoch.events import Event, about

_log = logging.getLogger(__name__)


class CursorsAhead:
    """Warns of each cursor of an epoch that is ahead of its feed, once.

    shmepoch itself never moves a cursor there, and a cursor cannot move back: only a new epoch
    helps.
    """

    def __init__(self, bindings: SessionRuntimeBindings) -> None:
        self._bindings = bindings
        self._said: set[str] = set()

    def check(self, name: str, cursor: CompletionSeq, watermark: CompletionSeq) -> None:
        """Warn if `cursor`, which was loaded before `watermark`, is above it."""
        if cursor > watermark and name not in self._said:
            self._said.add(name)
            _log.warning(
                "session %s: %s is %d, ahead of the feed, whose watermark is %d; completions up to "
                "the cursor count as seen and wake no agent. Reset the session (reset_session) for "
                "an epoch with fresh cursors, and advance cursors to a batch's watermark only",
                self._bindings.session_id,
                name,
                cursor,
                watermark,
                extra=about(
                    Event.CURSOR_AHEAD,
                    session=self._bindings.session_id,
                    epoch=self._bindings.epoch_id,
                    seq=cursor,
                    cursor=name,
                    watermark=watermark,
                ),
            )
