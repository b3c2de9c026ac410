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
from shmepoch.epoch.operations import OperationStatus
from shmepoch.errors import ShmepochError
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

    Exit status: 0 if every command completed, 1 if one did not, 2 for a bad file, 130 on Ctrl-C.
    """
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
        kill_every=kill_every,
        seed=seed,
        json=json,
    )
    try:
        status = execute(commands, options)
    except BrokenPipeError:  # whoever read what this prints has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
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
    """Keep every epoch of a namespace in a store, until Ctrl-C or SIGTERM."""
    from shmepoch.cli import persist as command

    try:
        command.persist(store, namespace, max_delay)
    except ShmepochError as error:
        _fail(RUN_ERROR, error)


@app.command()
def history(
    session: Annotated[str, typer.Argument(help="The session's id.")],
    store: Annotated[Path, typer.Option(help="SQLite file that its epochs are kept in.")],
    status: Annotated[
        list[OperationStatus] | None, typer.Option(help="Only these; may be given several times.")
    ] = None,
    since: Annotated[datetime | None, typer.Option(help="Ended then or later.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Ended before then.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Show what a store has of a session: how its operations ended, epoch by epoch."""
    from shmepoch.cli import history as command

    try:
        session_id = SessionId.parse(session)
        command.show(store, session_id, statuses=status or (), since=since, until=until, json=json)
    except (ShmepochError, ValueError) as error:
        _fail(USAGE_ERROR, error)


def _fail(status: int, error: Exception) -> NoReturn:
    typer.echo(f"shmepoch: {error}", err=True)
    sys.exit(status)
