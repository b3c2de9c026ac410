"""The process that serves a namespace's metrics."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess

import pytest

from shmepoch import RuntimeSessionAdapter, SessionId, SessionRuntimeBindings
from tests.cli.running import COMMAND, DEADLINE_S
from tests.cli.serving import scrape, serving, url_of, value
from tests.runtime.completions import TOOL, end
from tests.support import eventually


def test_it_serves_what_happens(bindings: SessionRuntimeBindings, namespace: str) -> None:
    with serving() as process:
        url = url_of(process)
        assert value(url, "epochs", namespace=namespace, state="open") == 1
        end(bindings, TOOL, TOOL)
        assert value(url, "completions_total", namespace=namespace) == 2
        bindings.cursor_state.agent_applied_cursor.advance(2)
        assert value(url, "applied_seconds_count", namespace=namespace) == 2
        names = {name for name, _ in scrape(url)}
        assert all(name.startswith("shmepoch_") for name in names)
        assert not [name for name in names if name.endswith("_created")]


def test_it_polls_between_scrapes(adapter: RuntimeSessionAdapter, namespace: str) -> None:
    with serving() as process:
        url = url_of(process)
        maps = f"/proc/{process.pid}/maps"
        for count in (1, 2, 3):
            bindings = adapter.prepare_bindings(SessionId.new())
            name = bindings.shared_segment().name
            eventually(lambda name=name: name in open(maps).read())  # type: ignore[misc]  # noqa: SIM115
            end(bindings, TOOL)
            adapter.unregister_session(bindings.session_id)
            assert value(url, "completions_total", namespace=namespace) == count


def test_one_namespace_or_all_of_them(
    adapter: RuntimeSessionAdapter, bindings: SessionRuntimeBindings, namespace: str
) -> None:
    of_this = {"namespace": namespace, "state": "open"}
    with serving("--namespace", f"{namespace}-none") as process:
        url = url_of(process)
        assert value(url, "epochs", **of_this) is None
        assert value(url, "epochs", namespace=f"{namespace}-none", state="open") == 0
    with serving("-A", "--by-session") as process:
        session = str(bindings.session_id)
        assert value(url_of(process), "epochs", session=session, **of_this) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_ends_in_good_order(namespace: str, number: signal.Signals) -> None:
    with serving() as process:
        url_of(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out, err) == (0, "", "")


def test_nohup_is_respected(namespace: str) -> None:
    with serving(before=("nohup",)) as process:
        assert process.stderr is not None
        url = url_of(process)
        process.send_signal(signal.SIGHUP)
        assert value(url, "epochs", namespace=namespace, state="open") == 0
        process.terminate()
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0


def test_without_descriptors_it_says_so_and_goes_on(
    bindings: SessionRuntimeBindings, namespace: str
) -> None:
    with serving() as process:
        url = url_of(process)
        limit = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, limit[1]))
        assert process.stderr is not None
        said = process.stderr.readline()
        # The file that it was about to open is named, or the folder.
        assert said.startswith("shmepoch: epochs are not looked at: ")
        assert said.endswith("Too many open files\n")
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limit)
        assert value(url, "epochs", namespace=namespace, state="open") == 1
        process.terminate()
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert "Traceback" not in err


def refused(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, "metrics", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_port_that_is_taken_is_named(namespace: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, err = refused("--port", str(port))
    assert status == 3
    assert f"port {port} of 127.0.0.1 cannot be used: Address already in use" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--address", "no.such.host.invalid", "--port", "0"), "no.such.host.invalid"),
        (("--port", "65536"), "65535"),
        (("-n", "two words"), "two words"),
        (("-n", "one", "-A"), "--all-namespaces"),
    ],
)
def test_what_is_refused(namespace: str, arguments: tuple[str, ...], named: str) -> None:
    status, err = refused(*arguments)
    assert status == 2
    assert named in err
    assert "Traceback" not in err


def test_without_its_extra_it_says_what_to_install(namespace: str) -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None; sys.argv = ['shmepoch', 'metrics']\n"
        "from shmepoch.cli import main; main()"
    )
    done = subprocess.run([COMMAND[0], "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == (
        "shmepoch: this command needs the extra 'metrics': pip install 'shmepoch[metrics]'\n"
    )
