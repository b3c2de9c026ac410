"""`shmepoch metrics`: serves metrics of epochs to Prometheus, from a process of its own."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shmepoch.cli.exits import needing_extra, reporting
from shmepoch.cli.options import AllNamespaces, Namespace, chosen_namespace
from shmepoch.cli.run.interruptions import End
from shmepoch.cli.streams import complain, said
from shmepoch.errors import ShmepochError
from shmepoch.memory.files import require_shm

if TYPE_CHECKING:
    from shmepoch.monitoring.metrics import EpochCollector

#: The time between two polls. It limits how exact the latency of applied completions is.
_POLL_S: Final = 0.25


def metrics(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to serve on; 0 for any that is free.")
    ] = 9464,
    address: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    namespace: Namespace = None,
    all_namespaces: AllNamespaces = False,
    by_session: Annotated[
        bool, typer.Option("--by-session", help="A series for each session, besides its namespace.")
    ] = False,
) -> None:
    """Serve the metrics of epochs to Prometheus, until Ctrl-C, SIGTERM or SIGHUP.

    It takes no lock and changes nothing. Standard error shows the address once it serves.

    Examples:

        shmepoch metrics --namespace prod
        shmepoch metrics --all-namespaces --port 9465 --by-session

    Exit status: 0, 2 for a bad namespace or address, 3 if the port is taken or there is no shared
    memory.
    """
    with reporting():
        chosen = chosen_namespace(namespace, all_namespaces)
        require_shm()
        with needing_extra("metrics", "prometheus_client"):
            from shmepoch.monitoring.metrics import EpochCollector
        end = End()
        collector = EpochCollector(chosen, by_session=by_session)
        with _serving(collector, address, port) as url:
            print(f"shmepoch: serving {url}", file=sys.stderr, flush=True)
            _poll(collector, end)


def _poll(collector: EpochCollector, end: End) -> None:
    """Poll the epochs until the end is requested."""
    told = ""
    while True:
        try:
            collector.poll()
            told = ""
        except OSError as error:  # it may be temporary; until then scrapes fail, too
            if str(error) != told:
                told = str(error)
                complain(f"epochs are not looked at: {said(error)}")
        if end.asked_for_within(_POLL_S):
            return


class PortUnusable(ShmepochError):
    """The metrics cannot be served on this port."""

    address: str
    port: int
    reason: str
    message = """port {port} of {address} cannot be used: {reason}; choose another with --port, or
    --port 0 for any that is free"""


@contextmanager
def _serving(collector: EpochCollector, address: str, port: int) -> Iterator[str]:
    """Serve the collector alone; the address that Prometheus is given. Raises `PortUnusable`."""
    from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

    # They would be a second series for each counter, which nothing here needs.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, address, registry)
    except socket.gaierror as error:
        raise typer.BadParameter(f"{address}: {error.strerror}", param_hint="--address") from None
    except OSError as error:
        raise PortUnusable(address, port, error.strerror or str(error)) from error
    try:
        host = f"[{address}]" if ":" in address else address
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
