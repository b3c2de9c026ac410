"""The persistence channel with faults: of one epoch, of threads, and interrupts."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from shmepoch.epoch.bindings import SessionRuntimeBindings
from shmepoch.errors import (
    ArgumentInvalid,
    ChannelClosed,
    ConfigInvalid,
    SegmentCorrupted,
    StoreConflict,
    StoreReadFailed,
    StoreWriteFailed,
)
from shmepoch.ids import RuntimeEpochId, SessionId
from shmepoch.runtime.adapter import RuntimeSessionAdapter
from shmepoch.runtime.followed import EpochPersistence, Followed
from shmepoch.runtime.persistence import PersistenceChannel
from shmepoch.stores import EpochCapture, InMemoryRuntimeStore, RuntimeStore, SqliteRuntimeStore
from tests.runtime.test_persistence import _channel_of, complete, stored_seqs
from tests.support import damage_record, eventually, held_writer

EVERY: tuple[Callable[[RuntimeEpochId], Exception], ...] = (
    lambda id: StoreWriteFailed("no room for so much"),
    lambda id: OSError(errno.EIO, "a bad block"),
    lambda id: RuntimeError("whatever a user's store may raise"),
    lambda id: ValueError("not a value of mine"),
    lambda id: OverflowError("too large to convert to SQLite INTEGER"),
    lambda id: TypeError("not a type of mine"),
    lambda id: StoreConflict(id, "the session", "this", "that"),
)
FOR_GOOD = (ValueError, OverflowError, TypeError, StoreConflict)


class Picky(InMemoryRuntimeStore):
    """A store that does not take some epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[RuntimeEpochId, Callable[[RuntimeEpochId], Exception]] = {}
        self.unreadable: set[RuntimeEpochId] = set()
        self.attempts = 0

    def save(self, captures: Sequence[EpochCapture]) -> None:
        self.attempts += 1
        for capture in captures:
            id = capture.snapshot.epoch_id
            if id in self.refused:
                raise self.refused[id](id)
        super().save(captures)

    def last_seq(self, epoch_id: RuntimeEpochId) -> int:
        if epoch_id in self.unreadable:
            raise StoreReadFailed("a damaged row")
        return super().last_seq(epoch_id)


@pytest.fixture
def store() -> Picky:
    return Picky()


@pytest.fixture
def epochs(adapter: RuntimeSessionAdapter) -> Iterator[list[SessionRuntimeBindings]]:
    """Several, in the order in which they are followed."""
    made = [adapter.prepare_bindings(SessionId.new()) for _ in range(5)]
    yield made
    for bindings in made:
        adapter.unregister_session(bindings.session_id)


def standing(channel: PersistenceChannel, bindings: SessionRuntimeBindings) -> EpochPersistence:
    (found,) = (e for e in channel.status().epochs if e.epoch_id == bindings.epoch_id)
    return found


def error_of(channel: PersistenceChannel, bindings: SessionRuntimeBindings) -> str | None:
    found = standing(channel, bindings)
    return found.error or found.failure


