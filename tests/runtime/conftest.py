"""A live runtime, and bindings of a session that it runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings


@pytest.fixture
def adapter(namespace: str) -> Iterator[RuntimeSessionAdapter]:
    """A live runtime."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        yield adapter


@pytest.fixture
def bindings(adapter: RuntimeSessionAdapter) -> Iterator[SessionRuntimeBindings]:
    """Bindings of a session that `adapter` runs. However the test ends, the epoch is consistent."""
    bindings = adapter.prepare_bindings(SessionId.new())
    yield bindings
    bindings.ops_lifecycle.check()
    if adapter.contains_session(bindings.session_id):
        adapter.unregister_session(bindings.session_id)
