"""An epoch as a file, and back: what it says, what is refused, and what can be done with it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings
from shmepoch import _native as at
from shmepoch._native import Epoch
from shmepoch.cli.commands import tail
from shmepoch.epoch.completions import CompletionBatch
from shmepoch.epoch.feed import SegmentFeed
from shmepoch.epoch.handle import EpochHandle
from shmepoch.epoch.operations import OperationStatus, Terminated
from shmepoch.errors import (
    RecordInvalid,
    SegmentExists,
    SegmentForeign,
    SessionNotFound,
    SharedMemoryExhausted,
    WitnessMismatch,
)
from shmepoch.ids import RuntimeEpochId
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import ObservedSegment, SharedSegment
from shmepoch.monitoring import EpochState, describe, dumps, summarize
from shmepoch.monitoring.dumps import DumpFacts, DumpInvalid, EpochDump
from tests.epoch.damage import CONFIG, calls, fill, in_a_child, make_calls
from tests.epoch.dying import attached
from tests.epoch.operations import Registry, end, reach, result, spec
from tests.epoch.stepping import Stepped, steps
from tests.processes.children import Channel, start
from tests.support import empty_shared_memory, held_writer, names_in


@pytest.fixture
def elsewhere(namespace: str) -> Iterator[str]:
    """Another namespace, in which epochs are restored."""
    name = f"{namespace}-restored"
    yield name
    empty_shared_memory(name)


def dumped(
    bindings: SessionRuntimeBindings | SharedSegment, folder: Path
) -> tuple[EpochDump, Path]:
    """A dump of an epoch, and the file that has it."""
    segment = bindings if isinstance(bindings, SharedSegment) else bindings.shared_segment()
    dump, memory = dumps.take(segment.namespace, segment.session_id)
    path = folder / "dump"
    with open(path, "wb") as file:
        dumps.write(dump, memory, file)
    return dump, path


class Parts(NamedTuple):
    """A dump taken apart."""

    facts: dict[str, Any]
    memory: bytes

    @classmethod
    def of(cls, path: Path) -> Parts:
        with zipfile.ZipFile(path) as archive:
            return cls(json.loads(archive.read("epoch.json")), archive.read("memory.bin"))

    def put(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("epoch.json", json.dumps(self.facts))
            archive.writestr("memory.bin", self.memory)

    def with_words(self, *words: tuple[int, int]) -> Parts:
        memory = bytearray(self.memory)
        for offset, value in words:
            memory[offset : offset + at.WORD] = value.to_bytes(at.WORD, "little")
        return self._replace(memory=bytes(memory))


def feed_of(namespace: str, session_id: SessionId) -> CompletionBatch:
    segment = ObservedSegment.peek(namespace, session_id)
    try:
        return SegmentFeed(segment).list_since(0)
    finally:
        segment.close()


# --- what a dump is ---------------------------------------------------------------------------


def test_what_a_dump_says(bindings: SessionRuntimeBindings, tmp_path: Path) -> None:
    end(bindings.ops_lifecycle)
    reach(bindings.ops_lifecycle, OperationStatus.RUNNING)
    segment = bindings.shared_segment()
    dump, path = dumped(bindings, tmp_path)
    facts, memory = Parts.of(path)
    assert EpochDump.from_json(json.dumps(facts)) == dump
    assert dump.summary == summarize(segment.namespace, segment.session_id)
    assert (dump.format, dump.layout, dump.moving) == (1, at.VERSION, False)
    assert dump.limits == segment.layout.config
    assert [(one.role, one.pid) for one in dump.participants] == [(Role.RUNTIME, os.getpid())]
    image = bytearray(os.pread(segment.fd, dump.size, 0))
    assert segment.witness in image
    image[at.WITNESS_AT : at.WITNESS_AT + at.ID_SIZE] = bytes(at.ID_SIZE)
    assert memory == image
    assert len(memory) == dump.size == segment.layout.size


def test_nothing_of_the_key_is_in_a_dump(bindings: SessionRuntimeBindings, tmp_path: Path) -> None:
    """Nor of a damaged one that is cut in the middle of it."""
    segment = bindings.shared_segment()
    for size in (at.WITNESS_AT + 12, at.WITNESS_AT + 1, at.WITNESS_AT, 5, 0):
        copy = segment.path.with_name(f"{segment.path.name[:-32]}{SessionId.new().bytes.hex()}")
        copy.write_bytes(os.pread(segment.fd, size, 0))
        copy.chmod(0o600)
        session_id = SessionId.from_bytes(bytes.fromhex(copy.name[-32:]))
        dump, memory = dumps.take(segment.namespace, session_id)
        copy.unlink()
        assert dump.summary.state is EpochState.DAMAGED
        assert memory[at.WITNESS_AT :] == bytes(max(0, size - at.WITNESS_AT))
        assert len(memory) == size


def test_memory_that_never_stands_still(
    bindings: SessionRuntimeBindings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last copy is kept, and marked. If it stands still for two copies, it is not."""
    copy, changes = dumps._copy, [True] * 100_000

    def changing(fd: int, into: bytearray) -> None:
        copy(fd, into)
        if changes and changes.pop():
            end(bindings.ops_lifecycle)

    monkeypatch.setattr(dumps, "_copy", changing)
    monkeypatch.setattr(dumps, "_PATIENCE_S", 0.1)
    dump, _ = dumped(bindings, tmp_path)
    assert dump.moving
    assert 2 <= 100_000 - len(changes) < 100_000
    monkeypatch.setattr(dumps, "_PATIENCE_S", 60)
    changes[:] = [False, True, True]
    dump, _ = dumped(bindings, tmp_path)
    assert not dump.moving


