"""Stores, in which an epoch survives a reboot: SQLite by default, memory for tests."""

from shmepoch.stores.memory import InMemoryRuntimeStore
from shmepoch.stores.protocol import (
    EpochCapture,
    EpochOverview,
    HistoryEntry,
    RuntimeStore,
    SessionOverview,
)
from shmepoch.stores.sqlite import SqliteRuntimeStore, Synchronous

__all__ = [
    "EpochCapture",
    "EpochOverview",
    "HistoryEntry",
    "InMemoryRuntimeStore",
    "RuntimeStore",
    "SessionOverview",
    "SqliteRuntimeStore",
    "Synchronous",
]
