"""The application: polls the epochs, and has the screens show them."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple, Protocol, TypeVar

from textual.app import App
from textual.binding import Binding, BindingType

from shmepoch.cli.run.interruptions import Interruptions
from shmepoch.cli.streams import said
from shmepoch.cli.watch.columns import Key
from shmepoch.cli.watch.epochs import Epochs
from shmepoch.cli.watch.page import FEED_LINES
from shmepoch.cli.watch.reading import EpochReader, Reader, Seen
from shmepoch.cli.watch.screens import STYLE, EpochScreen, EpochsScreen, KeysScreen
from shmepoch.cli.watch.widgets import EpochTable
from shmepoch.epoch.completions import CompletionSeq
from shmepoch.memory.clock import wall_ms
from shmepoch.monitoring.epochs import DAMAGE, EpochSummary

T = TypeVar("T")


class SummariesSource(Protocol):
    """The source of the first screen."""

    def summaries(self) -> list[EpochSummary]: ...


class EpochSource(Protocol):
    """The source of one epoch's page."""

    def read(self, after_seq: CompletionSeq, most: int) -> Seen | None: ...
    def close(self) -> None: ...


class Problem(NamedTuple):
    """The reason why a source could not be read."""

    text: str


def _found(read: Callable[[], T]) -> T | Problem:
    try:
        return read()
    except (*DAMAGE, OSError) as error:
        return Problem(str(said(error)))


class WatchApp(App[None]):
    """The live view. With `interval` None it polls only when it is told to."""

    ENABLE_COMMAND_PALETTE = False
    ALLOW_SELECT = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit"),
        Binding("ctrl+c", "interrupt", priority=True),
        Binding("ctrl+z", "suspend_process", priority=True),
        Binding("question_mark", "keys"),
    ]
    CSS = STYLE

    def __init__(
        self,
        namespace: str | None,
        *,
        interval: float | None,
        summaries: SummariesSource,
        epoch: Callable[[Key], EpochSource],
        interruptions: Interruptions | None = None,
        clock: Callable[[], float] = time.monotonic,
        clock_ms: Callable[[], int] = wall_ms,
    ) -> None:
        super().__init__(ansi_color=True)
        self.animation_level = "none"
        self._interval = interval
        self._summaries = summaries
        self._open_epoch = epoch
        self._interruptions = interruptions
        self._clock = clock
        self._clock_ms = clock_ms
        self._epochs = Epochs()
        self._first = EpochsScreen(self._epochs, namespace)
        #: One thread at a time reads the sources.
        self._looking = asyncio.Lock()
        self._source: EpochSource | None = None
        self._page: EpochScreen | None = None

    def get_default_screen(self) -> EpochsScreen:
        return self._first

    def on_mount(self) -> None:
        # The terminal has forgotten its contents, and textual draws only the parts that changed.
        self.app_resume_signal.subscribe(self, lambda _: self.screen.query("*").refresh())
        if self._interruptions is not None:
            self._interruptions.pass_to(self.interrupt)
        if self._interval is not None:
            self.run_worker(self._keep_looking(self._interval))

    async def _keep_looking(self, interval: float) -> None:
        while True:
            await self.look()
            await asyncio.sleep(interval)

    async def look(self) -> None:
        """Poll the epochs once, and show them."""
        async with self._looking:
            # In a thread of its own: shared memory may be swapped out.
            summaries = await asyncio.to_thread(_found, self._summaries.summaries)
            if isinstance(summaries, Problem):
                self._first.problem = f"The epochs cannot be listed: {summaries.text}"
            else:
                self._first.problem = None
                self._epochs.update(summaries, self._clock(), self._clock_ms())
            if self._page is not None and self._source is not None:
                page = self._page.page
                read = partial(self._source.read, page.read_through, FEED_LINES)
                seen = await asyncio.to_thread(_found, read)
                if isinstance(seen, Problem):
                    page.fail(seen.text, self._clock(), self._clock_ms())
                else:
                    page.update(seen, self._clock(), self._clock_ms())
        if isinstance(self.screen, EpochScreen | EpochsScreen):
            self.screen.show()

    async def on_epoch_table_chosen(self, message: EpochTable.Chosen) -> None:
        await self.open(message.key)

    async def open(self, key: Key) -> None:
        """Show one epoch's page."""
        if self._page is not None:
            return  # a second click
        self._source = self._open_epoch(key)
        self._page = EpochScreen(key)
        await self.push_screen(self._page)
        self.run_worker(self.look())

    async def action_close_page(self) -> None:
        source, self._source, self._page = self._source, None, None
        await self.pop_screen()
        async with self._looking:
            if source is not None:
                source.close()

    def on_unmount(self) -> None:
        if self._source is not None:
            self._source.close()

    def action_keys(self) -> None:
        self.push_screen(KeysScreen())

    def action_interrupt(self) -> None:
        self.interrupt(signal.SIGINT)

    def interrupt(self, number: int) -> None:
        """End as a signal of this number ends a program."""
        self.exit(return_code=128 + number)


def watch(namespace: str | None, interval: float) -> int:
    """Show the epochs of a namespace, or of all, until the user or a signal ends it; the exit
    status."""
    interruptions = Interruptions()
    threading.Thread(target=_end_with_the_terminal, daemon=True).start()
    reader = Reader(namespace)
    app = WatchApp(
        namespace,
        interval=interval,
        summaries=reader,
        epoch=EpochReader,
        interruptions=interruptions,
    )
    try:
        app.run()
    finally:
        interruptions.end()
        reader.close()
    return app.return_code or 0


def _end_with_the_terminal() -> None:
    """End this process when its terminal goes away, as SIGHUP does unless it is ignored.

    Nothing has to be restored then, and textual would wait until the terminal takes its output.
    """
    terminal = select.poll()
    terminal.register(0, 0)  # poll(2) always reports a hang-up
    terminal.poll()
    os._exit(128 + signal.SIGHUP)