def test_a_file_that_is_cut_short_meanwhile(
    namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = SharedSegment.allocate(
        namespace, CONFIG, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.publish()
    os.chmod(segment.path, 0o644)
    copy = dumps._copy

    def cutting(fd: int, into: bytearray) -> None:
        os.truncate(segment.path, 1000)
        copy(fd, into)

    monkeypatch.setattr(dumps, "_copy", cutting)
    dump, path = dumped(segment, tmp_path)
    found = segment.path.read_bytes()
    segment.unlink()
    segment.close()
    assert (dump.size, dump.moving) == (1000, False)
    assert Parts.of(path).memory[at.ORIGIN_AT :] == found[at.ORIGIN_AT :]


def _hold(bindings: SessionRuntimeBindings, channel: Channel) -> None:
    with held_writer(bindings.shared_segment()):
        channel.say("held")
        channel.hear()


def test_a_writer_that_is_stopped_holds_no_dump_up(
    bindings: SessionRuntimeBindings, tmp_path: Path
) -> None:
    end(bindings.ops_lifecycle)
    with start(_hold, bindings) as writer:
        assert writer.hear() == "held"
        writer.signal(signal.SIGSTOP)
        dump, _ = dumped(bindings, tmp_path)
        writer.kill()
    assert (dump.summary.ended, dump.moving) == (1, False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 100),
        lambda path: os.truncate(path, 0),
        lambda path: os.chmod(path, 0o644),
        lambda path: path.write_bytes(b"x" * 5000),
    ],
)
def test_a_damaged_epoch_is_dumped_as_it_is(
    namespace: str, elsewhere: str, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    segment = SharedSegment.allocate(
        namespace, CONFIG, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.publish()
    damage(segment.path)
    dump, path = dumped(segment, tmp_path)
    found = bytearray(segment.path.read_bytes())
    segment.unlink()
    segment.close()
    assert dump.summary.state is EpochState.DAMAGED
    assert dump.summary.problem
    key = slice(at.WITNESS_AT, at.WITNESS_AT + at.ID_SIZE)
    found[key] = bytes(len(found[key]))
    assert Parts.of(path).memory == found
    if len(found) != CONFIG_SIZE:
        with pytest.raises(DumpInvalid, match=r"bytes|damaged"):
            dumps.restore(path, elsewhere)


CONFIG_SIZE: Final = at.layout(
    CONFIG.max_completed, CONFIG.max_operations, CONFIG.feed_bytes, CONFIG.max_participants
)["size"]


def test_damage_behind_the_header_is_named(namespace: str, elsewhere: str, tmp_path: Path) -> None:
    """And it can be restored, to be looked at."""
    segment = SharedSegment.allocate(
        namespace, CONFIG, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.join(Role.WORKER)
    segment.publish()
    segment.memory.store(at.PARTICIPANTS_AT, 0x1FF)
    dump, path = dumped(segment, tmp_path)
    segment.unlink()
    segment.close()
    assert "participants[0].role" in str(dump.summary.problem)
    assert dump.summary.epoch_id == segment.epoch_id
    dumps.restore(path, elsewhere)
    found = summarize(elsewhere, segment.session_id)
    assert found is not None
    assert "participants[0].role" in str(found.problem)


@pytest.mark.parametrize("offset", [at.CREATED_AT, at.PARTICIPANTS_AT + at.PARTICIPANT_JOINED])
def test_a_time_out_of_range_keeps_no_dump_from_being_restored(
    namespace: str, elsewhere: str, tmp_path: Path, offset: int
) -> None:
    segment = SharedSegment.allocate(
        namespace, CONFIG, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.join(Role.WORKER)
    segment.publish()
    segment.memory.store(offset, 2**64 - 1)
    _, path = dumped(segment, tmp_path)
    segment.unlink()
    segment.close()
    dumps.restore(path, elsewhere)
    looked_at = ObservedSegment.peek(elsewhere, segment.session_id)
    assert looked_at.memory.load(offset) == 2**64 - 1
    looked_at.close()


def test_what_is_no_file_of_this_user(namespace: str, tmp_path: Path) -> None:
    session_id = SessionId.new()
    with pytest.raises(SessionNotFound):
        dumps.take(namespace, session_id)
    path = Path("/dev/shm") / f"shmepoch.{namespace}.{session_id.bytes.hex()}"
    makers: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (path.mkdir, path.rmdir),
        (lambda: os.mkfifo(path), path.unlink),
        (lambda: path.symlink_to(tmp_path / "elsewhere"), path.unlink),
    ]
    for make, remove in makers:
        make()
        with pytest.raises(SegmentForeign):
            dumps.take(namespace, session_id)
        remove()


# --- what comes back --------------------------------------------------------------------------


def test_an_epoch_comes_back_as_it_was(
    bindings: SessionRuntimeBindings, elsewhere: str, tmp_path: Path
) -> None:
    registry = bindings.ops_lifecycle
    for _ in range(3):
        end(registry)
    running = reach(registry, OperationStatus.RUNNING)
    bindings.cursor_state.agent_applied_cursor.advance(2)
    segment = bindings.shared_segment()
    segment.memory.store(at.EVENT_AT, 2**32 + 7)
    segment.memory.store(at.DOORBELLS_AT, 5)
    dump, path = dumped(bindings, tmp_path)
    segment.memory.store(at.DOORBELLS_AT, 0)
    restored = dumps.restore(path, elsewhere)
    assert restored.summary.session_id == bindings.session_id
    assert (restored.size, restored.moving) == (dump.size, False)
    assert names_in(elsewhere) == [f"shmepoch.{elsewhere}.{bindings.session_id.bytes.hex()}"]

    found = summarize(elsewhere, bindings.session_id)
    assert found is not None
    assert (found.state, found.dead, found.participants) == (EpochState.ABANDONED, 1, {})
    same = ("epoch_id", "created_at_ms", "operations", "ended", "cursors", "watermark", "bytes")
    for field in same:
        assert getattr(found, field) == getattr(dump.summary, field)
    assert feed_of(elsewhere, bindings.session_id) == registry.completion_feed().list_since(0)
    looked_at = ObservedSegment.peek(elsewhere, bindings.session_id)
    assert looked_at.memory.load(at.EVENT_AT) == 0
    assert looked_at.memory.load(at.DOORBELLS_AT) == 0
    assert looked_at.witness not in (bytes(at.ID_SIZE), segment.witness)
    looked_at.close()

    # No token from before opens it, nor one that is made of the dump.
    for witness in (segment.witness, bytes(at.ID_SIZE)):
        handle = EpochHandle(
            namespace=elsewhere,
            session_id=bindings.session_id,
            epoch_id=bindings.epoch_id,
            witness=witness,
        )
        with pytest.raises(WitnessMismatch):
            SessionRuntimeBindings.attach(handle)

    # A runtime goes on with it, and ends what those ran that are not here.
    with RuntimeSessionAdapter.ephemeral(namespace=elsewhere) as adapter:
        again = adapter.prepare_bindings(bindings.session_id)
        assert again.epoch_id == bindings.epoch_id
        *before, last = again.ops_lifecycle.completion_feed().list_since(0).entries
        assert [entry.seq for entry in before] == [1, 2, 3]
        assert last.operation_id == running
        assert isinstance(last.terminal_outcome, Terminated)
        end(again.ops_lifecycle)
        assert again.ops_lifecycle.check() == ()
        adapter.unregister_session(bindings.session_id)


def test_a_sealed_epoch_comes_back_sealed(namespace: str, elsewhere: str, tmp_path: Path) -> None:
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        bindings = adapter.prepare_bindings(SessionId.new())
        end(bindings.ops_lifecycle)
        bindings.shared_segment().seal()
        _, path = dumped(bindings, tmp_path)
        adapter.unregister_session(bindings.session_id)
    dumps.restore(path, elsewhere)
    found = summarize(elsewhere, bindings.session_id)
    assert found is not None
    assert (found.state, found.ended) == (EpochState.SEALED, 1)


def test_an_epoch_of_cursors_comes_back(namespace: str, elsewhere: str, tmp_path: Path) -> None:
    segment = SharedSegment.allocate(
        namespace, None, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.publish()
    segment.cell(at.CURSORS_AT).advance(9)
    dump, path = dumped(segment, tmp_path)
    segment.unlink()
    segment.close()
    assert dump.limits is None
    dumps.restore(path, elsewhere)
    found = summarize(elsewhere, segment.session_id)
    assert found is not None
    assert found.cursors.agent_applied_cursor == 9


def test_a_dump_at_any_instruction(namespace: str, elsewhere: str, tmp_path: Path) -> None:
    """A writer is stopped after each instruction of a transition; whatever the dump has of it, the
    next writer of the restored epoch finds the old state or the new one."""
    segment = SharedSegment.allocate(
        namespace, CONFIG, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.publish()
    registry = Registry(segment)
    fill(registry)
    one = spec("the last")
    registry.register_operation(one)
    registry.provisioning_succeeded(one.id)
    before = registry.completion_feed().watermark()

    def stepped(mine: SharedSegment) -> None:
        mine.epoch = cast(Epoch, Stepped(mine.epoch))
        Registry(mine).complete_operation(one.id, result(one.id))

    paths: list[Path] = []
    image = b""
    for _ in steps(attached(namespace, segment, stepped)):
        found = os.pread(segment.fd, segment.layout.size, 0)
        if found != image:
            image = found
            folder = tmp_path / str(len(paths))
            folder.mkdir()
            dump, path = dumped(segment, folder)
            assert not dump.moving
            paths.append(path)
    segment.unlink()
    segment.close()

    committed, broken_off = set(), 0
    with RuntimeSessionAdapter.ephemeral(namespace=elsewhere) as adapter:
        for path in paths:
            intent = Parts.of(path).memory[at.INTENT_AT : at.INTENT_AT + at.WORD]
            broken_off += intent != bytes(at.WORD)
            dumps.restore(path, elsewhere)
            bindings = adapter.prepare_bindings(segment.session_id)
            assert bindings.ops_lifecycle.check() == ()
            entries = bindings.ops_lifecycle.completion_feed().list_since(before).entries
            (entry,) = (entry for entry in entries if entry.operation_id == one.id)
            committed.add(not isinstance(entry.terminal_outcome, Terminated))
            adapter.unregister_session(segment.session_id)
    assert broken_off > 5
    assert committed == {False, True}


# --- what is refused --------------------------------------------------------------------------


@pytest.fixture
def whole(namespace: str, elsewhere: str, tmp_path: Path) -> Path:
    """A dump with something in every part of it; its epoch is gone."""
    segment = SharedSegment.allocate(
        namespace, CONFIG, session_id=SessionId.new(), epoch_id=RuntimeEpochId.new()
    )
    segment.join(Role.WORKER)
    segment.publish()
    fill(Registry(segment))
    _, path = dumped(segment, tmp_path)
    segment.unlink()
    segment.close()
    return path


def test_a_session_that_has_an_epoch(
    bindings: SessionRuntimeBindings, namespace: str, tmp_path: Path
) -> None:
    _, path = dumped(bindings, tmp_path)
    with pytest.raises(SegmentExists):
        dumps.restore(path, namespace)
    assert len(names_in(namespace)) == 1
    assert bindings.shared_segment().named


Edit = Callable[[Parts], Parts]


def _fact(name: str, value: object) -> Edit:
    return lambda parts: parts._replace(facts=parts.facts | {name: value})


def _summary(name: str, value: object) -> Edit:
    return lambda parts: parts._replace(
        facts=parts.facts | {"summary": parts.facts["summary"] | {name: value}}
    )


def _words(*words: tuple[int, int]) -> Edit:
    return lambda parts: parts.with_words(*words)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (_fact("format", 2), "format 2, and this release reads 1"),
        (_fact("format", None), "epoch.json says"),
        (_fact("size", 7), "not 7"),
        (_fact("summary", {}), "epoch.json says"),
        (_fact("moving", 1), "epoch.json says"),
        (_summary("session_id", str(SessionId.new())), "session_id"),
        (_summary("epoch_id", str(RuntimeEpochId.new())), "epoch_id"),
        (_words((at.MAGIC_AT, 0)), "magic"),
        (_words((at.VERSION_AT, 99)), "layout 99"),
        (_words((at.SIZE_AT, at.PAGE)), "size"),
        (_words((at.STATE_AT, at.GONE)), "state"),
        (_words((at.CAPACITIES_AT, 2**40)), "max_completed"),
        (_words((at.CAPACITIES_AT + 16, 2**20)), "max_operations|feed_bytes"),
        (_words((at.CHECKSUM_AT, 1)), "checksum"),
        (lambda parts: parts._replace(memory=parts.memory + bytes(at.PAGE)), "bytes"),
        (lambda parts: parts._replace(memory=parts.memory[: at.PAGE]), "bytes"),
        (lambda parts: parts._replace(memory=b""), "bytes"),
    ],
)
def test_a_dump_that_is_wrong(whole: Path, elsewhere: str, edit: Edit, why: str) -> None:
    edit(Parts.of(whole)).put(whole)
    with pytest.raises(DumpInvalid, match=why):
        dumps.restore(whole, elsewhere)
    assert names_in(elsewhere) == []


@pytest.mark.parametrize("size", [100, 2**16, 2**24])
def test_sizes_that_were_agreed_on_must_be_those_of_the_capacities(
    whole: Path, elsewhere: str, size: int
) -> None:
    """Both files say so, and so does the header; its capacities do not."""
    parts = Parts.of(whole)
    memory = parts.memory[:size] + bytes(max(0, size - len(parts.memory)))
    parts = Parts(parts.facts | {"size": size}, memory).with_words((at.SIZE_AT, size))
    parts.put(whole)
    with pytest.raises(DumpInvalid, match=r"size of its capacities|bytes"):
        dumps.restore(whole, elsewhere)
    assert names_in(elsewhere) == []


def _lie_about_the_size(path: Path, stated: int) -> None:
    """Have the directory and the header of memory.bin say another size than it unpacks to."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        size, local = archive.getinfo("memory.bin").file_size, archive.getinfo("memory.bin")
    directory = data.rindex(b"PK\x01\x02")
    for where in (directory + 24, local.header_offset + 22):
        assert int.from_bytes(data[where : where + 4], "little") == size
        data[where : where + 4] = stated.to_bytes(4, "little")
    path.write_bytes(data)


def test_more_than_is_declared_is_not_unpacked(whole: Path, elsewhere: str) -> None:
    parts = Parts.of(whole)
    size = len(parts.memory)
    parts._replace(memory=parts.memory + bytes(2**26)).put(whole)
    _lie_about_the_size(whole, size)
    with pytest.raises(DumpInvalid):
        dumps.restore(whole, elsewhere)
    assert names_in(elsewhere) == []


def test_less_than_is_declared(whole: Path, elsewhere: str) -> None:
    parts = Parts.of(whole)
    size = len(parts.memory)
    parts._replace(memory=parts.memory[: size // 2]).put(whole)
    _lie_about_the_size(whole, size)
    with pytest.raises(DumpInvalid):
        dumps.restore(whole, elsewhere)
    assert names_in(elsewhere) == []


def test_a_long_description_is_not_read(whole: Path, elsewhere: str) -> None:
    parts = Parts.of(whole)
    parts._replace(facts=parts.facts | {"more": "x" * 2**21}).put(whole)
    with pytest.raises(DumpInvalid, match=r"epoch\.json"):
        dumps.restore(whole, elsewhere)


def test_a_byte_that_was_changed_on_the_way(whole: Path, elsewhere: str) -> None:
    """Its CRC tells. The members are stored, so that they can be unpacked all the same."""
    parts = Parts.of(whole)
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("epoch.json", json.dumps(parts.facts))
        archive.writestr("memory.bin", parts.memory)
    data = bytearray(whole.read_bytes())
    data[data.index(parts.memory) + len(parts.memory) - 1] ^= 1
    whole.write_bytes(data)
    with pytest.raises(DumpInvalid, match="CRC"):
        dumps.restore(whole, elsewhere)
    assert names_in(elsewhere) == []


def test_what_is_no_archive(whole: Path, elsewhere: str, tmp_path: Path) -> None:
    data = whole.read_bytes()
    for wrong in (b"", b"PK", b"x" * 9999, data[:-30], data[: len(data) // 2], data[40:]):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(DumpInvalid):
            dumps.restore(tmp_path / "wrong", elsewhere)
    for name in ("epoch.json", "memory.bin"):
        with zipfile.ZipFile(tmp_path / "wrong", "w") as archive:
            archive.writestr(name, json.dumps(Parts.of(whole).facts))
        with pytest.raises(DumpInvalid, match="it has no"):
            dumps.restore(tmp_path / "wrong", elsewhere)
    with pytest.raises(FileNotFoundError):
        dumps.restore(tmp_path / "missing", elsewhere)
    assert names_in(elsewhere) == []


def test_a_full_shared_memory(whole: Path, elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SharedMemoryExhausted):
        dumps.restore(whole, elsewhere)
    assert names_in(elsewhere) == []


# --- what anybody may have made of it ---------------------------------------------------------

_UNHURRIED: Final = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
_WORDS: Final = st.one_of(
    st.sampled_from((0, 1, 2**16, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)),
    st.integers(0, 2**64 - 1),
)


def _look(namespace: str, session_id: SessionId) -> int:
    """Everything that an operator or a process may do with an epoch."""

    def feed() -> None:
        feed_of(namespace, session_id)

    def show() -> None:
        segment = ObservedSegment.peek(namespace, session_id)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                for show in (tail._show_line, tail._show_json):
                    tail._show_above(tail._before_the_last(segment, 10), segment, show)
                    tail._show_above(0, segment, show)
        finally:
            segment.close()

    def take() -> None:
        dump, memory = dumps.take(namespace, session_id)
        dumps.write(dump, memory, io.BytesIO())
        try:
            DumpFacts.from_json(dump.to_json())
        except RecordInvalid as error:
            raise AssertionError("it could not be restored") from error

    def runtime() -> None:
        with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
            adapter.prepare_bindings(session_id).ops_lifecycle.check()

    looks: list[Callable[[], object]] = [
        lambda: summarize(namespace, session_id),
        lambda: describe(namespace, session_id),
        feed,
        show,
        take,
    ]
    corrupted = make_calls(looks)
    segment = SharedSegment.attach(namespace, session_id)
    try:
        corrupted += make_calls(calls(segment, []))
    finally:
        segment.close()
    return corrupted + make_calls(chain(looks, [runtime]))


@_UNHURRIED
@given(data=st.data())
def test_a_dump_that_holds_anything(whole: Path, elsewhere: str, data: st.DataObject) -> None:
    parts = Parts.of(whole)
    offsets = st.integers(at.ORIGIN_AT // at.WORD, len(parts.memory) // at.WORD - 1)
    control = st.integers(at.ORIGIN_AT // at.WORD, at.PARTICIPANTS_AT // at.WORD + 8)
    words = data.draw(
        st.lists(st.tuples(st.one_of(control, offsets), _WORDS), min_size=1, max_size=6)
    )
    changed = whole.with_name("changed")
    parts.with_words(
        *((8 * word, value) for word, value in words if 8 * word != at.CHECKSUM_AT)
    ).put(changed)
    restored = dumps.restore(changed, elsewhere)
    try:
        in_a_child(lambda: _look(elsewhere, restored.summary.session_id))
    finally:
        empty_shared_memory(elsewhere)


@_UNHURRIED
@given(data=st.data())
def test_a_file_that_holds_anything(whole: Path, elsewhere: str, data: st.DataObject) -> None:
    """It is refused, or it is a dump; nothing else is raised, and nothing is left."""
    changed = bytearray(whole.read_bytes())
    near_an_end = st.one_of(st.integers(0, 200), st.integers(len(changed) - 200, len(changed) - 1))
    for place, value in data.draw(
        st.lists(
            st.tuples(
                st.one_of(near_an_end, st.integers(0, len(changed) - 1)), st.integers(0, 255)
            ),
            min_size=1,
            max_size=4,
        )
    ):
        changed[place] = value
    path = whole.with_name("changed")
    path.write_bytes(changed)
    try:
        dumps.restore(path, elsewhere)
    except DumpInvalid:
        assert names_in(elsewhere) == []
    empty_shared_memory(elsewhere)
