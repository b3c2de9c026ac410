"""The commands and their options."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from shmepoch.cli.run import jobs
from shmepoch.cli.run.command import Options, execute
from shmepoch.errors import ShmepochError

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


def _fail(status: int, error: Exception) -> NoReturn:
    typer.echo(f"shmepoch: {error}", err=True)
    sys.exit(status)