# --- faults of one epoch --------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", EVERY)
@pytest.mark.parametrize("bad", [(0,), (2,), (4,), (0, 1), (0, 2, 4)])
def test_what_a_store_does_not_take_of_one_epoch_holds_up_no_other(
    store: Picky,
    epochs: list[SessionRuntimeBindings],
    refusal: Callable[[RuntimeEpochId], Exception],
    bad: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PERSIST-3."""
    refused = [epochs[index] for index in bad]
    sound = [bindings for bindings in epochs if bindings not in refused]
    store.refused = {bindings.epoch_id: refusal for bindings in refused}
    for_good = isinstance(refusal(epochs[0].epoch_id), FOR_GOOD)
    with PersistenceChannel(store, max_delay=0.001) as channel:
        for bindings in epochs:
            complete(bindings)
            channel.follow(bindings)
        for seq in (1, 2, 3):
            for bindings in sound:
                eventually(lambda one=bindings, seq=seq: store.last_seq(one.epoch_id) == seq)  # type: ignore[misc]
            for bindings in sound:
                channel.flush(20, bindings=bindings)
            for bindings in epochs:
                complete(bindings)
        for bindings in refused:
            eventually(lambda one=bindings: error_of(channel, one))  # type: ignore[misc]
            with pytest.raises((StoreWriteFailed, *FOR_GOOD)):
                channel.flush(0.2, bindings=bindings)
            assert store.last_seq(bindings.epoch_id) == 0
            assert (standing(channel, bindings).error is not None) is for_good
            told = f"epoch {bindings.epoch_id} is not stored, although others are"
            assert caplog.text.count(told) <= 1  # from then on it is tried alone
        assert [error_of(channel, bindings) for bindings in sound] == [None] * len(sound)
        store.refused.clear()
        if not for_good:
            channel.flush(20)
            assert [stored_seqs(store, one) for one in epochs] == [[1, 2, 3, 4]] * len(epochs)
            assert not channel.status().failing


def test_what_a_store_cannot_read_of_one_epoch_holds_up_no_other(
    store: Picky, epochs: list[SessionRuntimeBindings]
) -> None:
    store.unreadable.add(epochs[0].epoch_id)
    with PersistenceChannel(store) as channel:
        for bindings in epochs:
            complete(bindings)
            channel.follow(bindings)
        for bindings in epochs[1:]:
            channel.flush(20, bindings=bindings)
        store.unreadable.clear()
        channel.flush(20)
        assert [stored_seqs(store, bindings) for bindings in epochs] == [[1]] * len(epochs)


@pytest.mark.parametrize("step", ["is_due", "read"])
@pytest.mark.parametrize("error", [OverflowError("too large"), KeyError("gone"), IndexError("off")])
def test_an_epoch_that_cannot_be_read_is_given_up_alone(
    store: Picky,
    epochs: list[SessionRuntimeBindings],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    step: str,
) -> None:
    bad, whole = epochs[1], getattr(Followed, step)

    def broken(self: Followed, **settings: bool) -> Any:
        if self.id == bad.epoch_id:
            raise error
        return whole(self, **settings)

    monkeypatch.setattr(Followed, step, broken)
    with PersistenceChannel(store) as channel:
        for bindings in epochs:
            complete(bindings)
            channel.follow(bindings)
        with pytest.raises(type(error)):
            channel.flush(20)
        assert [stored_seqs(store, one) for one in epochs] == [[1], [], [1], [1], [1]]
        assert error_of(channel, bad) == str(error)
        assert not channel.status().failing


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_time_that_no_store_keeps_is_of_one_epoch(
    epochs: list[SessionRuntimeBindings], tmp_path: Path, kind: str
) -> None:
    bad = SessionRuntimeBindings.standalone(SessionId.new())
    complete(bad)
    damage_record(bad._segment, 1)
    store: RuntimeStore = InMemoryRuntimeStore()
    if kind == "sqlite":
        store = SqliteRuntimeStore(tmp_path / "store.db", synchronous="normal")
    with PersistenceChannel(store) as channel:
        for bindings in (bad, *epochs):
            channel.follow(bindings)
        complete(epochs[0])
        with pytest.raises(SegmentCorrupted, match=r"feed\[1\]"):
            channel.flush(20)
        assert stored_seqs(store, epochs[0]) == [1]
        channel.flush(20, bindings=epochs[0])
        assert not channel.status().failing
        assert "feed[1]" in str(error_of(channel, bad))
    store.close()


@pytest.mark.parametrize("verb", ["unregister", "reset"])
def test_a_session_with_a_value_that_no_store_keeps_can_be_ended(
    store: Picky, namespace: str, verb: str
) -> None:
    """Its end is stored, without the value."""
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        bad = adapter.prepare_bindings(SessionId.new())
        eventually(lambda: store.load(bad.session_id))
        with held_writer(bad.shared_segment()):  # the channel does not poll in between
            pass
        complete(bad)
        damage_record(bad.shared_segment(), 1)
        eventually(lambda: error_of(_channel_of(adapter), bad))
        if verb == "reset":
            new = adapter.reset_session(bad.session_id)
            complete(new)
            _channel_of(adapter).flush(20)
            assert stored_seqs(store, new) == [1]
        adapter.unregister_session(bad.session_id)
    assert store.load(bad.session_id) is None
    assert stored_seqs(store, bad) == []


def test_a_sound_session_ends_while_another_is_not_stored(store: Picky, namespace: str) -> None:
    with RuntimeSessionAdapter.persistent(store, namespace=namespace) as adapter:
        bad, good = (adapter.prepare_bindings(SessionId.new()) for _ in range(2))
        store.refused[bad.epoch_id] = EVERY[0]
        complete(bad)
        complete(good)
        adapter.reset_session(good.session_id)
        adapter.unregister_session(good.session_id)
        store.refused.clear()
        adapter.unregister_session(bad.session_id)
    assert stored_seqs(store, good) == [1]
    assert stored_seqs(store, bad) == [1]


# --- threads --------------------------------------------------------------------------------------


def refuse_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def refuse_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio, "new_event_loop", refuse)


@pytest.mark.parametrize("refuse", [refuse_threads, refuse_descriptors])
def test_a_channel_whose_thread_cannot_be_started_may_follow_later(
    store: Picky,
    epochs: list[SessionRuntimeBindings],
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[pytest.MonkeyPatch], None],
) -> None:
    with PersistenceChannel(store) as channel:
        with monkeypatch.context() as patched:
            refuse(patched)
            for _ in range(2):
                with pytest.raises((RuntimeError, OSError)):
                    channel.follow(epochs[0])
            assert channel.status().epochs == ()
            channel.flush(20)
        complete(epochs[0])
        channel.follow(epochs[0])
        channel.flush(20)
        assert stored_seqs(store, epochs[0]) == [1]


@pytest.mark.parametrize("refuse", [refuse_threads, refuse_descriptors])
def test_a_channel_whose_thread_cannot_be_started_may_be_closed(
    store: Picky,
    epochs: list[SessionRuntimeBindings],
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[pytest.MonkeyPatch], None],
) -> None:
    channel = PersistenceChannel(store)
    with monkeypatch.context() as patched:
        refuse(patched)
        with pytest.raises((RuntimeError, OSError)):
            channel.follow(epochs[0])
    channel.close()
    with pytest.raises(ChannelClosed):
        channel.follow(epochs[0])


# --- interrupts -----------------------------------------------------------------------------------


class CallingBack(InMemoryRuntimeStore):
    """A store that uses the channel that it serves."""

    def __init__(self) -> None:
        super().__init__()
        self.act: Callable[[], object] = lambda: None

    def save(self, captures: Sequence[EpochCapture]) -> None:
        self.act()
        super().save(captures)


def test_a_store_may_call_its_channel(epochs: list[SessionRuntimeBindings]) -> None:
    store, said = CallingBack(), list[object]()
    one, other = epochs[:2]
    with PersistenceChannel(store) as channel:

        def use() -> None:
            store.act = lambda: None
            said.append(channel.status().failing)
            channel.follow(other)
            channel.unfollow(one)
            with pytest.raises(StoreWriteFailed, match="waits for its own channel"):
                channel.flush()
            channel.close()
            said.append("closed")

        store.act = use
        complete(one)
        channel.follow(one)
        eventually(lambda: said == [False, "closed"])
    assert stored_seqs(store, one) == [1]


@contextlib.contextmanager
def interrupting(act: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Yields a function that makes the main thread call `act`; it may be called in any thread."""
    before = signal.signal(signal.SIGUSR1, lambda *_: act())
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("verb", ["flush", "unfollow", "close", "follow", "status"])
@pytest.mark.parametrize("within", ["flush", "unfollow", "close"])
def test_a_handler_may_use_a_channel_that_its_thread_waits_for(
    epochs: list[SessionRuntimeBindings], verb: str, within: str
) -> None:
    """The main thread waits for a save; the handler runs while it does."""
    store = CallingBack()
    one, other = epochs[:2]
    channel = PersistenceChannel(store, max_delay=0)
    channel.follow(one)
    channel.flush(20)
    saving, go_on, done = threading.Event(), threading.Event(), list[str]()

    def hold() -> None:
        saving.set()
        assert go_on.wait(20)

    calls: dict[str, Callable[[], object]] = {
        "flush": lambda: channel.flush(20, bindings=one),
        "unfollow": lambda: channel.unfollow(one),
        "close": channel.close,
        "follow": lambda: channel.follow(other),
        "status": channel.status,
    }

    def use() -> None:
        go_on.set()
        with contextlib.suppress(ChannelClosed):
            calls[verb]()
        done.append(verb)

    with interrupting(use) as interrupt:
        store.act = hold
        complete(one)
        assert saving.wait(20)
        threading.Timer(0.05, interrupt).start()
        with contextlib.suppress(ChannelClosed):
            calls[within]()
        eventually(lambda: done == [verb])
    store.act = lambda: None
    channel.close()
    assert stored_seqs(store, one) == [1]


# --- how long to wait -----------------------------------------------------------------------------

FOR_EVER = (float("inf"), 1e9, 1e12, 1e18, 10**30, 10**400, numpy.inf, numpy.float32(1e30))


@pytest.mark.parametrize("timeout", [*FOR_EVER, numpy.int64(20), numpy.float64(20)])
def test_a_flush_takes_every_number_of_seconds(
    epochs: list[SessionRuntimeBindings], timeout: Any
) -> None:
    store = CallingBack()
    with PersistenceChannel(store) as channel:
        channel.follow(epochs[0])
        channel.flush()
        began, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            began.set()
            go_on.wait()

        store.act = hold
        complete(epochs[0])
        began.wait()
        releasing = threading.Timer(0.05, go_on.set)
        releasing.start()
        channel.flush(timeout)
        releasing.join()
        assert stored_seqs(store, epochs[0]) == [1]


@pytest.mark.parametrize("timeout", [float("nan"), numpy.nan, "1", [1]])
def test_a_flush_refuses_what_is_no_number_of_seconds(store: Picky, timeout: Any) -> None:
    refusal = ConfigInvalid if isinstance(timeout, float) else ArgumentInvalid
    with (
        PersistenceChannel(store) as channel,
        pytest.raises(refusal, match=r"timeout is nan|a number of seconds or None as timeout"),
    ):
        channel.flush(timeout)


def test_numpys_numbers_are_settings(store: Picky) -> None:
    delay: Any = numpy.float32(0.5)
    count: Any = numpy.int16(7)
    PersistenceChannel(store, max_delay=delay, max_entries=count).close()
    with pytest.raises(ConfigInvalid, match="max_delay"):
        PersistenceChannel(store, max_delay=delay * numpy.nan)
    with pytest.raises(ConfigInvalid, match="max_entries"):
        PersistenceChannel(store, max_entries=count * 1.5)
