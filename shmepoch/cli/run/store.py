"""The store of a run: it tells the run what was saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shmepoch.errors import StoreError, StoreWriteFailed
from shmepoch.stores import EpochCapture, SqliteRuntimeStore


class RunStore(SqliteRuntimeStore):
    """A store that reports each save."""

    #: Called after a save, with its captures, in the thread of the save.
    on_saved: Callable[[Sequence[EpochCapture]], object] | None = None
    _failure: StoreError | None = None

    def save(self, captures: Sequence[EpochCapture]) -> None:
        try:
            super().save(captures)
        except StoreError as error:
            self._failure = error
            raise
        self._failure = None
        if self.on_saved is not None:
            self.on_saved(captures)

    def behind(self, seconds: float) -> StoreError:
        """The error if it has not taken everything in this time."""
        return self._failure or StoreWriteFailed(f"it was not up to date within {seconds:.0f} s")
