"""The `shmepoch` command: its commands, and what they have in common."""

from __future__ import annotations

import logging

import typer

from shmepoch.cli import streams
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

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (run, persist, history, ls, show, tail, dump, restore, gc, doctor, metrics):
    app.command()(command)


@app.callback()
def shmepoch() -> None:
    """One runtime epoch, shared by the processes of an agent deployment."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("shmepoch: %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler])


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return streams.visible(super().format(record))
