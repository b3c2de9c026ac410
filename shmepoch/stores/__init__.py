"""Stores, in which an epoch survives a reboot: SQLite by default, memory for tests."""

from shmepoch.stores.memory import InMemoryRuntimeStore
from shmepoch.stores.protocol import (
    EpochCapture,
    HistoryEntry,
    RuntimeStore,
)
from shmepoch.stores.sqlite import SqliteRuntimeStore, Synchronous

__all__ = [
    "EpochCapture",
    "HistoryEntry",
    "InMemoryRuntimeStore",
    "RuntimeStore",
    "SqliteRuntimeStore",
    "Synchronous",
]
