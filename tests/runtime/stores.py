"""Stores that fail, wait and remember, for the tests of their writers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from shmepoch.epoch.completions import CompletionSeq
from shmepoch.ids import RuntimeEpochId
from shmepoch.stores import EpochCapture, InMemoryRuntimeStore


class WatchedStore(InMemoryRuntimeStore):
    """A store whose saves are recorded, can be delayed, and can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        #: Every transaction that was saved.
        self.saves: list[list[EpochCapture]] = []
        #: How often a save was begun.
        self.attempts = 0
        #: Makes the error of every save and every poll while it is not None.
        self.failure: Callable[[], Exception] | None = None
        #: Saves wait here while it is not set.
        self.gate = threading.Event()
        self.gate.set()

    def save(self, captures: Sequence[EpochCapture]) -> None:
        self.attempts += 1
        self.gate.wait()
        self._fail()
        super().save(captures)
        self.saves.append(list(captures))

    def last_seq(self, epoch_id: RuntimeEpochId) -> CompletionSeq:
        self._fail()
        return super().last_seq(epoch_id)

    def saved_entries(self) -> list[int]:
        """The number of completions of each transaction that had any."""
        counts = [sum(len(c.snapshot.entries) for c in save) for save in self.saves]
        return [count for count in counts if count]

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure()
