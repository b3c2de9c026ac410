"""`shmepoch restore`: an epoch from a file that `shmepoch dump` made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shmepoch.cli.exits import NOT_CARRIED_OUT, REFUSED, fail, reporting
from shmepoch.cli.options import Namespace
from shmepoch.cli.run.interruptions import on_interruption
from shmepoch.cli.streams import complain
from shmepoch.errors import SegmentExists, SharedMemoryExhausted
from shmepoch.memory.files import require_shm
from shmepoch.memory.namespaces import resolve_namespace
from shmepoch.monitoring import dumps
from shmepoch.monitoring.dumps import DumpInvalid


def restore(
    file: Annotated[Path, typer.Argument(help="A file that 'shmepoch dump' made.")],
    namespace: Namespace = None,
) -> None:
    """Bring an epoch back into shared memory, under the session of the dump.

    No process has it attached then. A runtime may continue it, and every command can read it.

    Examples:

        shmepoch restore case.zip --namespace support

    Exit status: 0, 2 if the file is no dump that can be restored or the session has an epoch, 3 if
    there is no room in shared memory.
    """
    on_interruption(lambda number, _: sys.exit(128 + number))
    with reporting(DumpInvalid, SegmentExists):
        chosen = resolve_namespace(namespace)
        require_shm()
        try:
            restored = dumps.restore(file, chosen)
        except SharedMemoryExhausted as error:  # it is an OSError, too
            fail(NOT_CARRIED_OUT, error)
        except OSError as error:
            fail(REFUSED, error)
        session_id = restored.summary.session_id
        print(f"restored: shmepoch show {session_id} --namespace {chosen}")
        if restored.moving:
            complain("it changed while it was dumped; parts of it may contradict each other")
