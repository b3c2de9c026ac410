"""`shmepoch dump`: one epoch as a file."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated

import typer

from shmepoch.cli.exits import NOT_CARRIED_OUT, fail, reporting
from shmepoch.cli.options import AllNamespaces, Epoch, Namespace, chosen_namespace
from shmepoch.cli.run.interruptions import on_interruption
from shmepoch.cli.streams import complain
from shmepoch.errors import SegmentForeign, ShmepochError
from shmepoch.monitoring import dumps
from shmepoch.monitoring.selection import select

_STDOUT = Path("-")


class TargetRefused(ShmepochError):
    """A dump cannot be written there."""

    path: Path
    reason: str
    message = "no dump was written to {path}: {reason}"


def dump(
    epoch: Epoch,
    file: Annotated[Path, typer.Argument(help="The file to make; '-' is standard output.")],
    namespace: Namespace = None,
    all_namespaces: AllNamespaces = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file if it is there.")
    ] = False,
) -> None:
    """Copy an epoch to a file: a zip archive with its facts and its memory.

    The file has contents: the names of operations, and their outcomes. It lets no process attach.
    No lock is taken, and nothing changes.

    Examples:

        shmepoch dump 01a2149c case.zip
        shmepoch dump 01a2149c - | ssh elsewhere 'cat > case.zip'

    Exit status: 0, 2 if there is no such epoch or the file is there already, 3 if it cannot be
    written.
    """
    on_interruption(lambda number, _: sys.exit(128 + number))
    with reporting(TargetRefused, SegmentForeign):
        found, session_id = select(epoch, chosen_namespace(namespace, all_namespaces))
        _require_target(file, force)
        try:
            taken, memory = dumps.take(found, session_id)
            if file == _STDOUT:
                dumps.write(taken, memory, sys.stdout.buffer)
            else:
                with _new_file(file, replace=force) as opened:
                    dumps.write(taken, memory, opened)
        except FileExistsError:
            raise TargetRefused(file, "it is there already; --force replaces it") from None
        except BrokenPipeError:
            raise
        except OSError as error:
            fail(NOT_CARRIED_OUT, error)
        except MemoryError:  # it has no text
            fail(NOT_CARRIED_OUT, MemoryError("there is no memory for a copy of the epoch"))
        if taken.summary.problem is not None:
            complain(f"the epoch is damaged: {taken.summary.problem}")
        if taken.moving:
            complain("the epoch changed all the time; parts of the dump may contradict each other")


def _require_target(path: Path, force: bool) -> None:
    if path == _STDOUT:
        if sys.stdout.isatty():
            raise TargetRefused(path, "it is a terminal; send it to a file")
    elif os.path.lexists(path):
        if not force:
            raise TargetRefused(path, "it is there already; --force replaces it")
        if not path.is_file():
            raise TargetRefused(path, "it is no regular file")
    elif not path.parent.is_dir():
        raise TargetRefused(path, f"there is no folder {path.parent}")


@contextlib.contextmanager
def _new_file(path: Path, *, replace: bool) -> Iterator[IO[bytes]]:
    """A file for this user. It takes its name once it is whole; if it fails, nothing is left.

    Raises `FileExistsError` if the name is taken and not to be replaced.
    """
    fd, made = tempfile.mkstemp(prefix=".shmepoch-", suffix=".dump", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
        if replace:
            os.replace(made, path)
        else:
            os.link(made, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)
