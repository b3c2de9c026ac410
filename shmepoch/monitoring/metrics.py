"""Prometheus metrics of epochs: sums of their contents, and counts of their events.

METRICS-1: a scrape takes no lock of an epoch and changes nothing in it. Counters never decrease
when an epoch vanishes. The labels of a namespace stay; an epoch is forgotten.
"""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Final, NamedTuple, Self

import msgspec

try:
    from prometheus_client import Counter, Histogram
    from prometheus_client.core import GaugeMetricFamily, Metric
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the metrics of shmepoch need its extra: pip install 'shmepoch[metrics]'", name=error.name
    ) from None

from shmepoch import _native as at
from shmepoch.epoch.codec import to_wire, wire_decoder
from shmepoch.epoch.completions import CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import OperationKind, OperationStatus
from shmepoch.epoch.table import STATUSES, OperationTable, RawRecord, Words
from shmepoch.errors import SegmentCorrupted
from shmepoch.ids import SessionId
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.namespaces import list_segments, resolve_namespace
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import ObservedSegment
from shmepoch.monitoring.epochs import (
    DAMAGE,
    EpochState,
    EpochSummary,
    completions_between,
    summaries,
)

#: The durations of operations: from an instant to a night's work.
_OPERATION_BUCKETS: Final = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14400, 43200)
#: The times until an agent applies a completion. A poll comes every quarter of a second, so finer
#: buckets would tell nothing.
_APPLIED_BUCKETS: Final = (0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)


