"""The store in an SQLite file: one file for any number of sessions, processes and threads."""

from __future__ import annotations

import logging
import operator
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self, TypeAlias, get_args

from shmepoch.epoch.codec import decode_json
from shmepoch.epoch.completions import CompletionEntry, CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.operations import OperationStatus, status_of
from shmepoch.epoch.persisted import PersistedOpsSnapshot, SkippedRange
from shmepoch.errors import (
    ConfigInvalid,
    RecordInvalid,
    StoreConflict,
    StoreLoadFailed,
    StoreReadFailed,
    StoreUnusable,
    StoreWriteFailed,
)
from shmepoch.events import Event, about
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.stores.database import Database
from shmepoch.stores.operations import StoredOperation, assemble, stored_operations, unfinished
from shmepoch.stores.protocol import (
    LAST_SEQ,
    EpochCapture,
    EpochOverview,
    HistoryEntry,
    SessionOverview,
)
from shmepoch.stores.schema import from_sql, to_sql
from shmepoch.timeouts import setting_s

Synchronous: TypeAlias = Literal["full", "normal"]
"""When a save reaches the disk; `SqliteRuntimeStore` describes the promises of each."""

_log = logging.getLogger(__name__)

#: The errors of decoding a damaged row.
_DAMAGE: Final = (ValueError, TypeError, RecursionError)

_PAGE: Final = 1000
_CURSORS: Final = EpochCursorSnapshot.__struct_fields__

_FIND_EPOCH: Final = (
    f"SELECT key, session_id, sealed, {', '.join(_CURSORS)} FROM epochs WHERE epoch_id = ?"
)
_ADD_EPOCH: Final = (
    f"INSERT INTO epochs (epoch_id, session_id, sealed, {', '.join(_CURSORS)}) "
    "VALUES (?, ?, ?, ?, ?, ?)"
)
_CHANGE_EPOCH: Final = (
    f"UPDATE epochs SET sealed = ?, {', '.join(f'{name} = ?' for name in _CURSORS)} WHERE key = ?"
)
_SEAL_CURRENT: Final = "UPDATE epochs SET sealed = 1 WHERE session_id = ? AND sealed = 0"
_FIND_CURRENT: Final = (
    f"SELECT key, epoch_id, {', '.join(_CURSORS)} FROM epochs WHERE session_id = ? AND sealed = 0"
)
# An operation that this capture does not describe may have been stored while it ran.
_ADD_ENTRY: Final = """
    INSERT INTO entries (epoch, seq, operation_id, status, completed_at_ms, entry, operation)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, coalesce(?7,
        (SELECT operation FROM operations WHERE epoch = ?1 AND operation_id = ?3)))
    ON CONFLICT (epoch, seq) DO NOTHING
"""
# As bytes: text that is not valid is then noticed by the decoder, with all other damage.
_FIND_ENTRY: Final = "SELECT CAST(entry AS BLOB) FROM entries WHERE epoch = ? AND seq = ?"
_PUT_OPERATION: Final = """
    INSERT INTO operations (epoch, operation_id, operation) VALUES (?, ?, ?)
    ON CONFLICT (epoch, operation_id) DO UPDATE SET operation = excluded.operation
"""
_PUT_SKIPPED: Final = """
    INSERT INTO skipped (epoch, after_seq, through_seq) VALUES (?, ?, ?)
    ON CONFLICT (epoch, after_seq)
        DO UPDATE SET through_seq = max(through_seq, excluded.through_seq)
"""
_DROP_ENDED: Final = """
    DELETE FROM operations WHERE epoch = ? AND EXISTS (
        SELECT 1 FROM entries
        WHERE entries.epoch = operations.epoch AND entries.operation_id = operations.operation_id)
"""
_NEWEST_ENTRIES: Final = """
    SELECT seq, CAST(entry AS BLOB), operation_id, CAST(operation AS BLOB) FROM entries
    WHERE epoch = ? ORDER BY seq DESC LIMIT ?
"""
_LIVE_OPERATIONS: Final = """
    SELECT operation_id, CAST(operation AS BLOB) FROM operations WHERE epoch = ? ORDER BY number
"""
_KEY_OF: Final = "(SELECT key FROM epochs WHERE epoch_id = ?)"
_LAST_SEQ_OF: Final = f"SELECT max(seq) FROM entries WHERE epoch = {_KEY_OF}"
_ENTRIES_BETWEEN: Final = (
    f"SELECT seq, CAST(entry AS BLOB) FROM entries WHERE epoch = {_KEY_OF} "
    "AND seq > ? AND seq <= ? ORDER BY seq LIMIT ?"
)
_SKIPPED: Final = "SELECT after_seq, through_seq FROM skipped WHERE epoch = ? ORDER BY after_seq"
_SKIPPED_OF: Final = _SKIPPED.replace("?", _KEY_OF)
_EPOCHS_OF: Final = "SELECT key, epoch_id FROM epochs WHERE session_id = ? ORDER BY key"
_SESSIONS: Final = """
    SELECT DISTINCT session_id FROM epochs WHERE session_id > CAST(? AS TEXT) ORDER BY 1 LIMIT ?
"""
# A row for each status of each epoch; one without a status for an epoch without completions.
_OVERVIEW: Final = """
    SELECT key, CAST(epoch_id AS BLOB), sealed,
        (SELECT count(*) FROM operations WHERE operations.epoch = key),
        CAST(status AS BLOB), count(entries.rowid), min(completed_at_ms), max(completed_at_ms)
    FROM epochs LEFT JOIN entries ON entries.epoch = key
    WHERE session_id = ? GROUP BY key, status ORDER BY key
"""
_REMOVE: Final = "DELETE FROM epochs WHERE session_id = ?"


