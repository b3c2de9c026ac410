"""The commands and their options."""

from __future__ import annotations

import logging
import os
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from shmepoch.cli.run import jobs
from shmepoch.cli.run.command import Options, execute
from shmepoch.cli.run.plan import RunRefused
from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import ShmepochError, StoreUnusable
from shmepoch.ids import SessionId

RUN_ERROR: Final = 1
USAGE_ERROR: Final = 2

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def shmepoch() -> None:
    """One runtime epoch, shared by the processes of an agent deployment."""
    logging.basicConfig(level=logging.ERROR, format="shmepoch: %(message)s")


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
        typer.Option(min=0.01, help="Kill a random agent or worker every so many seconds."),
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

    Exit status: 0 if every command completed, 1 if one did not, 2 for a bad file or a store that
    does not go with what is asked for, 130 on Ctrl-C.
    """
    if resume and store is None:
        raise typer.BadParameter(
            "needs --store, the file that the run is in", param_hint="--resume"
        )
    try:
        commands = jobs.read(file)
        if transcript is not None:
            transcript.mkdir(parents=True, exist_ok=True)
    except (ShmepochError, OSError) as error:
        _fail(USAGE_ERROR, error)
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
    try:
        status = execute(commands, options)
    except BrokenPipeError:
        _reader_left()
    except (RunRefused, StoreUnusable) as error:
        _fail(USAGE_ERROR, error)
    except (ShmepochError, OSError) as error:
        _fail(RUN_ERROR, error)
    sys.exit(status)


@app.command()
def persist(
    store: Annotated[Path, typer.Option(help="SQLite file that the epochs are kept in.")],
    namespace: Annotated[
        str | None, typer.Option(help="Whose epochs; SHMEPOCH_NAMESPACE, else default.")
    ] = None,
    max_delay: Annotated[
        float, typer.Option(min=0, help="Seconds within which a completion is durable.")
    ] = 0.05,
) -> None:
    """Keep every epoch of a namespace in a store, until Ctrl-C or SIGTERM.

    It then waits until everything is stored. Exit status: 0 if it is, 1 if the store did not take
    it within 10 seconds; what it lacks is still in shared memory.
    """
    from shmepoch.cli import persist as command

    try:
        command.persist(store, namespace, max_delay)
    except (ShmepochError, TimeoutError) as error:
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
            command.list_sessions(store)
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
        _reader_left()
    except (ShmepochError, ValueError) as error:
        _fail(USAGE_ERROR, error)


def _fail(status: int, error: Exception) -> NoReturn:
    typer.echo(f"shmepoch: {error}", err=True)
    sys.exit(status)


def _reader_left() -> NoReturn:
    """Whoever read what this prints has left: end as a program without a handler would."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
