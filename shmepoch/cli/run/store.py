"""The store of a run: it tells the run what it has taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shmepoch.errors import StoreError, StoreWriteFailed
from shmepoch.stores import EpochCapture, SqliteRuntimeStore


class RunStore(SqliteRuntimeStore):
    """A store that says after each save what is durable now."""

    #: Called with what was saved, by whichever thread saved it.
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
        """Why it has not taken everything in this time."""
        return self._failure or StoreWriteFailed(f"it was not up to date within {seconds:.0f} s")
