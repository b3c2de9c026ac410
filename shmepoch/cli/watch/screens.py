"""The screens: the epochs, one epoch, and the keys."""

from __future__ import annotations

from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, VerticalScroll
from textual.events import Resize
from textual.screen import ModalScreen, Screen
from textual.widgets import Input

from shmepoch.cli.watch import text
from shmepoch.cli.watch.columns import Key, Sort
from shmepoch.cli.watch.epochs import Epochs, totals
from shmepoch.cli.watch.page import Page
from shmepoch.cli.watch.text import Line, Piece, Tone
from shmepoch.cli.watch.widgets import EpochTable, Lines

#: The keys and their actions.
_KEYS: Final = (
    ("up down", "choose an epoch; also j k, page up and down, home, end, the wheel"),
    ("enter", "open the epoch's page; also a click"),
    ("escape", "go back; on the first screen, show all epochs again"),
    ("/", "show only epochs with these words: of an id, a state, a role, a problem"),
    ("s S", "sort by the next or the previous column; also a click on its name"),
    ("r", "sort the other way round"),
    ("?", "this"),
    ("q", "end; also Ctrl-C. Ctrl-Z suspends it"),
)
_LEGEND: Final = (
    "Ops: operations that have not ended.",
    "Processes: R runtime, A agent, W worker, P persistence, O observer.",
    "Lag applied, observed, injected: how many completions each cursor is behind the watermark.",
    "Damaged epochs are always first.",
)

#: The style. The background and the colours are the terminal's own.
STYLE: Final = """
* {
    background: ansi_default; color: ansi_default;
    scrollbar-size-vertical: 1;
    scrollbar-color: ansi_cyan; scrollbar-color-hover: ansi_cyan; scrollbar-color-active: ansi_cyan;
    scrollbar-background: ansi_default; scrollbar-background-hover: ansi_default;
    scrollbar-background-active: ansi_default;
}
#filter { display: none; height: 1; border: none; padding: 0; }
#filter.open { display: block; }
#filter > .input--cursor { background: ansi_default; color: ansi_default; text-style: reverse; }
#parts { height: 1fr; }
.side { height: auto; width: 1fr; }
.part { margin-bottom: 1; }
#feed { height: 1fr; min-height: 8; }
.-narrow #work { min-height: 100%; }
.-narrow #feed { height: 12; }
.-wide #parts { layout: horizontal; }
.-wide .side { height: 100%; }
.-wide #state { margin-right: 3; }
"""


