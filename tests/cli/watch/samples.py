"""Epochs that were made up, and the application over them: nothing of it depends on time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from msgspec import structs
from textual.pilot import Pilot

from shmepoch.cli.watch.app import WatchApp
from shmepoch.cli.watch.columns import Key
from shmepoch.cli.watch.reading import Place, Seen
from shmepoch.config import OpsLifecycleConfig
from shmepoch.epoch.completions import CompletionBatch, CompletionEntry, CompletionSeq
from shmepoch.epoch.cursors import EpochCursorSnapshot
from shmepoch.epoch.encoding import Detail
from shmepoch.epoch.operations import (
    Completed,
    Failed,
    OperationKind,
    OperationProgressUpdate,
    OperationResult,
    OperationSpec,
    OperationStatus,
    OperationTerminalOutcome,
)
from shmepoch.epoch.table import STATUSES, OperationView
from shmepoch.ids import OperationId, RuntimeEpochId, SessionId
from shmepoch.memory.participants import Participant, Role
from shmepoch.monitoring.epochs import EpochState, EpochSummary

#: A Wednesday; clocks of people are not shown in what is compared.
NOW_MS: Final = 1_700_000_000_000
SPACE: Final = "default"


def session(number: int) -> SessionId:
    """A session that is always the same."""
    return SessionId.from_bytes(bytes([1, number, 7]) + bytes(12) + bytes([number]))


def summary(
    number: int,
    *,
    state: EpochState = EpochState.OPEN,
    namespace: str = SPACE,
    watermark: int = 0,
    cursors: tuple[int, int, int] | None = None,
    participants: dict[Role, int] | None = None,
    dead: int = 0,
    running: int = 0,
    age_s: int = 90,
    epoch: int | None = None,
    problem: str | None = None,
) -> EpochSummary:
    """An epoch as it might be."""
    if state is EpochState.DAMAGED:
        return EpochSummary(
            namespace=namespace,
            session_id=session(number),
            state=state,
            alive_at_ms=NOW_MS,
            bytes=500_000,
            problem=problem or "its magic is 0, not 1",
        )
    return EpochSummary(
        namespace=namespace,
        session_id=session(number),
        state=state,
        alive_at_ms=NOW_MS,
        bytes=500_000,
        epoch_id=RuntimeEpochId.from_bytes(bytes([9, epoch or number]) + bytes(14)),
        created_at_ms=NOW_MS - age_s * 1000,
        participants=participants if participants is not None else {Role.RUNTIME: 1},
        dead=dead,
        operations={OperationStatus.RUNNING: running} if running else {},
        ended=watermark,
        watermark=watermark,
        cursors=EpochCursorSnapshot(*(cursors or (watermark,) * 3)),
    )


def participant(number: int, role: Role, *, alive: bool = True, slot: int = 0) -> Participant:
    """A process that joined a minute ago."""
    return Participant(
        slot=slot or number,
        number=number,
        role=role,
        pid=1000 + number,
        joined_at_ms=NOW_MS - 60_000,
        alive=alive,
        is_self=False,
    )


def operation(
    number: int,
    name: str,
    *,
    age_s: int = 10,
    status: OperationStatus = OperationStatus.RUNNING,
    progress: OperationProgressUpdate | None = None,
) -> OperationView:
    """An operation that has not ended."""
    return OperationView(
        spec=OperationSpec(
            id=OperationId.from_bytes(bytes([5, number]) + bytes(14)),
            kind=OperationKind.BACKGROUND_TOOL_OP,
            display_name=name,
            source_label="test",
        ),
        detail=Detail(last_progress=progress),
        birth=number,
        created_at_ms=NOW_MS - age_s * 1000,
        started_at_ms=NOW_MS - age_s * 1000,
        slot=number,
        word=STATUSES.index(status),
    )


def entry(seq: int, name: str, *, error: str | None = None) -> CompletionEntry:
    """How an operation ended."""
    id = OperationId.from_bytes(bytes([6]) + seq.to_bytes(15, "big"))
    outcome: OperationTerminalOutcome = (
        Completed(OperationResult(id=id, content="done", duration_ms=812))
        if error is None
        else Failed(error)
    )
    return CompletionEntry(
        seq=seq,
        operation_id=id,
        kind=OperationKind.BACKGROUND_TOOL_OP,
        display_name=name,
        terminal_outcome=outcome,
        completed_at_ms=NOW_MS,
    )


def batch(
    entries: Sequence[CompletionEntry], *, dropped: int = 0, watermark: int | None = None
) -> CompletionBatch:
    """What the feed has."""
    last = entries[-1].seq if watermark is None else watermark
    return CompletionBatch(entries=tuple(entries), watermark=last, dropped_through=dropped)


def seen(
    of: EpochSummary,
    *,
    place: Place = Place.NAMED,
    participants: Sequence[Participant] = (),
    operations: Sequence[OperationView] = (),
    completions: CompletionBatch | None = None,
    writer_held: bool = False,
    broken_off: bool = False,
) -> Seen:
    """An epoch as its page is given it."""
    return Seen(
        place,
        of,
        OpsLifecycleConfig(),
        participants=participants,
        operations=operations,
        feed_bytes=60 * 1024,
        writer_held=writer_held,
        broken_off=broken_off,
        batch=completions,
    )


class Sources:
    """Where the application under test reads; a test says what is there, and what time it is."""

    def __init__(self, *summaries: EpochSummary) -> None:
        self.listed: list[EpochSummary] | OSError = list(summaries)
        self.page: Seen | Exception | None = None
        self.now = 1000.0
        self.opened: list[Key] = []
        self.asked: list[CompletionSeq] = []
        self.closed = 0

    def summaries(self) -> list[EpochSummary]:
        if isinstance(self.listed, OSError):
            raise self.listed
        return self.listed

    def open(self, key: Key) -> Sources:
        self.opened.append(key)
        return self

    def read(self, after_seq: CompletionSeq, most: int) -> Seen | None:
        self.asked.append(after_seq)
        if isinstance(self.page, Exception):
            raise self.page
        if self.page is None or self.page.batch is None:
            return self.page
        above = [entry for entry in self.page.batch.entries if entry.seq > after_seq]
        batch = structs.replace(self.page.batch, entries=tuple(above)) if above else None
        return self.page._replace(batch=batch)

    def close(self) -> None:
        self.closed += 1

    def now_ms(self) -> int:
        return NOW_MS + round((self.now - 1000.0) * 1000)


class Watched:
    """The application in a terminal that is only pretended."""

    def __init__(self, app: WatchApp, pilot: Pilot[None], sources: Sources) -> None:
        self.app = app
        self.pilot = pilot
        self.sources = sources

    async def look(self, seconds: float = 1.0) -> None:
        """Have so much time pass, and the application look again."""
        self.sources.now += seconds
        await self.app.look()
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def open(self, page: Seen | None) -> None:
        """Open the page of the epoch that is chosen."""
        self.sources.page = page
        await self.press("enter")
        await self.look(0.0)

    @property
    def lines(self) -> list[str]:
        """What is on the screen."""
        # Private, and the one way to the text of a screen; an SVG has it in pieces.
        strips = self.app.screen._compositor.render_strips()
        return [strip.text.rstrip() for strip in strips]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def rows(self) -> list[str]:
        """The sessions of the first screen's table, by their last digits."""
        table = [line for line in self.lines[3:-1] if line]
        return [line.split()[0][-2:] for line in table]


def watching(
    sources: Sources,
    act: Callable[[Watched], Awaitable[None]],
    *,
    size: tuple[int, int] = (100, 24),
    namespace: str | None = SPACE,
) -> None:
    """Act on the application over these sources, which has looked once."""

    async def run() -> None:
        app = WatchApp(
            namespace,
            interval=None,
            summaries=sources,
            epoch=sources.open,
            clock=lambda: sources.now,
            clock_ms=sources.now_ms,
        )
        async with app.run_test(size=size) as pilot:
            watched = Watched(app, pilot, sources)
            await watched.look(0.0)
            await act(watched)

    asyncio.run(run())
