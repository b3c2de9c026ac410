"""Options that several commands share, each with one meaning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from shmepoch.errors import ShmepochError
from shmepoch.memory.namespaces import list_segments, resolve_namespace


def chosen_namespace(namespace: str | None, all_namespaces: bool) -> str | None:
    """The namespace whose epochs are meant, or None for all; `NamespaceInvalid`."""
    if not all_namespaces:
        return resolve_namespace(namespace)
    if namespace is not None:
        raise typer.BadParameter("not together with --all-namespaces", param_hint="--namespace")
    return None


def seconds(least: float, most: float) -> Callable[[float | None], float | None]:
    """A check of a number of seconds; some versions of typer's own check accept NaN."""

    def check(value: float | None) -> float | None:
        if value is None or least <= value <= most:
            return value
        raise typer.BadParameter(f"{value} is not a number of seconds from {least:g} to {most:g}")

    return check


def _live_sessions(context: typer.Context, incomplete: str) -> list[str]:
    """The sessions in shared memory, as a shell offers them to complete an id."""
    with contextlib.suppress(ShmepochError, OSError):
        everywhere = context.params.get("all_namespaces", False)
        chosen = None if everywhere else resolve_namespace(context.params.get("namespace"))
        names = sorted(str(session_id) for _, session_id in list_segments(chosen))
        return [name for name in names if name.startswith(incomplete)]
    return []


Store: TypeAlias = Annotated[
    Path, typer.Option("--store", help="SQLite file that the epochs are kept in.")
]
Namespace: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--namespace", "-n", help="Whose epochs; SHMEPOCH_NAMESPACE if not given, else default."
    ),
]
AllNamespaces: TypeAlias = Annotated[
    bool, typer.Option("--all-namespaces", "-A", help="The epochs of every namespace.")
]
Epoch: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="SESSION|EPOCH",
        help="The id of a session or an epoch, or how it begins.",
        autocompletion=_live_sessions,
    ),
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="JSON lines instead of text for people.")
]