class EpochsScreen(Screen[None]):
    """The epochs as a table, with their totals."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter"),
        Binding("escape", "clear"),
        Binding("s", "sort(1)"),
        Binding("S", "sort(-1)"),
        Binding("r", "reverse"),
    ]

    def __init__(self, epochs: Epochs, namespace: str | None) -> None:
        super().__init__()
        self._epochs = epochs
        self._namespace = namespace
        self._sort = Sort()
        self._filter = ""
        #: The reason why the epochs could not be listed, if they could not.
        self.problem: str | None = None
        self._table = EpochTable(namespaces=namespace is None, id="epochs")

    def compose(self) -> ComposeResult:
        yield Lines(self._title, id="title")
        yield Lines(self._totals, id="totals")
        yield Lines(lambda *_: [self._table.fitted.heading(self._sort)], id="heading")
        yield self._table
        filter = Input(placeholder="words to look for", id="filter")
        filter.cursor_blink = False
        yield filter
        yield Lines(self._keys, id="keys")

    def on_mount(self) -> None:
        self._table.focus()

    def show(self) -> None:
        """Show the epochs as of the last poll."""
        rows = self._epochs.chosen(self._filter, self._sort)
        self._table.show(rows)
        for lines in self.query(Lines):
            lines.show()

    def on_resize(self, _: Resize) -> None:
        self.call_after_refresh(self.show)

    def on_screen_resume(self) -> None:
        self.call_after_refresh(self.show)

    def _title(self, width: int, _: int) -> list[Line]:
        where = "every namespace" if self._namespace is None else f"namespace {self._namespace}"
        pieces: list[Piece] = [("shmepoch watch", Tone.TITLE), (where, Tone.PLAIN)]
        if self._filter:
            shown, of = len(self._epochs.chosen(self._filter, self._sort)), len(self._epochs.rows)
            pieces.append((f"/{text.one_line(self._filter)}: {shown} of {of}", Tone.WARN))
        return [text.joined(pieces, width)]

    def _totals(self, width: int, _: int) -> list[Line]:
        if self.problem is not None:
            return [((text.fitted(text.one_line(self.problem), width), Tone.BAD),)]
        return [text.joined(totals(list(self._epochs.rows.values())), width)]

    def _keys(self, width: int, _: int) -> list[Line]:
        keys = ("enter open", "/ filter", "s sort", "r reverse", "? keys", "q end")
        return [text.joined([(key, Tone.DIM) for key in keys], width)]

    def on_lines_clicked(self, message: Lines.Clicked) -> None:
        if message.lines.id == "heading":
            column = self._table.fitted.column_at(message.x)
            if column is not None:
                self._sort = self._sort.clicked(column)
                self.show()

    def action_sort(self, step: int) -> None:
        columns = [column.name for column, _ in self._table.fitted.columns]
        self._sort = self._sort.next(columns, step)
        self.show()

    def action_reverse(self) -> None:
        self._sort = self._sort.reversed()
        self.show()

    def action_filter(self) -> None:
        filter = self.query_one(Input)
        filter.add_class("open")
        filter.focus()

    def action_clear(self) -> None:
        filter = self.query_one(Input)
        filter.value = ""
        self._close_filter()

    def on_input_changed(self, message: Input.Changed) -> None:
        self._filter = message.value
        self.show()

    def on_input_submitted(self) -> None:
        self._close_filter()

    def _close_filter(self) -> None:
        self.query_one(Input).remove_class("open")
        self._table.focus()


class EpochScreen(Screen[None]):
    """One epoch: its cursors, its operations, its participants and its feed."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012 - as textual has it
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,backspace", "app.close_page")]

    def __init__(self, key: Key) -> None:
        super().__init__()
        self.page: Final = Page(key)

    def compose(self) -> ComposeResult:
        page = self.page
        yield Lines(lambda width, _: page.title(width), id="title")
        yield Lines(lambda width, _: page.banner(width), id="banner")
        with VerticalScroll(id="parts"):
            with Container(id="state", classes="side"):
                yield Lines(self._cursors, id="cursors", classes="part")
                yield Lines(self._room, id="room", classes="part")
                yield Lines(self._participants, id="participants", classes="part")
            with Container(id="work", classes="side"):
                yield Lines(self._operations, id="operations", classes="part")
                yield Lines(self._feed, id="feed")
        yield Lines(self._keys, id="keys")

    def on_screen_resume(self) -> None:
        self.call_after_refresh(self.show)

    def show(self) -> None:
        """Show the epoch as of the last poll."""
        for lines in self.query(Lines):
            lines.show()

    def _cursors(self, width: int, _: int) -> list[Line]:
        return _under("Cursors", self.page.cursors(width))

    def _room(self, width: int, _: int) -> list[Line]:
        return _under("Room", self.page.room(width))

    def _participants(self, width: int, _: int) -> list[Line]:
        return _under("Participants", self.page.participants(width, self.size.height))

    def _operations(self, width: int, _: int) -> list[Line]:
        most = max(4, self.size.height // 3)
        return _under("Operations that have not ended", self.page.operations(width, most))

    def _feed(self, width: int, height: int) -> list[Line]:
        return _under("Completions", self.page.feed(width, height - 1))

    def _keys(self, width: int, _: int) -> list[Line]:
        keys = ("escape back", "up down scroll", "? keys", "q end")
        return [text.joined([(key, Tone.DIM) for key in keys], width)]


def _under(heading: str, lines: list[Line]) -> list[Line]:
    return [((heading, Tone.TITLE),), *lines] if lines else []


class KeysScreen(ModalScreen[None]):
    """The keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,enter", "dismiss")]

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Lines(self._lines, id="lines")

    def _lines(self, width: int, _: int) -> list[Line]:
        lines: list[Line] = [(("Keys", Tone.TITLE),)]
        for key, what in _KEYS:
            head: Piece = (f"  {key:<9}", Tone.HEADING)
            first, *rest = text.wrapped(what, width - 11)
            lines.append((head, (first, Tone.PLAIN)))
            lines += [((" " * 11 + line, Tone.PLAIN),) for line in rest]
        lines.append(())
        for said in _LEGEND:
            lines += [((line, Tone.PLAIN),) for line in text.wrapped(said, width)]
        return lines
