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
from shmepoch.cli.options import Namespace, seconds
from shmepoch.cli.run import inherited, jobs
from shmepoch.cli.run.plan import NothingToResume, RunRefused
from shmepoch.errors import SharedMemoryUnusable, ShmepochError, StoreUnusable
from shmepoch.memory.files import require_shm
from shmepoch.memory.namespaces import resolve_namespace


def run(
    file: Annotated[
        Path, typer.Argument(help="Shell commands, one a line; # begins a comment; - reads stdin.")
    ],
    namespace: Namespace = None,
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
            help="Continue the unfinished run in --store, given the same commands and "
            "sessions: commands that completed or failed are not run again.",
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

    With --store, a run that was interrupted or killed, also by a reboot, can be continued: run it
    again with --resume. Without --resume a store with an unfinished run is refused.

    Ctrl-C ends the run regularly and reports the commands that did not run. A second Ctrl-C kills
    those that still run.

    A process that a command leaves in the background is killed when the run ends, or earlier if its
    worker is killed or a command of its worker is cancelled.

    Examples:

        shmepoch run jobs.txt --sessions 2 --workers 4 --transcript told/
        shmepoch run jobs.txt --store run.db
        shmepoch run jobs.txt --store run.db --resume
        shmepoch run - --json <jobs.txt

    Exit status: 0 if every command completed; 1 if one did not; 2 if nothing was run because of an
    option, the file, or a store that does not match them; 3 if the run could not be carried out,
    without shared memory, a process or a working store; 130 after Ctrl-C, 143 after SIGTERM, 129
    after SIGHUP, 141 if the reader of its output has left.
    """
    from shmepoch.cli.run.command import Options, execute  # no other command needs it

    if resume and store is None:
        raise typer.BadParameter(
            "needs --store, the file that the run is in", param_hint="--resume"
        )
    inherited.set_for_run()
    options = Options(
        namespace=namespace,
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
            resolve_namespace(namespace)
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
        # A RuntimeError or MemoryError if no thread can be started or there is no memory.
        except (ShmepochError, OSError, RuntimeError, MemoryError) as error:
            fail(NOT_CARRIED_OUT, error)
        except Exception:  # a fault of this program; not the status of a command that failed
            traceback.print_exc()
            sys.exit(NOT_CARRIED_OUT)
        finally:
            starting.end_on_interrupt()
    sys.exit(status)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder and its parents; after an error, remove the new ones that are still empty."""
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
