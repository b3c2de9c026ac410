"""The servers of contestants: some are missing, and none is left running."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench import servers
from bench.servers import ServerMissing
from tests.bench.leftovers import children


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all programs of the system."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(servers, "ELSEWHERE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("start", "program"), [(servers.redis, "redis-server"), (servers.nats, "nats-server")]
)
def test_a_server_that_is_not_installed_is_missing(
    start: Callable[[ExitStack], int], program: str, programs: Path
) -> None:
    with ExitStack() as stack, pytest.raises(ServerMissing, match=f"{program} is not installed"):
        start(stack)


def test_a_server_that_ends_at_once_is_missing(programs: Path) -> None:
    pretender = programs / "redis-server"
    pretender.write_text("#!/bin/sh\nexit 3\n")
    pretender.chmod(0o755)

    with ExitStack() as stack, pytest.raises(ServerMissing, match="ended with 3"):
        servers.redis(stack)


def test_a_server_listens_until_its_stack_ends(programs: Path) -> None:
    pretender = programs / "redis-server"
    pretender.write_text(
        f"#!{sys.executable}\n"
        "import socket, sys, signal\n"
        "with socket.create_server(('127.0.0.1', int(sys.argv[2]))):\n"
        "    signal.pause()\n"
    )
    pretender.chmod(0o755)
    before = children()

    with ExitStack() as stack:
        port = servers.redis(stack)
        with socket.create_connection(("127.0.0.1", port)):
            pass

    assert children() <= before
