"""The `shmepoch` command: its commands, and their common options."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable
from typing import Annotated

import typer

from shmepoch import _native
from shmepoch.cli import exits, logs
from shmepoch.cli.commands.doctor import doctor
from shmepoch.cli.commands.dump import dump
from shmepoch.cli.commands.gc import gc
from shmepoch.cli.commands.history import history
from shmepoch.cli.commands.ls import ls
from shmepoch.cli.commands.metrics import metrics
from shmepoch.cli.commands.persist import persist
from shmepoch.cli.commands.restore import restore
from shmepoch.cli.commands.run import run
from shmepoch.cli.commands.show import show
from shmepoch.cli.commands.tail import tail
from shmepoch.cli.commands.watch import watch


def described(command: Callable[..., None]) -> str:
    """The help of a command: its docstring, with lines as long as the terminal takes.

    An indented paragraph is an example and keeps its lines. It has to come before the paragraph on
    the exit status: otherwise typer removes the indentation.
    """
    text = inspect.getdoc(command) or ""
    paragraphs = text.replace("[", r"\[").split("\n\n")  # rich takes it for markup
    return "\n\n".join(
        text if text.startswith(" ") else " ".join(text.split()) for text in paragraphs
    )


app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
for command in (run, persist, history, ls, show, watch, tail, dump, restore, gc, doctor, metrics):
    app.command(help=described(command))(command)


def _print_version(asked: bool) -> None:
    if asked:
        import importlib.metadata  # no other command reads it

        print(
            f"shmepoch {importlib.metadata.version('shmepoch')}, "
            f"segment layout {_native.VERSION}, "
            f"{platform.python_implementation()} {platform.python_version()}"
        )
        raise typer.Exit


def shmepoch(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show what it is."),
    ] = False,
    log_level: Annotated[
        logs.Level, typer.Option(help="The least severe log records to show, on standard error.")
    ] = logs.Level.ERROR,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log JSON lines instead of text for people.")
    ] = False,
) -> None:
    """One runtime epoch, shared by the processes of an agent deployment.

    Examples:

        shmepoch run jobs.txt --sessions 2 --workers 4
        shmepoch --log-level info --log-json persist --store epochs.db
        shmepoch history --store epochs.db

    Exit statuses of every command:
    """
    logs.Log(log_level, log_json).configure()


_statuses = "\n".join(f"{status:>7}  {meaning}" for status, meaning in exits.MEANINGS.items())
app.callback(help=f"{described(shmepoch)}\n\n{_statuses}")(shmepoch)
