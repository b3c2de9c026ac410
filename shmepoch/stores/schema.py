"""The schema of a store's SQLite file, and the migrations from earlier releases.

SQLite's integers are signed. A u64 position is stored as the integer 2**63 below it, which sorts in
the same order. The view `history` shows the real sequences.
"""

from __future__ import annotations

import operator
import sqlite3
from typing import Final

#: "shme": tells a store from another program's database.
APPLICATION_ID: Final = int.from_bytes(b"shme", "big")

_BIAS: Final = 2**63


def to_sql(position: int) -> int:
    """A u64 position in its stored form."""
    return operator.index(position) - _BIAS


def from_sql(kept: int) -> int:
    """The u64 position from its stored form; `ValueError` if it is not a position."""
    if type(kept) is not int:
        raise ValueError(f"a position is kept as {kept!r}")
    return kept + _BIAS


#: Each migrates the file from one version of the schema to the next; the first from an empty file.
#: A released migration is never changed.
MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        # `key` grows in the order in which a session's epochs were first recorded.
        """
        CREATE TABLE epochs (
            key INTEGER PRIMARY KEY,
            epoch_id TEXT NOT NULL UNIQUE,
            session_id TEXT NOT NULL,
            sealed INTEGER NOT NULL,
            agent_applied_cursor INTEGER NOT NULL,
            runtime_observed_seq INTEGER NOT NULL,
            runtime_last_injected_seq INTEGER NOT NULL
        )
        """,
        "CREATE INDEX epochs_of_session ON epochs (session_id)",
        "CREATE UNIQUE INDEX current_epoch ON epochs (session_id) WHERE sealed = 0",
        # With rowids: rows of a few kilobytes fill the leaves of such a table, where a table
        # WITHOUT ROWID would move most of each to overflow pages (twice the file, half the speed).
        """
        CREATE TABLE entries (
            epoch INTEGER NOT NULL REFERENCES epochs ON DELETE CASCADE,
            seq INTEGER NOT NULL,
            operation_id BLOB NOT NULL,
            status TEXT NOT NULL,
            completed_at_ms INTEGER NOT NULL,
            entry TEXT NOT NULL,
            operation TEXT,
            UNIQUE (epoch, seq)
        )
        """,
        "CREATE INDEX entry_of_operation ON entries (epoch, operation_id)",
        # The sequences that recoveries skipped. A recovery that starts at the same place as an
        # earlier one skips more.
        """
        CREATE TABLE skipped (
            epoch INTEGER NOT NULL REFERENCES epochs ON DELETE CASCADE,
            after_seq INTEGER NOT NULL,
            through_seq INTEGER NOT NULL,
            PRIMARY KEY (epoch, after_seq)
        ) WITHOUT ROWID
        """,
        # Operations that have not ended. `number` grows in the order of their registration.
        """
        CREATE TABLE operations (
            number INTEGER PRIMARY KEY,
            epoch INTEGER NOT NULL REFERENCES epochs ON DELETE CASCADE,
            operation_id BLOB NOT NULL,
            operation TEXT NOT NULL,
            UNIQUE (epoch, operation_id)
        )
        """,
        """
        CREATE VIEW history AS
            SELECT session_id, epoch_id, seq + 9223372036854775807 + 1 AS seq, status,
                datetime(completed_at_ms / 1000, 'unixepoch') AS completed_at, entry
            FROM entries JOIN epochs ON epochs.key = entries.epoch
            ORDER BY entries.epoch, entries.seq
        """,
    ),
)


class SchemaUnsupported(Exception):
    """The file is no store, or a store of a later release."""


def is_current(connection: sqlite3.Connection) -> bool:
    """Whether the file has this release's schema. Raises `SchemaUnsupported` if it cannot get
    it."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application or version or objects:
            raise SchemaUnsupported("it is another program's SQLite database")
    elif version > len(MIGRATIONS):
        raise SchemaUnsupported(
            f"its schema has version {version} and this release knows versions up to "
            f"{len(MIGRATIONS)}; use the release of shmepoch that wrote it, or a later one"
        )
    return bool(version == len(MIGRATIONS))


def migrate(connection: sqlite3.Connection) -> None:
    """Give the file this release's schema, in the transaction that the caller has begun.

    If another process was faster, it does nothing.
    """
    if is_current(connection):
        return
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for migration in MIGRATIONS[version:]:
        for statement in migration:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
