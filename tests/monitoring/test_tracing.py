"""Spans of what ended: what they say, that none is missing, and that none comes twice."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from shmepoch import (
    OperationId,
    OperationProgressUpdate,
    RuntimeSessionAdapter,
    SessionId,
    SessionRuntimeBindings,
    observe_session,
)
from shmepoch.monitoring import tracing
from shmepoch.monitoring.tracing import OperationTracer
from tests.processes.children import Channel, start
from tests.runtime.completions import TOOL, drop_through, end
from tests.support import damage_record, eventually, result, spec


class Exported:
    """A provider, and the spans that were made with it."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    @property
    def seqs(self) -> list[object]:
        return [facts(span)["shmepoch.seq"] for span in self.spans]


def facts(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def events(span: ReadableSpan) -> dict[str, dict[str, object]]:
    return {event.name: dict(event.attributes or {}) for event in span.events}


@pytest.fixture
def exported() -> Iterator[Exported]:
    made = Exported()
    yield made
    made.provider.shutdown()


def test_a_span_says_what_the_record_does(
    bindings: SessionRuntimeBindings, exported: Exported
) -> None:
    registry, id = bindings.ops_lifecycle, OperationId.new()
    registry.register_operation(spec("index", id=id))
    registry.provisioning_succeeded(id)
    registry.report_progress(id, OperationProgressUpdate("half", 50))
    registry.report_progress(id, OperationProgressUpdate("nearly"))
    registry.complete_operation(id, result(id))
    snapshot = registry.snapshot(id)
    assert OperationTracer(bindings, exported.provider).emit() == 1
    (span,) = exported.spans
    assert snapshot is not None
    assert (span.name, span.parent) == ("index", None)
    assert span.start_time == snapshot.created_at_ms * 10**6
    assert span.end_time == (snapshot.completed_at_ms or 0) * 10**6
    assert facts(span) == {
        "session.id": str(bindings.session_id),
        "shmepoch.epoch.id": str(bindings.epoch_id),
        "shmepoch.seq": 1,
        "shmepoch.operation.id": str(id),
        "shmepoch.operation.kind": "background_tool_op",
        "shmepoch.operation.source": "test",
        "shmepoch.operation.status": "completed",
    }
    assert span.status.status_code is StatusCode.UNSET
    assert events(span) == {"started": {}, "progress": {"message": "nearly", "count": 2}}
    assert span.events[0].timestamp == (snapshot.started_at_ms or 0) * 10**6
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "shmepoch"


def test_what_failed_is_an_error(bindings: SessionRuntimeBindings, exported: Exported) -> None:
    registry, ids = bindings.ops_lifecycle, [OperationId.new() for _ in range(4)]
    registry.register_operations([spec(id=id) for id in ids])
    registry.cancel_operation(ids[0], "not wanted")
    registry.abort_provisioning(ids[1], "given up")
    registry.provisioning_failed(ids[2], "no such tool")
    registry.terminate_owner("its process is gone")
    OperationTracer(bindings, exported.provider).emit()
    said = [
        (span.status.status_code, span.status.description, facts(span).get("error.type"))
        for span in exported.spans
    ]
    assert said == [
        (StatusCode.UNSET, None, None),
        (StatusCode.UNSET, None, None),
        (StatusCode.ERROR, "no such tool", "failed"),
        (StatusCode.ERROR, "its process is gone", "terminated"),
    ]


def test_it_is_no_part_of_what_is_traced_meanwhile(
    bindings: SessionRuntimeBindings, exported: Exported
) -> None:
    end(bindings, TOOL)
    with exported.provider.get_tracer("other").start_as_current_span("other"):
        OperationTracer(bindings, exported.provider).emit()
    mine, other = exported.spans
    assert mine.parent is None
    assert mine.context.trace_id != other.context.trace_id


def test_another_tracer_goes_on_where_one_stopped(
    bindings: SessionRuntimeBindings, exported: Exported
) -> None:
    end(bindings, TOOL, TOOL)
    tracer = OperationTracer(bindings, exported.provider)
    assert (tracer.emit(), tracer.emit(), tracer.position) == (2, 0, 2)
    end(bindings, TOOL)
    again = OperationTracer(bindings, exported.provider, after_seq=tracer.position)
    assert again.emit() == 1
    assert exported.seqs == [1, 2, 3]


def test_a_gap_is_told_on_the_next_span(
    bindings: SessionRuntimeBindings, exported: Exported
) -> None:
    end(bindings, TOOL)
    tracer = OperationTracer(bindings, exported.provider)
    tracer.emit()
    dropped = drop_through(bindings, 5)
    tracer.emit()
    first, after, *others = exported.spans
    assert events(after)["gap"] == {
        "after_seq": 1,
        "dropped_through": dropped,
        "missing": dropped - 1,
    }
    assert [span for span in (first, *others) if "gap" in events(span)] == []
    last = bindings.ops_lifecycle.completion_feed().watermark()
    assert exported.seqs == [1, *range(dropped + 1, last + 1)]


def test_standalone_bindings_and_an_observers(
    bindings: SessionRuntimeBindings, exported: Exported
) -> None:
    alone = SessionRuntimeBindings.standalone(SessionId.new())
    end(alone, TOOL)
    assert OperationTracer(alone, exported.provider).emit() == 1
    end(bindings, TOOL)
    observer = observe_session(bindings.session_id)
    try:
        assert OperationTracer(observer, exported.provider).emit() == 1
    finally:
        observer.close()


def test_a_thread_follows_other_processes_until_the_block_ends(
    bindings: SessionRuntimeBindings, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_LOOK_S", 0.001)  # it finds nothing, many times

    def work(bindings: SessionRuntimeBindings, channel: Channel) -> None:
        end(bindings, *[TOOL] * 5)
        channel.hear()
        end(bindings, *[TOOL] * 5)

    with OperationTracer(bindings, exported.provider):
        with start(work, bindings) as child:
            eventually(lambda: exported.seqs == [1, 2, 3, 4, 5])
            child.say("go on")
            child.join()
        end(bindings, TOOL)
    assert exported.seqs == [*range(1, 12)]


def test_a_thread_ends_with_the_epoch(adapter: RuntimeSessionAdapter, exported: Exported) -> None:
    bindings = adapter.prepare_bindings(SessionId.new())
    with OperationTracer(bindings, exported.provider):
        end(bindings, TOOL)
        adapter.unregister_session(bindings.session_id)
        eventually(has_no_thread)
        assert exported.seqs == [1]


def has_no_thread() -> bool:
    return "shmepoch-tracer" not in [one.name for one in threading.enumerate()]


def test_what_ends_last_in_the_block_has_a_span(
    bindings: SessionRuntimeBindings, exported: Exported
) -> None:
    tracer = OperationTracer(bindings, exported.provider)
    tracer._end.set()  # its thread looks no more
    with tracer:
        end(bindings, TOOL)
    assert exported.seqs == [1]


def test_in_an_event_loop(bindings: SessionRuntimeBindings, exported: Exported) -> None:
    async def follow() -> None:
        tracer = OperationTracer(bindings, exported.provider)
        feed = bindings.ops_lifecycle.completion_feed()
        while tracer.position < 2:
            await feed.advanced(tracer.position)
            tracer.emit()

    async def both() -> None:
        task = asyncio.create_task(follow())
        end(bindings, TOOL)
        await asyncio.sleep(0)
        end(bindings, TOOL)
        await asyncio.wait_for(task, 60)

    asyncio.run(both())
    assert exported.seqs == [1, 2]


def test_damage_ends_a_thread_and_raises_nothing(
    adapter: RuntimeSessionAdapter, exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    bindings = adapter.prepare_bindings(SessionId.new())
    end(bindings, TOOL, TOOL)
    damage_record(bindings.shared_segment(), 2)
    with (
        caplog.at_level(logging.ERROR, "shmepoch.monitoring.tracing"),
        OperationTracer(bindings, exported.provider, after_seq=1),
    ):
        eventually(has_no_thread)
        assert len(caplog.messages) == 1
    assert exported.spans == ()
    assert f"no more spans of epoch {bindings.epoch_id}" in caplog.messages[0]
    adapter.unregister_session(bindings.session_id)


def test_the_library_needs_nothing_of_it() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import shmepoch, shmepoch.monitoring\n"
        "from shmepoch.monitoring.tracing import OperationTracer"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'shmepoch[tracing]'")
