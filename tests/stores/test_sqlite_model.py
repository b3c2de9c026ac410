"""The SQLite store compared with the in-memory store, for arbitrary captures in arbitrary order."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmepoch.epoch.completions import CompletionEntry
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.stores import EpochCapture, InMemoryRuntimeStore, SqliteRuntimeStore
from tests.stores.samples import Epoch, completion, running
from tests.support import spec

HIGHEST = 2**64 - 1


@st.composite
def saves(draw: st.DrawFn) -> list[list[EpochCapture]]:
    """Captures of a few epochs: overlapping, out of order, and sometimes sealed."""
    session = SessionId.new()
    epochs = [Epoch(session), Epoch(session), Epoch()]
    specs = {epoch.id: [spec(f"work {n}") for n in range(1, 7)] for epoch in epochs}
    entries: dict[RuntimeEpochId, list[CompletionEntry]] = {
        epoch.id: [completion(n, id=s.id) for n, s in enumerate(specs[epoch.id], 1)]
        for epoch in epochs
    }

    def capture() -> EpochCapture:
        epoch = draw(st.sampled_from(epochs))
        chosen = draw(st.lists(st.sampled_from(entries[epoch.id]), unique=True, max_size=3))
        seen = draw(st.lists(st.sampled_from(specs[epoch.id]), unique=True, max_size=3))
        chosen.sort(key=lambda entry: entry.seq)
        return epoch.capture(
            chosen,
            operations=[running(s, progress=draw(st.integers(0, 2))) for s in seen],
            specs=seen,
            cursors=draw(st.tuples(*[st.integers(0, HIGHEST)] * 3)),
            sealed=draw(st.integers(0, 5)) == 0,
        )

    count = draw(st.integers(1, 8))
    return [[capture() for _ in range(draw(st.integers(1, 3)))] for _ in range(count)]


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls=saves())
def test_it_keeps_what_the_plain_store_keeps(
    sqlite: SqliteRuntimeStore, calls: list[list[EpochCapture]]
) -> None:
    model = InMemoryRuntimeStore()
    for captures in calls:
        sqlite.save(captures)
        model.save(captures)
        for capture in captures:
            assert sqlite.load(capture.session_id) == model.load(capture.session_id)
            epoch_id = capture.snapshot.epoch_id
            assert sqlite.list_entries(epoch_id) == model.list_entries(epoch_id)
            assert list(sqlite.history(capture.session_id)) == list(
                model.history(capture.session_id)
            )
