"""`shmepoch run`: shell commands as operations of a runtime, agents and workers."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from shmepoch import starting
from shmepoch.cli import streams
from shmepoch.cli.exits import NOT_CARRIED_OUT, REFUSED, fail
from shmepoch.cli.options import seconds
from shmepoch.cli.run import inherited, jobs
from shmepoch.cli.run.command import Options, execute
from shmepoch.cli.run.plan import NothingToResume, RunRefused
from shmepoch.errors import SharedMemoryUnusable, ShmepochError, StoreUnusable
from shmepoch.memory.files import require_shm
from shmepoch.memory.namespaces import resolve_namespace


def run(
    file: Annotated[
        Path, typer.Argument(help="Shell commands, one a line; # begins a comment; - reads stdin.")
    ],
    sessions: Annotated[
        int, typer.Option(min=1, max=1000, help="Epochs that the commands are spread over.")
    ] = 1,
    workers: Annotated[
        int, typer.Option(min=1, max=100, help="Worker processes of each session.")
    ] = 2,
    transcript: Annotated[
        Path | None,
        typer.Option(help="Folder for what each session's agent was told, as JSON lines."),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a command whose worker died is run again.")
    ] = 0,
    store: Annotated[
        Path | None,
        typer.Option(
            help="SQLite file to keep the run in, so that it can be resumed; "
            "shmepoch history reads it."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Carry on with the unfinished run in --store, given the same commands and "
            "sessions: what completed or failed is not run again.",
        ),
    ] = False,
    kill_every: Annotated[
        float | None,
        typer.Option(
            callback=seconds(0.01, 3600),
            help="Kill a random agent or worker every so many seconds, 0.01 at least.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the choice whom to kill; random if not given.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print a summary as JSON; events go to stderr.")
    ] = False,
) -> None:
    """Run shell commands as background operations of real processes, and tell an agent of each.

    With --store, a run that was interrupted or killed, by a reboot too, can be carried on with:
    run it again with --resume. Without --resume a store with an unfinished run is refused.

    Ctrl-C ends the run in good order and says what was not run; a second one kills what still runs.

    What a command leaves in the background goes on until the run ends, and is ended with it; if its
    worker is killed, or a command of its worker is cancelled, with that.

    Exit status: 0 if every command completed; 1 if one did not; 2 if nothing was run because of an
    option, the file, or a store that does not go with them; 3 if the run could not be carried out,
    for want of shared memory, of a process or of a store that works; 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP, 141 if the reader of its output has left.
    """
    if resume and store is None:
        raise typer.BadParameter(
            "needs --store, the file that the run is in", param_hint="--resume"
        )
    inherited.set_for_run()
    options = Options(
        sessions=sessions,
        workers=workers,
        transcript=transcript,
        retries=retries,
        store=store,
        resume=resume,
        kill_every=kill_every,
        seed=seed,
        json=json,
    )
    with contextlib.ExitStack() as undo:
        try:
            commands = jobs.read(file)
            resolve_namespace(None)
            if resume and store is not None and not _has_content(store):
                raise NothingToResume
            if transcript is not None:
                undo.enter_context(_folder(transcript))
            require_shm()
        except SharedMemoryUnusable as error:
            fail(NOT_CARRIED_OUT, error)
        except (ShmepochError, OSError) as error:
            fail(REFUSED, error)
        try:
            starting.raise_on_interrupt()
            status = execute(commands, options)
        except BrokenPipeError:
            streams.reader_left()
        except (RunRefused, StoreUnusable) as error:
            fail(REFUSED, error)
        # A RuntimeError or MemoryError where there is no thread or no memory to be had.
        except (ShmepochError, OSError, RuntimeError, MemoryError) as error:
            fail(NOT_CARRIED_OUT, error)
        except Exception:  # a fault of this program's: not the status of a command that failed
            traceback.print_exc()
            sys.exit(NOT_CARRIED_OUT)
        finally:
            starting.end_on_interrupt()
    sys.exit(status)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder and those it lies in; what fails takes those away that are still empty."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for one in missing:
            with contextlib.suppress(OSError):
                one.rmdir()
        raise


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
