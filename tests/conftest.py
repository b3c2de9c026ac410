"""A new namespace for each test, a runtime in it, and a check for leaks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings, _native
from tests.leaks import Held, left_behind

#: How long a process or thread may take to end; threads that listen end within a second.
PATIENCE_S = 10.0

_failed = pytest.StashKey[bool]()


def pytest_configure() -> None:
    """Reset signal handlers that the tests need and their children inherit.

    A shell starts background jobs with SIGINT ignored, and nohup starts them with SIGHUP ignored.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)  # there only where pytest-xdist is
def pytest_xdist_auto_num_workers() -> int:
    """Three for each processor: most of the time the tests wait for other processes."""
    return 3 * len(os.sched_getaffinity(0))


def pytest_report_header() -> list[str]:
    """The facts that the results depend on."""
    maps = Path("/proc/self/maps").read_text()
    sanitizers = [name for name in ("asan", "tsan", "ubsan") if f"/lib{name}." in maps]
    version = importlib.metadata.version("shmepoch")
    native = f"{Path(_native.__file__).name} (sanitizers: {', '.join(sanitizers) or 'none'})"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    cpus = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} CPUs"
    return [
        f"shmepoch {version}, native module {native}",
        f"{python}, {platform.machine()}, {cpus}",
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember for `no_leaks` that a test failed."""
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> str:
    """A namespace no other test uses, for this process and for those it starts."""
    name = f"t-{secrets.token_hex(8)}"
    monkeypatch.setenv("SHMEPOCH_NAMESPACE", name)
    return name


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, namespace: str) -> Iterator[None]:
    """Fail a test that leaves segments, processes, threads or descriptors behind."""
    before = Held.now(namespace)
    yield
    # A failed test may leave things; reporting them would only hide the failure.
    failed = request.node.stash.get(_failed, False)
    left = left_behind(before, namespace, patience=0 if failed else PATIENCE_S)
    description = str(left)  # before there is nothing left to describe
    left.clean_up()
    if left and not failed:
        pytest.fail(f"left behind:\n{description}", pytrace=False)


@pytest.fixture
def adapter(namespace: str) -> Iterator[RuntimeSessionAdapter]:
    """A live runtime."""
    with RuntimeSessionAdapter.ephemeral(namespace=namespace) as adapter:
        yield adapter


@pytest.fixture
def bindings(adapter: RuntimeSessionAdapter) -> Iterator[SessionRuntimeBindings]:
    """Bindings of a session that `adapter` runs. After any end of the test, the epoch is
    consistent."""
    bindings = adapter.prepare_bindings(SessionId.new())
    yield bindings
    bindings.ops_lifecycle.check()
    if adapter.contains_session(bindings.session_id):
        adapter.unregister_session(bindings.session_id)
