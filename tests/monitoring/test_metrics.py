"""What the collector says of epochs, and counts in them, whatever becomes of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from shmepoch import (
    OperationId,
    Role,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
    SqliteRuntimeStore,
)
from shmepoch import _native as at
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.namespaces import segment_path
from shmepoch.monitoring.metrics import EpochCollector
from tests.processes.children import Channel, start
from tests.runtime.completions import CHILD, TOOL, drop_through, end
from tests.support import (
    damage_record,
    empty_shared_memory,
    eventually,
    held_writer,
    result,
    segments_in,
    spec,
)


class Scraped:
    """A collector of one namespace, and what it says at each scrape."""

    def __init__(self, namespace: str, collector: EpochCollector | None = None) -> None:
        self._namespace = namespace
        self.collector = collector or EpochCollector(namespace)
        self.registry = CollectorRegistry()
        self.registry.register(self.collector)

    def __call__(self, name: str, **labels: str) -> float | None:
        """The value of a series of the namespace."""
        labels = {"namespace": self._namespace, **labels}
        return self.registry.get_sample_value(f"shmepoch_{name}", labels)

    def sessions(self) -> set[str]:
        """The values of the label `session`."""
        samples = [sample for metric in self.collector.collect() for sample in metric.samples]
        return {sample.labels["session"] for sample in samples if "session" in sample.labels}


@pytest.fixture
def scraped(namespace: str) -> Scraped:
    """A collector that was there before every epoch of the test."""
    return Scraped(namespace)


def new(adapter: RuntimeSessionAdapter) -> SessionRuntimeBindings:
    return adapter.prepare_bindings(SessionId.new())


@pytest.fixture
def sessions(adapter: RuntimeSessionAdapter) -> Iterator[list[SessionRuntimeBindings]]:
    """Two epochs of a live runtime."""
    bindings = [new(adapter) for _ in range(2)]
    yield bindings
    for one in bindings:
        if adapter.contains_session(one.session_id):
            adapter.unregister_session(one.session_id)


# --- what epochs hold -----------------------------------------------------------------------------


def test_what_epochs_hold(scraped: Scraped, sessions: list[SessionRuntimeBindings]) -> None:
    one, other = sessions
    ids = [OperationId.new() for _ in range(3)]
    one.ops_lifecycle.register_operations([spec(id=id) for id in ids])
    one.ops_lifecycle.start_operations(ids[:1])
    end(one, TOOL, TOOL, TOOL)
    end(other, TOOL)
    one.cursor_state.agent_applied_cursor.advance(1)
    assert scraped("epochs", state="open") == 2
    assert scraped("epochs", state="damaged") == 0
    assert scraped("participants", role="runtime") == 2
    assert scraped("participants", role="agent") == 0
    assert scraped("operations", status="provisioning") == 2
    assert scraped("operations", status="running") == 1
    assert scraped("operations", status="retiring") == 0
    assert scraped("cursor_lag", cursor="agent_applied_cursor") == 3
    assert scraped("cursor_lag_max", cursor="agent_applied_cursor") == 2
    assert scraped("cursor_lag_max", cursor="runtime_observed_seq") == 3
    assert scraped("dead_participants") == 0
    held = sum(path.stat().st_size for path in segments_in(scraped._namespace) if path.suffix)
    assert 0 < (scraped("bytes") or 0) <= held
    assert scraped.registry.get_sample_value("shmepoch_scrape_seconds") is not None


def test_the_dead_are_counted_until_a_runtime_clears_them(
    scraped: Scraped, bindings: SessionRuntimeBindings
) -> None:
    def stay(bindings: SessionRuntimeBindings, channel: Channel) -> None:
        bindings.announce(Role.AGENT)
        channel.say("there")
        signal.pause()

    with start(stay, bindings) as child:
        assert child.hear() == "there"
        assert scraped("participants", role="agent") == 1
        child.kill()
    assert scraped("participants", role="agent") == 0
    eventually(lambda: scraped("dead_participants") == 0)


def test_a_namespace_without_epochs_has_every_series(namespace: str, scraped: Scraped) -> None:
    assert scraped("epochs", state="open") == 0
    assert scraped("cursor_lag", cursor="agent_applied_cursor") == 0
    assert scraped("completions_total") == 0
    assert scraped("repairs_total") == 0
    assert scraped("operation_seconds_count", status="terminated") == 0
    assert scraped("applied_seconds_count") == 0


def test_all_namespaces(
    namespace: str, adapter: RuntimeSessionAdapter, sessions: list[SessionRuntimeBindings]
) -> None:
    scraped = Scraped(namespace, EpochCollector())
    assert scraped("epochs", state="open") == 2
    for one in sessions:
        adapter.unregister_session(one.session_id)
    assert scraped("epochs", state="open") == 0


def test_a_session_is_named_only_if_that_is_wanted(
    namespace: str, scraped: Scraped, sessions: list[SessionRuntimeBindings]
) -> None:
    ids = {str(one.session_id) for one in sessions}
    end(sessions[0], TOOL)
    assert scraped.sessions() == set()
    each = Scraped(namespace, EpochCollector(namespace, by_session=True))
    assert each.sessions() == ids
    session = str(sessions[0].session_id)
    assert each("cursor_lag", session=session, cursor="agent_applied_cursor") == 1
    assert each("completions_total") == 0


def test_two_collectors_of_one_registry_are_refused(scraped: Scraped) -> None:
    with pytest.raises(ValueError, match="Duplicated"):
        scraped.registry.register(EpochCollector())


# --- what happens in them -------------------------------------------------------------------------


def test_counts_stay_when_epochs_go(
    scraped: Scraped, adapter: RuntimeSessionAdapter, sessions: list[SessionRuntimeBindings]
) -> None:
    end(sessions[0], TOOL, TOOL)
    assert scraped("completions_total") == 2
    adapter.unregister_session(sessions[0].session_id)
    assert scraped("completions_total") == 2
    end(sessions[1], TOOL)
    assert scraped("completions_total") == 3
    assert scraped("operation_seconds_count", status="cancelled") == 3


def test_the_last_of_an_epoch_is_counted_if_it_is_polled(
    scraped: Scraped, adapter: RuntimeSessionAdapter, sessions: list[SessionRuntimeBindings]
) -> None:
    scraped.collector.poll()
    name = sessions[0].shared_segment().name
    end(sessions[0], TOOL, TOOL)
    adapter.unregister_session(sessions[0].session_id)
    sessions.pop(0)
    scraped.collector.poll()
    assert scraped("completions_total") == 2
    assert scraped("operation_seconds_count", status="cancelled") == 2
    assert name not in Path("/proc/self/maps").read_text()


def test_without_polls_no_memory_is_kept(
    scraped: Scraped, adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings
) -> None:
    name = bindings.shared_segment().name
    before = Path("/proc/self/maps").read_text().count(name)
    assert scraped("epochs", state="open") == 1
    assert Path("/proc/self/maps").read_text().count(name) == before


def test_of_what_was_there_before_only_what_comes_counts(
    namespace: str, sessions: list[SessionRuntimeBindings]
) -> None:
    end(sessions[0], TOOL, TOOL)
    eventually(lambda: at_a_later_millisecond(sessions))
    scraped = Scraped(namespace)
    assert scraped("completions_total") == 0
    end(sessions[0], TOOL)
    sessions[0].cursor_state.agent_applied_cursor.advance(3)
    assert scraped("completions_total") == 1
    assert scraped("applied_seconds_count") == 3


def at_a_later_millisecond(sessions: list[SessionRuntimeBindings]) -> bool:
    return all(wall_ms() > one.shared_segment().memory.load(at.CREATED_AT) for one in sessions)


def test_how_long_operations_took_and_how_they_ended(
    scraped: Scraped, bindings: SessionRuntimeBindings
) -> None:
    registry = bindings.ops_lifecycle
    ids = [OperationId.new() for _ in range(3)]
    for id in ids:
        registry.register_operation(spec(id=id))
        registry.provisioning_succeeded(id)
    registry.complete_operation(ids[0], result(ids[0], "x" * 2000))
    registry.fail_operation(ids[1], "broke")
    registry.terminate_owner("gone")
    statuses = ("completed", "failed", "terminated")
    for status in statuses:
        assert scraped("operation_seconds_count", status=status) == 1
    batch = registry.completion_feed().list_since(0)
    took = [registry.snapshot(entry.operation_id) for entry in batch.entries]
    seconds = sum((one.elapsed_ms or 0) / 1000 for one in took if one)
    sums = [scraped("operation_seconds_sum", status=status) for status in statuses]
    assert sum(one or 0 for one in sums) == pytest.approx(seconds)


def test_what_the_agent_applied_is_timed_once_it_is_seen(
    scraped: Scraped, bindings: SessionRuntimeBindings
) -> None:
    cursor = bindings.cursor_state.agent_applied_cursor
    end(bindings, TOOL, CHILD, TOOL)
    assert scraped("applied_seconds_count") == 0
    cursor.advance(2)
    assert scraped("applied_seconds_count") == 1, "a child's end wakes no agent"
    cursor.advance(3)
    assert scraped("applied_seconds_count") == 2
    cursor.advance(1000)  # beyond the feed
    assert scraped("applied_seconds_count") == 2
    end(bindings, TOOL)
    assert scraped("applied_seconds_count") == 3
    assert (scraped("applied_seconds_sum") or 0) >= 0


def test_what_was_dropped_before_it_was_applied(
    scraped: Scraped, bindings: SessionRuntimeBindings
) -> None:
    end(bindings, TOOL)
    assert scraped("dropped_before_applied_total") == 0
    dropped = drop_through(bindings, 5)
    assert scraped("dropped_before_applied_total") == dropped
    bindings.cursor_state.agent_applied_cursor.advance(
        bindings.ops_lifecycle.completion_feed().watermark()
    )
    later = drop_through(bindings, dropped + 5)
    assert later > dropped
    assert scraped("dropped_before_applied_total") == dropped
    assert scraped("dropped_before_durable_total") == 0, "nothing persists it"
    assert scraped("persistence_lag") == 0
    watermark = bindings.ops_lifecycle.completion_feed().watermark()
    assert scraped("completions_total") == watermark


def test_what_a_store_lacks(scraped: Scraped, bindings: SessionRuntimeBindings) -> None:
    end(bindings, TOOL, TOOL, TOOL)
    bindings.shared_segment().memory.store(at.DURABLE_AT, 1)
    assert scraped("persistence_lag") == scraped("persistence_lag_max") == 2
    dropped = drop_through(bindings, 5)
    assert scraped("dropped_before_durable_total") == dropped - 1


def test_repairs(scraped: Scraped, bindings: SessionRuntimeBindings) -> None:
    memory = bindings.shared_segment().memory
    for count in (1, 2):
        memory.store(at.INTENT_AT, 1)
        end(bindings, TOOL)
        assert scraped("repairs_total") == count


def test_what_recovery_skips_is_no_completion(
    namespace: str, scraped: Scraped, tmp_path: Path
) -> None:
    path, session_id = tmp_path / "store", SessionId.new()
    with (
        SqliteRuntimeStore(path) as store,
        RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter,
    ):
        bindings = adapter.prepare_bindings(session_id)
        end(bindings, TOOL, TOOL)
        bindings.ops_lifecycle.completion_feed().wait_durable(2, 60)
        assert scraped("completions_total") == 2
        empty_shared_memory(namespace)
    with (
        SqliteRuntimeStore(path) as store,
        RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter,
    ):
        bindings = adapter.prepare_bindings(session_id)
        assert bindings.ops_lifecycle.completion_feed().watermark() > 1000
        assert scraped("completions_total") == 2
        end(bindings, TOOL)
        assert scraped("completions_total") == 3
        assert scraped("operation_seconds_count", status="cancelled") == 3
        assert scraped("dropped_before_applied_total") == 0
        adapter.unregister_session(session_id)


# --- what is wrong with them ----------------------------------------------------------------------


def test_a_damaged_segment(scraped: Scraped, adapter: RuntimeSessionAdapter) -> None:
    bindings = new(adapter)
    end(bindings, TOOL)
    assert scraped("completions_total") == 1
    memory = bindings.shared_segment().memory
    whole = memory.load(at.MAGIC_AT)
    memory.store(at.MAGIC_AT, 0)
    assert scraped("epochs", state="damaged") == 1
    assert scraped("epochs", state="open") == 0
    memory.store(at.MAGIC_AT, whole)
    end(bindings, TOOL)
    assert scraped("completions_total") == 2, "it is not counted from its beginning again"
    adapter.unregister_session(bindings.session_id)


def test_what_is_no_segment(scraped: Scraped, namespace: str) -> None:
    path = segment_path(namespace, SessionId.new())
    for make in (path.mkdir, path.touch):
        make()
        assert scraped("epochs", state="damaged") == 1
        path.rmdir() if path.is_dir() else path.unlink()
    assert scraped("epochs", state="damaged") == 0


def test_a_damaged_record_stops_nothing(scraped: Scraped, bindings: SessionRuntimeBindings) -> None:
    segment = bindings.shared_segment()
    end(bindings, TOOL, TOOL)
    position = segment.memory.load(segment.layout.index_word(2)) & ~1
    word = segment.layout.records + (position + at.RECORD_SIZE) % segment.layout.feed_bytes
    whole = segment.memory.load(word)
    damage_record(segment, 2)
    assert scraped("epochs", state="damaged") == 1
    assert scraped("completions_total") == 2
    segment.memory.store(word, whole)
    end(bindings, TOOL)
    assert scraped("completions_total") == 3
    assert scraped("operation_seconds_count", status="cancelled") == 2
    assert scraped("epochs", state="damaged") == 1


@pytest.mark.parametrize("value", [2**62, 2**64 - 1])
def test_a_damaged_watermark_is_not_believed(
    scraped: Scraped, bindings: SessionRuntimeBindings, value: int
) -> None:
    memory = bindings.shared_segment().memory
    end(bindings, TOOL)
    assert scraped("completions_total") == 1
    memory.store(at.WATERMARK_AT, value)
    assert scraped("epochs", state="damaged") == 1
    assert scraped("completions_total") == 1
    memory.store(at.WATERMARK_AT, 1)


def test_a_stopped_writer_holds_up_no_scrape_and_nothing_is_changed(
    scraped: Scraped, bindings: SessionRuntimeBindings
) -> None:
    segment = bindings.shared_segment()
    end(bindings, TOOL)
    segment.memory.store(at.INTENT_AT, 1)
    with held_writer(segment):
        before = bytes(memoryview(segment.memory))
        scraped.collector.poll()
        assert scraped("epochs", state="open") == 1
        assert scraped("completions_total") == 1
        assert bytes(memoryview(segment.memory)) == before
    segment.memory.store(at.INTENT_AT, 0)


def test_concurrent_scrapes_while_epochs_come_and_go(
    scraped: Scraped, adapter: RuntimeSessionAdapter
) -> None:
    rounds, each = 20, 5
    going = True

    def scrape() -> list[float]:
        seen = []
        while going:
            scraped.collector.poll()
            seen.append(scraped("completions_total") or 0)
        return seen

    with ThreadPoolExecutor(4) as threads:
        scrapes = [threads.submit(scrape) for _ in range(4)]
        try:
            for _ in range(rounds):
                bindings = new(adapter)
                end(bindings, *[TOOL] * each)
                scraped.collector.poll()
                adapter.unregister_session(bindings.session_id)
        finally:
            going = False
        series = [each.result() for each in scrapes]
    assert all(seen == sorted(seen) for seen in series)
    assert scraped("completions_total") == rounds * each
    assert scraped("operation_seconds_count", status="cancelled") == rounds * each


def test_without_its_extra_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import shmepoch, shmepoch.monitoring\n"
        "from shmepoch.monitoring.metrics import EpochCollector"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'shmepoch[metrics]'")