class _Rows(NamedTuple):
    """A capture as rows without the epoch's key, made before the file is locked."""

    capture: EpochCapture
    cursors: tuple[int, ...]
    skipped: list[tuple[int, int]]
    entries: list[tuple[int, bytes, str, int, str, str | None]]
    operations: list[tuple[bytes, str]]


class SqliteRuntimeStore:
    """A `RuntimeStore` in one SQLite file, for any number of sessions, processes and threads.

    The file is created, for this user alone, if it does not exist. It has a write-ahead log: it
    must be on a local file system, and the `-wal` and `-shm` files beside it belong to it while it
    is in use. A call waits up to `busy_timeout` seconds for another process's transaction; infinity
    means no limit. A `read_only` store needs no right to write to the file or its folder, creates
    no files, and refuses an empty file; a call that would change it raises `StoreWriteFailed`.

    `synchronous` says when a save reaches the disk. With either value, the death of a process at
    any moment loses no saved data, and a stop of the machine does not damage the file.

    - "full": before `save` returns. A power loss loses no saved data, as long as the disk really
      has the data that it reports as written.
    - "normal": when the operating system writes it. A power loss or a kernel crash may lose the
      last saves, newest first, and the sequences of these completions may then be used again for
      others. A regular restart loses none. Saves do not wait for the disk.

    A damaged row is never taken for a valid one. `load` fails; `list_entries`, `history` and
    `sessions` leave the row out, count it in `damaged` and log which row it is.

    Raises `StoreUnusable` if the path cannot be a store, and `ConfigInvalid`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        busy_timeout: float = 5.0,
        synchronous: Synchronous = "full",
        read_only: bool = False,
    ) -> None:
        limit = setting_s(busy_timeout, "busy_timeout")
        if busy_timeout is None or busy_timeout < 0:
            raise ConfigInvalid("busy_timeout", busy_timeout, "a number of seconds, 0 or above")
        if synchronous not in get_args(Synchronous):
            raise ConfigInvalid("synchronous", synchronous, "'full' or 'normal'")
        self.path: Final = Path(os.path.abspath(path))
        #: How many damaged rows this object has left out so far.
        self.damaged = 0
        self._database = Database(
            self.path, busy_timeout=limit, synchronous=synchronous, read_only=read_only
        )
        try:
            with self._database.read():
                pass
        except sqlite3.Error as error:
            raise StoreUnusable(self.path, str(error)) from error

    # --- writing ------------------------------------------------------------------------------

    def save(self, captures: Sequence[EpochCapture]) -> None:
        prepared = [_rows(capture) for capture in captures]
        with self._writing() as connection:
            for rows in prepared:
                try:
                    _merge(connection, rows)
                except _DAMAGE as error:
                    reason = f"what is stored of epoch {rows.capture.snapshot.epoch_id} is damaged"
                    raise StoreWriteFailed(f"{self.path}: {reason}: {error}") from error

    def remove(self, session_id: SessionId) -> None:
        with self._writing() as connection:
            connection.execute(_REMOVE, (str(session_id),))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._database.write() as connection:
                yield connection
        except (sqlite3.Error, StoreUnusable) as error:
            raise StoreWriteFailed(self._database.explain(error)) from error

    # --- reading ------------------------------------------------------------------------------

    def load(
        self, session_id: SessionId, *, max_entries: int | None = None
    ) -> PersistedOpsSnapshot | None:
        try:
            with self._database.read() as connection:
                return _load(connection, session_id, _limit(max_entries))
        except (sqlite3.Error, StoreUnusable, *_DAMAGE) as error:
            raise StoreLoadFailed(session_id, self._database.explain(error)) from error

    def last_seq(self, epoch_id: RuntimeEpochId) -> CompletionSeq:
        with self._reading() as connection:
            (kept,) = connection.execute(_LAST_SEQ_OF, (str(epoch_id),)).fetchone()
            return 0 if kept is None else from_sql(kept)

    def list_entries(
        self,
        epoch_id: RuntimeEpochId,
        after_seq: CompletionSeq = 0,
        through_seq: CompletionSeq = LAST_SEQ,
        limit: int | None = None,
    ) -> list[CompletionEntry]:
        bounds = to_sql(after_seq), to_sql(through_seq), _limit(limit)
        with self._reading() as connection:
            rows = connection.execute(_ENTRIES_BETWEEN, (str(epoch_id), *bounds)).fetchall()
        return self._sound(epoch_id, rows)

    def list_skipped(self, epoch_id: RuntimeEpochId) -> list[SkippedRange]:
        with self._reading() as connection:
            return _decode_skipped(connection.execute(_SKIPPED_OF, (str(epoch_id),)))

    def history(
        self,
        session_id: SessionId,
        *,
        statuses: Collection[OperationStatus] | None = None,
        from_ms: int | None = None,
        until_ms: int | None = None,
    ) -> Iterator[HistoryEntry]:
        query, filters = _history_query(statuses, from_ms, until_ms)
        with self._reading() as connection:
            epochs = connection.execute(_EPOCHS_OF, (str(session_id),)).fetchall()
        for key, text in epochs:
            try:
                epoch_id = RuntimeEpochId.parse(text)
            except _DAMAGE as error:
                self._leave_out(f"an epoch of session {session_id}", error, session=session_id)
                continue
            after = to_sql(0)
            while True:
                # A page at a time: a long read transaction would keep the log from being
                # checkpointed.
                with self._reading() as connection:
                    page = connection.execute(query, (key, after, *filters, _PAGE)).fetchall()
                for entry in self._sound(epoch_id, page):
                    yield HistoryEntry(epoch_id, entry)
                if len(page) < _PAGE:
                    break
                after = page[-1][0]

    def sessions(self) -> Iterator[SessionId]:
        after = b""
        while True:
            with self._reading() as connection:
                rows = connection.execute(_SESSIONS, (after, _PAGE))
                page = [text for (text,) in rows]
            for text in page:
                try:
                    yield SessionId.parse(text)
                except _DAMAGE as error:
                    self._leave_out("the name of a session", error)
            if len(page) < _PAGE or not isinstance(page[-1], str):
                break
            after = page[-1].encode(errors="surrogateescape")

    def overview(self) -> Iterator[SessionOverview]:
        for session_id in self.sessions():
            with self._reading() as connection:
                rows = connection.execute(_OVERVIEW, (str(session_id),)).fetchall()
            epochs = (
                self._overview(session_id, list(of)) for _, of in groupby(rows, itemgetter(0))
            )
            yield SessionOverview(
                session_id=session_id, epochs=tuple(epoch for epoch in epochs if epoch is not None)
            )

    def _overview(
        self, session_id: SessionId, rows: Sequence[tuple[Any, ...]]
    ) -> EpochOverview | None:
        """One epoch, of its rows; None if its name is damaged."""
        _, name, sealed, unfinished, *_ = rows[0]
        try:
            epoch_id = RuntimeEpochId.parse(name.decode())
        except _DAMAGE as error:
            self._leave_out(f"an epoch of session {session_id}", error, session=session_id)
            return None
        ended, times = dict[OperationStatus, int](), list[int]()
        for *_, text, count, first_ms, last_ms in rows:
            if count == 0:
                continue
            try:
                ended[OperationStatus(text.decode())] = count
                times += map(operator.index, (first_ms, last_ms))
            except _DAMAGE as error:
                what = f"the status or the time of a completion of epoch {epoch_id}"
                self._leave_out(what, error, session=session_id, epoch=epoch_id)
        return EpochOverview(
            epoch_id=epoch_id,
            sealed=bool(sealed),
            ended=ended,
            unfinished=unfinished,
            first_at_ms=min(times, default=None),
            last_at_ms=max(times, default=None),
        )

    def _sound(
        self, epoch_id: RuntimeEpochId, rows: Sequence[tuple[int, bytes]]
    ) -> list[CompletionEntry]:
        """The completions of these rows, without the damaged ones."""
        try:
            return _decode_entries(rows)
        except _DAMAGE:
            sound = []
            for row in rows:
                try:
                    sound += _decode_entries([row])
                except _DAMAGE as error:
                    seq = row[0] + LAST_SEQ // 2 + 1 if isinstance(row[0], int) else row[0]
                    what = f"completion {seq} of epoch {epoch_id}"
                    self._leave_out(what, error, epoch=epoch_id, seq=seq)
            return sound

    def _leave_out(
        self,
        what: str,
        error: Exception,
        *,
        session: SessionId | None = None,
        epoch: RuntimeEpochId | None = None,
        seq: int | None = None,
    ) -> None:
        self.damaged += 1
        _log.error(
            "%s: %s is damaged and left out: %s",
            self.path,
            what,
            error,
            extra=about(
                Event.ROW_DAMAGED, session=session, epoch=epoch, seq=seq, store=str(self.path)
            ),
        )

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._database.read() as connection:
                yield connection
        except (sqlite3.Error, StoreUnusable, *_DAMAGE) as error:
            raise StoreReadFailed(self._database.explain(error)) from error

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SqliteRuntimeStore({str(self.path)!r})"


def _rows(capture: EpochCapture) -> _Rows:
    """Raises `RecordInvalid` for a capture that cannot be encoded."""
    try:
        return _encode(capture)
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = f"of epoch {capture.snapshot.epoch_id}: {error}"
        raise RecordInvalid("EpochCapture", reason) from error


def _encode(capture: EpochCapture) -> _Rows:
    snapshot = capture.snapshot
    operations = stored_operations(snapshot)
    encoded = {id: stored.to_json().decode() for id, stored in operations.items()}
    return _Rows(
        capture,
        tuple(to_sql(getattr(snapshot.cursors, name)) for name in _CURSORS),
        [(to_sql(after), to_sql(through)) for after, through in snapshot.skipped],
        [
            (
                to_sql(entry.seq),
                entry.operation_id.bytes,
                status_of(entry.terminal_outcome).value,
                entry.completed_at_ms,
                entry.to_json().decode(),
                encoded.get(entry.operation_id),
            )
            for entry in snapshot.entries
        ],
        [(id.bytes, encoded[id]) for id in unfinished(operations)],
    )


def _merge(connection: sqlite3.Connection, rows: _Rows) -> None:
    key = _record_epoch(connection, rows)
    before = connection.total_changes
    connection.executemany(_ADD_ENTRY, ((key, *row) for row in rows.entries))
    if connection.total_changes - before < len(rows.entries):
        _require_same(connection, key, rows.capture.snapshot)
    connection.executemany(_PUT_OPERATION, ((key, *row) for row in rows.operations))
    connection.execute(_DROP_ENDED, (key,))
    connection.executemany(_PUT_SKIPPED, ((key, *row) for row in rows.skipped))


def _record_epoch(connection: sqlite3.Connection, rows: _Rows) -> int:
    """STORE-1, STORE-2: insert or update the epoch's row, with the larger of all cursors; returns
    its key."""
    capture = rows.capture
    epoch_id, session = capture.snapshot.epoch_id, str(capture.session_id)
    found = connection.execute(_FIND_EPOCH, (str(epoch_id),)).fetchone()
    if found is None:
        if not capture.sealed:
            connection.execute(_SEAL_CURRENT, (session,))
        row = (str(epoch_id), session, capture.sealed, *rows.cursors)
        key = connection.execute(_ADD_EPOCH, row).lastrowid
        assert key is not None
        return key
    key, stored_session, *stored = found
    if stored_session != session:
        raise StoreConflict(
            epoch_id, "the session", SessionId.parse(stored_session), capture.session_id
        )
    merged = [max(pair) for pair in zip(stored, (capture.sealed, *rows.cursors), strict=True)]
    if merged != stored:
        connection.execute(_CHANGE_EPOCH, (*merged, key))
    return int(key)


def _require_same(connection: sqlite3.Connection, key: int, snapshot: PersistedOpsSnapshot) -> None:
    """Some of the entries were stored before: raise `StoreConflict` unless they are the same."""
    for entry in snapshot.entries:
        (text,) = connection.execute(_FIND_ENTRY, (key, to_sql(entry.seq))).fetchone()
        stored = CompletionEntry.from_json(text)
        if stored != entry:
            raise StoreConflict(snapshot.epoch_id, f"the completion {entry.seq}", stored, entry)


def _load(
    connection: sqlite3.Connection, session_id: SessionId, limit: int
) -> PersistedOpsSnapshot | None:
    found = connection.execute(_FIND_CURRENT, (str(session_id),)).fetchone()
    if found is None:
        return None
    key, epoch_id, *cursors = found
    rows = connection.execute(_NEWEST_ENTRIES, (key, limit)).fetchall()[::-1]
    live = connection.execute(_LIVE_OPERATIONS, (key,)).fetchall()
    entries = _decode_entries([(seq, entry) for seq, entry, _, _ in rows])
    for entry, (_, _, id, _) in zip(entries, rows, strict=True):
        _require_id(entry.operation_id, id)
    ended = iter(_decode_operations([(id, kept) for _, _, id, kept in rows if kept is not None]))
    return assemble(
        RuntimeEpochId.parse(epoch_id),
        EpochCursorSnapshot(**dict(zip(_CURSORS, map(from_sql, cursors), strict=True))),
        (
            (entry, None if kept is None else next(ended))
            for entry, (_, _, _, kept) in zip(entries, rows, strict=True)
        ),
        _decode_operations(live),
        _decode_skipped(connection.execute(_SKIPPED, (key,))),
    )


def _history_query(
    statuses: Collection[OperationStatus] | None, from_ms: int | None, until_ms: int | None
) -> tuple[str, list[str | int]]:
    conditions, filters = ["epoch = ?", "seq > ?"], list[str | int]()
    if statuses is not None:
        conditions.append(f"status IN ({', '.join('?' * len(statuses))})")
        filters += statuses
    for condition, bound in (("completed_at_ms >= ?", from_ms), ("completed_at_ms < ?", until_ms)):
        if bound is not None:
            conditions.append(condition)
            filters.append(operator.index(bound))
    where = " AND ".join(conditions)
    return (
        f"SELECT seq, CAST(entry AS BLOB) FROM entries WHERE {where} ORDER BY seq LIMIT ?",
        filters,
    )


# One call for all costs a third of one for each.
def _decode_entries(rows: Sequence[tuple[int, bytes]]) -> list[CompletionEntry]:
    """`ValueError` or `TypeError` if a row is damaged."""
    entries = decode_json(list[CompletionEntry], b"[%b]" % b",".join(text for _, text in rows))
    for entry, (seq, _) in zip(entries, rows, strict=True):
        if entry.seq != from_sql(seq):
            raise ValueError(f"the row of completion {from_sql(seq)} is about {entry.seq}")
    return entries


def _decode_operations(rows: Sequence[tuple[bytes, bytes]]) -> list[StoredOperation]:
    """`ValueError` or `TypeError` if a row is damaged."""
    operations = decode_json(
        list[StoredOperation], b"[%b]" % b",".join(operation for _, operation in rows)
    )
    for stored, (id, _) in zip(operations, rows, strict=True):
        _require_id(stored.lifecycle.id, id)
        if stored.spec is not None:
            _require_id(stored.spec.id, id)
    return operations


def _require_id(found: OperationId, id: bytes) -> None:
    if found.bytes != id:
        raise ValueError(f"the row of operation {id!r} is about {found}")


def _decode_skipped(rows: Iterable[tuple[int, int]]) -> list[SkippedRange]:
    return [(from_sql(after), from_sql(through)) for after, through in rows]


def _limit(count: int | None) -> int:
    return -1 if count is None else operator.index(count)
