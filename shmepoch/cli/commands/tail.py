"""`shmepoch tail`: the ends of an epoch's operations, as they come."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from shmepoch.cli.entries import how, local_time
from shmepoch.cli.exits import NOT_WELL, fail, reporting
from shmepoch.cli.options import AllNamespaces, Epoch, Json, Namespace, chosen_namespace
from shmepoch.cli.run.interruptions import on_interruption
from shmepoch.cli.streams import complain, print_json, reader_left, visible
from shmepoch.epoch.completions import CompletionEntry, CompletionFeedGap, CompletionSeq
from shmepoch.epoch.feed import SegmentFeed
from shmepoch.epoch.operations import status_of
from shmepoch.errors import EpochGone, EpochSealed, SessionNotFound
from shmepoch.ids import SessionId
from shmepoch.memory.segment import ObservedSegment
from shmepoch.monitoring.selection import select as select_epoch

#: The number of entries that are shown first.
_LAST: Final = 10
#: The time between two checks that the epoch still has its name, and that the output has a reader.
_LOOK_S: Final = 0.5

Show = Callable[[CompletionEntry | CompletionFeedGap], None]


def tail(
    epoch: Epoch,
    namespace: Namespace = None,
    all_namespaces: AllNamespaces = False,
    last: Annotated[
        int | None,
        typer.Option(
            min=0, help=f"Show so many of the newest entries first; {_LAST}, and 0: none."
        ),
    ] = None,
    since: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**64 - 1, metavar="SEQ", help="Show first the entries above this sequence."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Go on, or end with what is there.")
    ] = True,
    json: Json = False,
) -> None:
    """Show how the operations of an epoch ended, and then how each one ends, until it is sealed.

    Examples:

        shmepoch tail 01a2149c
        shmepoch tail 01a2149c --since 1200 --json

    Exit status: 0 once it is sealed, 1 if its name is gone before, 2 if there is no such epoch,
    3 if it is damaged.
    """
    # Each line is written by then, and the process holds nothing that others wait for.
    on_interruption(lambda number, _: os._exit(128 + number))
    with reporting():
        if last is not None and since is not None:
            raise typer.BadParameter("says where to begin, too", param_hint="--since with --last")
        found, session_id = select_epoch(epoch, chosen_namespace(namespace, all_namespaces))
        with contextlib.closing(_peek(found, session_id)) as segment:
            begin = since
            if begin is None:
                begin = _before_the_last(segment, _LAST if last is None else last)
            show = _show_json if json else _show_line
            try:
                (_follow if follow else _show_above)(begin, segment, show)
            except EpochGone as error:
                fail(NOT_WELL, error)


def _peek(namespace: str, session_id: SessionId) -> ObservedSegment:
    try:
        return ObservedSegment.peek(namespace, session_id)
    except FileNotFoundError:  # removed since it was found
        raise SessionNotFound(session_id, namespace) from None


def _before_the_last(segment: ObservedSegment, count: int) -> CompletionSeq:
    """The sequence above which there are `count` entries; the watermark for 0."""
    batch = SegmentFeed(segment).list_since(0)
    newest = batch.entries[-count:] if count else ()
    return newest[0].seq - 1 if newest else batch.watermark


def _show_above(seen: CompletionSeq, segment: ObservedSegment, show: Show) -> CompletionSeq:
    """Show the entries above a sequence; returns the sequence up to which all are shown."""
    batch = SegmentFeed(segment).list_since(seen)
    gap = batch.gap_after(seen)
    if gap is not None:
        show(gap)
    for entry in batch.entries:
        show(entry)
    return max(seen, batch.watermark)


def _follow(seen: CompletionSeq, segment: ObservedSegment, show: Show) -> None:
    """Show the entries above a sequence and then new ones, until the epoch is sealed; `EpochGone`
    if it loses its name before."""
    while True:
        seen = _show_above(seen, segment, show)
        try:
            SegmentFeed(segment).wait_for_advance(seen, _LOOK_S)
        except TimeoutError:
            if _is_unread():
                reader_left()
            # If no process uses the epoch, its memory does not tell that it is gone. The name is
            # checked first: a removal in good order has sealed the epoch before.
            if not segment.named and not segment.ended:
                _show_above(seen, segment, show)
                raise EpochGone(segment.session_id, segment.epoch_id, segment.name) from None
        except EpochSealed:
            complain(f"epoch {segment.epoch_id} is sealed, and this was all of it")
            return


def _is_unread() -> bool:
    """Whether the reader of a pipe has left. Otherwise only the next line would show it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _show_json(shown: CompletionEntry | CompletionFeedGap) -> None:
    if isinstance(shown, CompletionFeedGap):
        facts = msgspec.structs.asdict(shown) | {"missing": shown.missing}
        print_json(msgspec.json.encode({"gap": facts}))
    else:
        print_json(shown.to_json())
    sys.stdout.flush()


def _show_line(shown: CompletionEntry | CompletionFeedGap) -> None:
    if isinstance(shown, CompletionFeedGap):
        line = f"{shown.missing} dropped before they were read: {shown.after_seq + 1} to "
        line += str(shown.dropped_through)
    else:
        outcome = shown.terminal_outcome
        when = local_time(shown.completed_at_ms)
        line = f"{shown.seq:>6}  {when}  {status_of(outcome):10}  {shown.display_name}"
        line = f"{line}  {how(outcome)}".rstrip()
    line = visible(line).replace("\n", "\\n")
    if sys.stdout.isatty():
        text = Text(line)
        # The width is read each time: people change the size of their terminals.
        text.truncate(Console().width, overflow="ellipsis")
        line = text.plain
    print(line, flush=True)
