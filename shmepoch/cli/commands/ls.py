"""`shmepoch ls`: every epoch in shared memory, a line each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Final

import typer
from msgspec.structs import astuple

from shmepoch.cli.exits import reporting
from shmepoch.cli.options import AllNamespaces, Json, Namespace, chosen_namespace
from shmepoch.cli.streams import complain, counted, print_json, visible
from shmepoch.cli.tables import print_columns, span
from shmepoch.memory.clock import wall_ms
from shmepoch.memory.participants import Role
from shmepoch.monitoring.epochs import EpochState, EpochSummary, summaries
from shmepoch.monitoring.queries import (
    FIELDS,
    UNFINISHED,
    FilterInvalid,
    SortKeyInvalid,
    condition,
    matching,
    order,
)

#: The least number of characters of an epoch's id that are shown.
_LEAST_DIGITS: Final = 8


def ls(
    namespace: Namespace = None,
    all_namespaces: AllNamespaces = False,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="FILTER",
            help="FIELD=VALUE, FIELD>N or FIELD<N, as in 'state=open' or 'idle>2h'; of several, "
            f"all have to hold. Fields: {', '.join(FIELDS)}.",
        ),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(metavar="KEY", help="One of these fields; -KEY: the largest first."),
    ] = "session",
    json: Json = False,
) -> None:
    """List the epochs in shared memory: their processes, operations and cursors.

    It waits for no process and changes nothing.

    Examples:

        shmepoch ls --sort -lag
        shmepoch ls -A --filter state=abandoned --filter 'idle>2h'
        shmepoch ls --json | jq .session_id

    Exit status: 0, also if there is none, or 2 for a filter, a key or a namespace that is none.
    """
    with reporting(FilterInvalid, SortKeyInvalid):
        chosen = chosen_namespace(namespace, all_namespaces)
        conditions = [condition(text) for text in filters or ()]
        ordered = order(sort)
        found = list(summaries(chosen))
        now_ms = wall_ms()
        shown = ordered(matching(found, conditions, now_ms), now_ms)
        if json:
            for epoch in shown:
                print_json(epoch.to_json())
        elif shown:
            _print_table(shown, _digits(found), now_ms, with_namespace=all_namespaces)
        if not shown:
            complain(_nothing(len(found), chosen))


def _nothing(found: int, namespace: str | None) -> str:
    where = "any namespace" if namespace is None else f"namespace {namespace}"
    if not found:
        return f"there is no epoch in {where}"
    return f"no epoch matches, of {counted(found, 'epoch')} in {where}"


def _print_table(
    epochs: Sequence[EpochSummary], digits: int, now_ms: int, *, with_namespace: bool
) -> None:
    with_problem = any(epoch.problem for epoch in epochs)
    print_columns(
        (
            *(["namespace"] if with_namespace else []),
            *("session", "epoch", "age", "state", "participants", "operations", "ended"),
            *("watermark", "applied", "observed", "injected", "bytes"),
            *(["problem"] if with_problem else []),
        ),
        [
            (
                *([epoch.namespace] if with_namespace else []),
                *_cells(epoch, digits, now_ms),
                *([_short(epoch.problem or "")] if with_problem else []),
            )
            for epoch in epochs
        ],
        right=("age", "ended", "watermark", "applied", "observed", "injected", "bytes"),
    )


def _cells(epoch: EpochSummary, digits: int, now_ms: int) -> Iterator[str]:
    yield str(epoch.session_id)
    yield str(epoch.epoch_id or "-")[:digits]
    if epoch.state is EpochState.DAMAGED:
        yield from ("-", epoch.state, *["-"] * 7)
    else:
        yield span(now_ms - epoch.created_at_ms)
        yield epoch.state
        roles = [(role, epoch.participants.get(role, 0)) for role in Role]
        yield _numbers([*roles, ("dead", epoch.dead)])
        yield _numbers((status, epoch.operations.get(status, 0)) for status in UNFINISHED)
        yield f"{epoch.ended:,}"
        yield f"{epoch.watermark:,}"
        lags = epoch.lags.values()
        for position, lag in zip(astuple(epoch.cursors), lags, strict=True):
            yield f"{position:,} (-{lag:,})" if lag else f"{position:,}"
    yield f"{epoch.bytes:,}"


def _numbers(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts if count) or "-"


def _short(problem: str) -> str:
    """The problem, without the remedy. `show` has both."""
    return visible(problem).partition(";")[0]


def _digits(epochs: Iterable[EpochSummary]) -> int:
    """The number of characters that tell the id of an epoch from all others, and from every session
    except its own."""
    ids = [(str(epoch.session_id), number) for number, epoch in enumerate(epochs)]
    ids += [(str(epoch.epoch_id), number) for number, epoch in enumerate(epochs) if epoch.epoch_id]
    shared = (
        len(os.path.commonprefix([one, other]))  # noqa: RUF071 - these are no paths
        for (one, owner), (other, another) in pairwise(sorted(ids))
        if owner != another
    )
    return max(_LEAST_DIGITS, 1 + max(shared, default=0))
