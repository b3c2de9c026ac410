"""`shmepoch gc`: removes unused files from shared memory."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Final

import typer

from shmepoch.cli.exits import NOT_CARRIED_OUT, NOT_WELL, fail, reporting
from shmepoch.cli.options import AllNamespaces, Json, Namespace, chosen_namespace
from shmepoch.cli.streams import counted, print_json, visible
from shmepoch.memory.files import require_shm
from shmepoch.monitoring import garbage
from shmepoch.monitoring.garbage import Found, Wanted, What

_DURATION: Final = re.compile(r"(?P<number>\d{1,9})(?P<unit>[smhd])|0", re.ASCII)
_UNIT_MS: Final = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
#: These kinds are only counted: a collection does not concern them.
_NOT_SHOWN: Final = (What.IN_USE, What.OTHERS, What.UNSAFE, What.UNKNOWN)


def _milliseconds(text: str) -> int:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a length of time, such as 30m, 12h, 7d or 0")
    return int(found["number"] or 0) * _UNIT_MS[found["unit"] or "s"]


def gc(
    namespace: Namespace = None,
    all_namespaces: AllNamespaces = False,
    older_than: Annotated[
        int | None,
        typer.Option(
            parser=_milliseconds,
            metavar="DURATION",
            help="Also remove open epochs that no process has attached and that have shown no life "
            "for this long: 90s, 30m, 12h, 7d, or 0. "
            "Completions that no store has are lost.",
        ),
    ] = None,
    damaged: Annotated[
        bool,
        typer.Option(
            "--damaged",
            help="Also remove segments that this release cannot read: damaged, or of another "
            "release.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and remove nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove unused segments from shared memory.

    Unused are: epochs that their runtime has ended, files that a killed process was making, and
    pages of doorbells on which no process listens. It never removes a file that a process has
    attached, or one of another user.

    Examples:

        shmepoch gc --dry-run --all-namespaces
        shmepoch gc --older-than 12h

    Exit status: 0; 1 if something could not be removed; 2 for a bad option; 3 if there is no shared
    memory.
    """
    with reporting():
        chosen = chosen_namespace(namespace, all_namespaces)
        require_shm()
        wanted = Wanted(older_than_ms=older_than, damaged=damaged)
        failed = _collect(chosen, wanted, dry_run=dry_run, json=json)
    if failed:
        sys.exit(NOT_WELL)


def _collect(namespace: str | None, wanted: Wanted, *, dry_run: bool, json: bool) -> bool:
    """Remove the files that are to be removed, and print the files found; whether any failed."""
    totals = _Totals()
    for found in _found(namespace, wanted):
        if found.remove and not dry_run:
            found = garbage.remove(found, wanted)
        totals.add(found)
        if found.what in _NOT_SHOWN:
            continue
        if json:
            print_json(found.to_json())
        else:
            print(visible(_line(found)))
    if not json:
        print(totals.text(dry_run=dry_run))
    return totals.failed > 0


def _found(namespace: str | None, wanted: Wanted) -> Iterator[Found]:
    try:
        yield from garbage.find(namespace, wanted)
    except OSError as error:
        fail(NOT_CARRIED_OUT, error)


def _line(found: Found) -> str:
    if found.problem is not None:
        verb, why = "failed", f"{found.why}; not removed: {found.problem}"
    else:
        verb, why = "remove" if found.remove else "keep", found.why
        if found.hint is not None:
            why += f"; {found.hint} removes it"
    name = found.name if found.session_id is None else found.session_id
    return f"{verb:6} {found.bytes:>11,} B  {found.what:9}  {found.namespace}  {name}  {why}"


class _Totals:
    """The last line."""

    def __init__(self) -> None:
        self.failed = 0
        self._count = 0
        self._bytes = 0
        self._kept: Counter[tuple[What, str]] = Counter()

    def add(self, found: Found) -> None:
        if found.problem is not None:
            self.failed += 1
        elif found.remove:
            self._count += 1
            self._bytes += found.bytes
        else:
            hint = f" ({found.hint} removes them)" if found.hint is not None else ""
            self._kept[found.what, hint] += 1

    def text(self, *, dry_run: bool) -> str:
        freed = f"{counted(self._count, 'file')}, {self._bytes:,} bytes"
        parts = [f"would remove {freed}; nothing was removed" if dry_run else f"removed {freed}"]
        if self.failed:
            parts.append(f"could not remove {counted(self.failed, 'file')}")
        kept = [f"{count} {what}{hint}" for (what, hint), count in self._kept.items()]
        if kept:
            parts.append(f"kept {', '.join(kept)}")
        return "; ".join(parts)
