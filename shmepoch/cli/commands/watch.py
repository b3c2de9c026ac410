"""`shmepoch watch`: a live view of epochs in a terminal."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from shmepoch.cli.exits import needing_extra, reporting
from shmepoch.cli.options import AllNamespaces, Namespace, chosen_namespace, seconds
from shmepoch.errors import ShmepochError
from shmepoch.memory.files import require_shm


class NoTerminal(ShmepochError):
    """There is no terminal to show a live view in."""

    reason: str
    message = """{reason}, and a live view needs a terminal; shmepoch ls prints the epochs"""


def watch(
    namespace: Namespace = None,
    all_namespaces: AllNamespaces = False,
    interval: Annotated[
        float,
        typer.Option(callback=seconds(0.1, 3600), help="Seconds from one look to the next."),
    ] = 1.0,
) -> None:
    """Show epochs, or one epoch in detail, as they change; ? shows the keys.

    It takes no lock and changes nothing.

    Examples:

        shmepoch watch
        shmepoch watch --all-namespaces --interval 5

    Exit status: 0 after q, 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP; 2 without a terminal or for a bad namespace; 3 without the extra or
    if there is no shared memory.
    """
    with reporting(NoTerminal):
        chosen = chosen_namespace(namespace, all_namespaces)
        _require_terminal()
        require_shm()
        with needing_extra("watch", "textual"):
            from shmepoch.cli.watch.app import watch
        status = watch(chosen, interval)
    sys.exit(status)


def _require_terminal() -> None:
    # textual writes to standard error, so all three streams have to be a terminal.
    for name, stream in (("input", sys.stdin), ("output", sys.stdout), ("error", sys.stderr)):
        if not stream.isatty():
            raise NoTerminal(f"standard {name} is not a terminal")
    term = os.environ.get("TERM", "")
    if term in ("", "dumb", "unknown"):
        raise NoTerminal(f"the terminal cannot move its cursor (TERM={term})")
