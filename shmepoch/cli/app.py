"""The commands and their options."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from shmepoch import starting
from shmepoch.cli import streams
from shmepoch.cli.run import inherited, jobs
from shmepoch.cli.run.command import Options, execute
from shmepoch.cli.run.plan import NothingToResume, RunRefused
from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import (
    NamespaceInvalid,
    SharedMemoryUnusable,
    ShmepochError,
    StoreUnusable,
)
from shmepoch.ids import SessionId
from shmepoch.memory.files import require_shm
from shmepoch.memory.namespaces import resolve_namespace
from shmepoch.runtime.persistence import MOST_DELAY_S

RUN_ERROR: Final = 1
USAGE_ERROR: Final = 2
NOT_CARRIED_OUT: Final = 3


def _seconds(least: float, most: float) -> Callable[[float | None], float | None]:
    """Refuses what is outside the bounds; typer's own let NaN pass, in some versions."""

    def check(value: float | None) -> float | None:
        if value is None or least <= value <= most:
            return value
        raise typer.BadParameter(f"{value} is not a number of seconds from {least:g} to {most:g}")

    return check


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def shmepoch() -> None:
    """One runtime epoch, shared by the processes of an agent deployment."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("shmepoch: %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler])


@app.command()
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
            callback=_seconds(0.01, 3600),
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
            _fail(NOT_CARRIED_OUT, error)
        except (ShmepochError, OSError) as error:
            _fail(USAGE_ERROR, error)
        try:
            starting.raise_on_interrupt()
            status = execute(commands, options)
        except BrokenPipeError:
            streams.reader_left()
        except (RunRefused, StoreUnusable) as error:
            _fail(USAGE_ERROR, error)
        # A RuntimeError or MemoryError where there is no thread or no memory to be had.
        except (ShmepochError, OSError, RuntimeError, MemoryError) as error:
            _fail(NOT_CARRIED_OUT, error)
        except Exception:  # a fault of this program's: not the status of a command that failed
            traceback.print_exc()
            sys.exit(NOT_CARRIED_OUT)
        finally:
            starting.end_on_interrupt()
    sys.exit(status)


@app.command()
def persist(
    store: Annotated[Path, typer.Option(help="SQLite file that the epochs are kept in.")],
    namespace: Annotated[
        str | None, typer.Option(help="Whose epochs; SHMEPOCH_NAMESPACE, else default.")
    ] = None,
    max_delay: Annotated[
        float,
        typer.Option(
            callback=_seconds(0, MOST_DELAY_S),
            help="Seconds within which a completion is durable.",
        ),
    ] = 0.05,
) -> None:
    """Keep every epoch of a namespace in a store, until Ctrl-C, SIGTERM or SIGHUP.

    It then waits until everything is stored. Exit status: 0 if it is, 1 if the store did not take
    it within 10 seconds or there is no shared memory to look at, 2 for a bad namespace or file. A
    second Ctrl-C does not wait; what the store lacks is in shared memory.
    """
    from shmepoch.cli import persist as command

    try:
        command.persist(store, namespace, max_delay)
    except (NamespaceInvalid, StoreUnusable) as error:
        _fail(USAGE_ERROR, error)
    except (ShmepochError, OSError) as error:
        _fail(RUN_ERROR, error)


@app.command()
def history(
    store: Annotated[Path, typer.Option(help="SQLite file that the epochs are kept in.")],
    session: Annotated[
        str | None, typer.Argument(help="The session's id; without one, every session is listed.")
    ] = None,
    status: Annotated[
        list[OperationStatus] | None, typer.Option(help="Only these; may be given several times.")
    ] = None,
    since: Annotated[datetime | None, typer.Option(help="Ended then or later.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Ended before then.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Show what a store has of a session: how its operations ended, epoch by epoch.

    Times are local. Exit status: 0, or 2 for a session or a file that cannot be read.
    """
    from shmepoch.cli import history as command

    try:
        if session is None:
            for option, value in (("--status", status), ("--since", since), ("--until", until)):
                if value:
                    raise typer.BadParameter(
                        "chooses among the operations of a session; name the session",
                        param_hint=option,
                    )
            command.list_sessions(store, json=json)
        else:
            command.show(
                store,
                SessionId.parse(session),
                statuses=status or (),
                since=since,
                until=until,
                json=json,
            )
        sys.stdout.flush()
    except BrokenPipeError:
        streams.reader_left()
    except (ShmepochError, ValueError) as error:
        _fail(USAGE_ERROR, error)


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return streams.visible(super().format(record))


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


def _fail(status: int, error: Exception) -> NoReturn:
    streams.complain(error)
    streams.discard()  # or the end of the process fails once more, with a status of its own
    sys.exit(status)
