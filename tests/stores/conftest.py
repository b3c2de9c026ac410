"""Every kind of store, for the tests of the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmepoch.stores import InMemoryRuntimeStore, RuntimeStore, SqliteRuntimeStore

Making = Callable[[Path], RuntimeStore]

STORES: dict[str, Making] = {
    "memory": lambda folder: InMemoryRuntimeStore(),
    "sqlite": lambda folder: SqliteRuntimeStore(folder / "store.db", synchronous="normal"),
}


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RuntimeStore]:
    """A fresh store of each kind."""
    made = STORES[request.param](tmp_path)
    yield made
    made.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A path for a store's file."""
    return tmp_path / "store.db"


@pytest.fixture
def sqlite(path: Path) -> Iterator[SqliteRuntimeStore]:
    """A fresh store in an SQLite file."""
    with SqliteRuntimeStore(path, busy_timeout=20.0, synchronous="normal") as store:
        yield store
