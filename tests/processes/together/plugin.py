"""The epoch of a test run: its controller is the runtime, and each of its workers attaches."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from shmepoch import OpsLifecycleConfig, RuntimeSessionAdapter, SessionRuntimeBindings

#: The run keeps every completion, so that its last look finds all of them.
CONFIG = OpsLifecycleConfig(
    max_operations=512, max_completed=4096, feed_bytes=4 * 1024 * 1024, max_participants=64
)


class Controller:
    """The process that started the workers: the epoch's runtime."""

    def __init__(self) -> None:
        self.adapter = RuntimeSessionAdapter.ephemeral(config=CONFIG)
        self.bindings: SessionRuntimeBindings | None = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        run_id = uuid.uuid5(uuid.NAMESPACE_OID, node.workerinput["testrunuid"])
        self.bindings = self.adapter.prepare_bindings(run_id)
        node.workerinput["bindings"] = self.bindings.to_token()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """The last check, after every worker has left."""
        assert self.bindings is not None
        registry = self.bindings.ops_lifecycle
        try:
            registry.check()
            entries = registry.completion_feed().list_since(0).entries
            assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
            assert len({entry.operation_id for entry in entries}) == len(entries)
            assert registry.active_count() == 0, registry.list_operations()
            print(f"\n{len(entries)} operations ended, each once")
        except BaseException:
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
            raise
        finally:
            self.adapter.unregister_session(self.bindings.session_id)
            self.adapter.close()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Controller())


@pytest.fixture(scope="session")
def bindings(request: pytest.FixtureRequest) -> Iterator[SessionRuntimeBindings]:
    """This worker's bindings of the run's epoch."""
    with SessionRuntimeBindings.from_token(request.config.workerinput["bindings"]) as bindings:  # type: ignore[attr-defined]
        yield bindings


@pytest.fixture(scope="session")
def workers(request: pytest.FixtureRequest) -> int:
    """How many workers the run has."""
    count: int = request.config.workerinput["workercount"]  # type: ignore[attr-defined]
    return count


@pytest.fixture(scope="session")
def number(request: pytest.FixtureRequest) -> int:
    """Which of the workers this is, from 0 on."""
    name: str = request.config.workerinput["workerid"]  # type: ignore[attr-defined]
    return int(name.removeprefix("gw"))