class EpochCollector:
    """A collector for a `CollectorRegistry` of prometheus_client, of this user's epochs.

    It counts events from its making on. In an epoch that was there already, it counts the events
    after the first poll. It polls the epochs at each scrape, and whenever `poll` is called. Scrapes
    may be concurrent.
    """

    def __init__(self, namespace: str | None = None, *, by_session: bool = False) -> None:
        """Collect from one namespace, or from all if it is None.

        With `by_session` the gauges have the label `session`, which makes a series for each session
        and value. Counters and histograms never have it.

        Raises `NamespaceInvalid`.
        """
        self._namespace: Final = None if namespace is None else resolve_namespace(namespace)
        self._by_session: Final = by_session
        self._began_ms: Final = wall_ms()
        self._counts: Final = _Counts()
        self._followed: dict[tuple[str, SessionId], _Followed] = {}
        #: Whether `poll` is called between scrapes, and often.
        self._is_polled = False
        self._lock = threading.Lock()
        if self._namespace is not None:
            self._counts.know(self._namespace)

    def poll(self) -> None:
        """Read the epochs once more, between scrapes; best several times a second.

        The latency until a completion is applied comes out too long, by up to the time between two
        polls. From the first call on, the last completions of a removed epoch are counted too: this
        process has the memory of each epoch mapped until the next call.

        Raises `OSError` where shared memory cannot be read.
        """
        with self._lock:
            self._is_polled = True
            self._look()

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now. Raises `OSError` where shared memory cannot be read."""
        with self._lock:
            began = time.perf_counter()
            self._look()
            metrics = [*self._gauges(self._summaries()), *self._counts.collect()]
            took = time.perf_counter() - began
        return [*metrics, GaugeMetricFamily(*_SCRAPE, value=took)]

    def describe(self) -> Iterable[Metric]:
        """The names of the metrics, for the registry."""
        return [*self._gauges(()), *self._counts.describe(), GaugeMetricFamily(*_SCRAPE)]

    # --- gauges: the contents of epochs now -------------------------------------------------------

    def _summaries(self) -> list[EpochSummary]:
        found = []
        for summary in summaries(self._namespace):
            followed = self._followed.get((summary.namespace, summary.session_id))
            if followed is not None and followed.is_damaged:
                summary = msgspec.structs.replace(summary, state=EpochState.DAMAGED)
            found.append(summary)
        return found

    def _gauges(self, found: Iterable[EpochSummary]) -> Iterator[Metric]:
        groups: dict[tuple[str, ...], list[EpochSummary]] = {}
        if not self._by_session:
            groups = {(namespace,): [] for namespace in self._counts.namespaces}
        for one in found:
            session = (str(one.session_id),) if self._by_session else ()
            groups.setdefault((one.namespace, *session), []).append(one)
        names = ("namespace", "session") if self._by_session else ("namespace",)
        for gauge in _GAUGES:
            label = () if gauge.label is None else (gauge.label,)
            family = GaugeMetricFamily(gauge.name, gauge.help, labels=[*names, *label])
            for group, members in groups.items():
                values = dict.fromkeys(map(str, gauge.always), 0)
                for one in members:
                    for key, value in gauge.of(one).items():
                        values[key] = gauge.combine(values[key], value)
                for key, value in values.items():
                    family.add_metric([*group, key] if label else group, value)
            yield family

    # --- counts: the events in epochs -------------------------------------------------------------

    def _look(self) -> None:
        """Count the events since the last poll."""
        listed = set(list_segments(self._namespace))
        for namespace, _ in listed:
            self._counts.know(namespace)
        for key in self._followed.keys() - listed:
            self._leave(key)
        for namespace, session_id in listed:
            try:
                segment = ObservedSegment.peek(namespace, session_id)
            except FileNotFoundError:
                self._leave((namespace, session_id))
            except DAMAGE:
                pass  # its summary says so, and its counts stay
            else:
                segment.close()  # its memory stays mapped, and there is no descriptor to keep
                self._follow((namespace, session_id), segment)

    def _follow(self, key: tuple[str, SessionId], segment: ObservedSegment) -> None:
        followed = self._followed.get(key)
        if followed is None or followed.witness != segment.witness:
            self._leave(key)
            self._followed[key] = followed = _Followed(segment.witness)
        followed.count(segment, self._began_ms, self._counts)
        followed.mapped = segment if self._is_polled else None

    def _leave(self, key: tuple[str, SessionId]) -> None:
        """Count the last events of an epoch that has lost its name, and forget the epoch."""
        followed = self._followed.pop(key, None)
        if followed is not None and followed.mapped is not None:
            followed.count(followed.mapped, self._began_ms, self._counts)


class _Counts:
    """The counters, for each namespace that was ever seen. They stay, as counters have to."""

    def __init__(self) -> None:
        self.namespaces: Final[set[str]] = set()
        self.completions: Final = Counter(
            "shmepoch_completions",
            "Operations that have ended.",
            ("namespace",),
            registry=None,
        )
        self.repairs: Final = Counter(
            "shmepoch_repairs",
            "Transitions that a killed writer left half done, and the next one undid.",
            ("namespace",),
            registry=None,
        )
        self.dropped_before_applied: Final = Counter(
            "shmepoch_dropped_before_applied",
            "Completions that were found dropped from the feed before the agent had applied them.",
            ("namespace",),
            registry=None,
        )
        self.dropped_before_durable: Final = Counter(
            "shmepoch_dropped_before_durable",
            "Completions that were found dropped from the feed before a store had them.",
            ("namespace",),
            registry=None,
        )
        self.operation: Final = Histogram(
            "shmepoch_operation_seconds",
            "Time from the registration of an operation to its end.",
            ("namespace", "status"),
            buckets=_OPERATION_BUCKETS,
            registry=None,
        )
        self.applied: Final = Histogram(
            "shmepoch_applied_seconds",
            "Time from the completion of a background tool to when the agent was found to have "
            "applied it.",
            ("namespace",),
            buckets=_APPLIED_BUCKETS,
            registry=None,
        )
        self._all: Final = (
            self.completions,
            self.repairs,
            self.dropped_before_applied,
            self.dropped_before_durable,
            self.operation,
            self.applied,
        )

    def know(self, namespace: str) -> None:
        """Start a series at 0 for the namespace, so that its first increase shows as one."""
        if namespace not in self.namespaces:
            self.namespaces.add(namespace)
            for metric in self._all:
                if metric is not self.operation:
                    metric.labels(namespace)
            for status in OperationStatus:
                if status.is_terminal:
                    self.operation.labels(namespace, status)

    def collect(self) -> Iterator[Metric]:
        return chain.from_iterable(metric.collect() for metric in self._all)

    def describe(self) -> Iterator[Metric]:
        return chain.from_iterable(metric.describe() for metric in self._all)


class _Place(NamedTuple):
    """The positions in one epoch up to which its events are counted."""

    watermark: CompletionSeq
    applied: CompletionSeq
    durable: CompletionSeq
    dropped: CompletionSeq
    repairs: int

    @classmethod
    def of(cls, segment: ObservedSegment) -> Self:
        memory = segment.memory
        # The order matters: a value that is read later may be further. So no completion counts as
        # missing only because its cursor was read earlier.
        applied, durable = memory.load(at.CURSORS_AT), memory.load(at.DURABLE_AT)
        watermark, dropped = memory.load(at.WATERMARK_AT), memory.load(at.DROPPED_AT)
        return cls(watermark, min(applied, watermark), durable, dropped, memory.load(at.REPAIRS_AT))


class _Followed:
    """One epoch, and the place up to which it has been counted."""

    def __init__(self, witness: bytes) -> None:
        self.witness: Final = witness
        #: Whether a value that was to be counted was found damaged.
        self.is_damaged = False
        #: Its memory, if that is to be read once more when its name is gone.
        self.mapped: ObservedSegment | None = None
        self._place: _Place | None = None

    def count(self, segment: ObservedSegment, began_ms: int, counts: _Counts) -> None:
        """Count the events since the last call. If the epoch is older than the collector, the first
        call counts nothing."""
        if segment.layout.config is None:
            return  # there is nothing but cursors
        try:
            words, place = OperationTable(segment).words(), _Place.of(segment)
            before = self._place
            if before is None:
                is_new = segment.memory.load(at.CREATED_AT) >= began_ms
                before = _beginning(words, place) if is_new else place
            _require_sound(segment, before, place)
            # Set first: if a record below is damaged, no event is counted twice.
            self._place = place
            _count(segment, words, before, place, counts)
        except SegmentCorrupted:
            self.is_damaged = True


def _beginning(words: Words, place: _Place) -> _Place:
    """The place of an epoch before its first event; if it was recovered, since the recovery."""
    begin = words.skipped_through
    return _Place(begin, begin, begin, min(begin, place.dropped), 0)


def _require_sound(segment: ObservedSegment, before: _Place, place: _Place) -> None:
    """Raise `SegmentCorrupted` if `place` cannot follow `before`."""
    for name in ("watermark", "dropped", "repairs"):
        least, actual = getattr(before, name), getattr(place, name)
        if actual < least:
            raise segment.corrupted(name, f"at least {least}", actual)
    least = max(0, place.watermark - segment.layout.entries)
    if place.dropped < least:
        raise segment.corrupted("dropped_through", f"at least {least}", place.dropped)


def _count(
    segment: ObservedSegment, words: Words, before: _Place, place: _Place, counts: _Counts
) -> None:
    """Count the events between two places."""
    namespace, skipped = segment.namespace, (words.skipped_after, words.skipped_through)
    counts.repairs.labels(namespace).inc(place.repairs - before.repairs)
    counts.completions.labels(namespace).inc(
        completions_between(before.watermark, place.watermark, skipped)
    )
    counts.dropped_before_applied.labels(namespace).inc(
        completions_between(max(before.dropped, place.applied), place.dropped, skipped)
    )
    if place.durable:  # else nothing persists it
        counts.dropped_before_durable.labels(namespace).inc(
            completions_between(max(before.dropped, place.durable), place.dropped, skipped)
        )
    table = OperationTable(segment)
    for seq, record in _records(table, max(before.watermark, place.dropped), place.watermark):
        ending = table.decode(f"feed[{seq}]", _ending_decoder.decode, record.outcome)
        status = counts.operation.labels(namespace, ending.outcome_type)
        status.observe(record.elapsed_ms / 1000)
    now_ms = wall_ms()
    for _, record in _records(table, max(before.applied, place.dropped), place.applied):
        if not record.head.startswith(_WAKES_NO_AGENT):
            waited_ms = max(0, now_ms - record.completed_at_ms)
            counts.applied.labels(namespace).observe(waited_ms / 1000)


def _records(
    table: OperationTable, after: CompletionSeq, through: CompletionSeq
) -> Iterator[tuple[CompletionSeq, RawRecord]]:
    """The records above one sequence and up to another, without the dropped ones."""
    for seq in range(after + 1, through + 1):
        record = table.record(seq)
        if record is not None:
            yield seq, record


class _Ending(msgspec.Struct):
    """The part of an outcome that is read: the whole may be long."""

    outcome_type: OperationStatus


_ending_decoder: Final = wire_decoder(_Ending)

#: The first bytes of the head of an operation whose end wakes no agent.
_WAKES_NO_AGENT: Final = to_wire(OperationKind.MOB_MEMBER_CHILD)


class _Gauge(NamedTuple):
    """A metric that is computed from summaries."""

    name: str
    help: str
    #: Its own label, besides the namespace and the session, and the values of that label that are
    #: always there. Without a label: None, and one value.
    label: str | None
    always: Collection[str]
    #: The figure of one epoch for each value of the label, and the way to combine those of several.
    of: Callable[[EpochSummary], Mapping[Any, int]]
    combine: Callable[[int, int], int] = operator.add


def _plain(name: str, help: str, of: Callable[[EpochSummary], int], **more: Any) -> _Gauge:
    return _Gauge(name, help, None, ("",), lambda summary: {"": of(summary)}, **more)


def _persistence_lag(summary: EpochSummary) -> int:
    """The number of completions that are not in the store, of an epoch that something persists."""
    if summary.durable_through or summary.participants.get(Role.PERSISTENCE):
        return max(0, summary.watermark - summary.durable_through)
    return 0


_CURSORS: Final = EpochCursorSnapshot.__struct_fields__

_GAUGES: Final = (
    _Gauge(
        "shmepoch_epochs",
        "Epochs in shared memory.",
        "state",
        tuple(EpochState),
        lambda summary: {summary.state: 1},
    ),
    _Gauge(
        "shmepoch_participants",
        "Live processes that have an epoch attached.",
        "role",
        tuple(Role),
        lambda summary: summary.participants,
    ),
    _plain(
        "shmepoch_dead_participants",
        "Processes that died with an epoch attached, and that no runtime has cleared yet.",
        lambda summary: summary.dead,
    ),
    _Gauge(
        "shmepoch_operations",
        "Operations that have not ended.",
        "status",
        STATUSES[1:],
        lambda summary: summary.operations,
    ),
    _plain("shmepoch_bytes", "Shared memory that epochs take.", lambda summary: summary.bytes),
    _Gauge(
        "shmepoch_cursor_lag",
        "Completions that a cursor has not passed, in all epochs together.",
        "cursor",
        _CURSORS,
        lambda summary: summary.lags,
    ),
    _Gauge(
        "shmepoch_cursor_lag_max",
        "Completions that a cursor has not passed, in the epoch where they are most.",
        "cursor",
        _CURSORS,
        lambda summary: summary.lags,
        max,
    ),
    _plain(
        "shmepoch_persistence_lag",
        "Completions that a store does not have, in all epochs together that something persists.",
        _persistence_lag,
    ),
    _plain(
        "shmepoch_persistence_lag_max",
        "Completions that a store does not have, in the persisted epoch where they are most.",
        _persistence_lag,
        combine=max,
    ),
)

_SCRAPE: Final = ("shmepoch_scrape_seconds", "Time that it took to look at the epochs.")
