"""The widgets: lines of text, and a table of lines with one chosen row.

Textual redraws each line that is refreshed. So each widget compares its new lines with the shown
ones, and refreshes only those that changed: most of a screen stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import ClassVar, Final

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from shmepoch.cli.watch.columns import Fitted, Key, Row
from shmepoch.cli.watch.text import Line, Tone

#: The terminal's own colours: they fit its background, and every terminal has them.
_STYLES: Final = {
    Tone.PLAIN: Style(),
    Tone.DIM: Style(dim=True),
    Tone.TITLE: Style(bold=True),
    Tone.HEADING: Style(bold=True, color="cyan"),
    Tone.GOOD: Style(color="green"),
    Tone.WARN: Style(color="yellow"),
    Tone.BAD: Style(color="red", bold=True),
    Tone.FIGURE: Style(color="cyan"),
}
_CHOSEN: Final = Style(reverse=True)


@lru_cache(2048)
def _strip(line: Line, width: int, chosen: bool = False) -> Strip:
    segments = [Segment(text, _CHOSEN if chosen else _STYLES[tone]) for text, tone in line]
    return Strip(segments).adjust_cell_length(width, _CHOSEN if chosen else _STYLES[Tone.PLAIN])


class Lines(Widget):
    """Lines that are made for the present width and height."""

    DEFAULT_CSS = "Lines { height: auto; width: 1fr; }"

    def __init__(
        self, make: Callable[[int, int], Sequence[Line]], *, id: str, classes: str = ""
    ) -> None:
        super().__init__(id=id, classes=classes)
        self._make = make
        self._shown: Sequence[Line] = ()

    class Clicked(Message):
        """So many cells from the left."""

        def __init__(self, lines: Lines, x: int) -> None:
            super().__init__()
            self.lines = lines
            self.x = x

    def show(self) -> None:
        """Make the lines again, and draw those that changed."""
        before, self._shown = self._shown, self._make(*self.size)
        if self.styles.is_auto_height and len(self._shown) != self.size.height:
            self.refresh(layout=True)
        elif len(before) != len(self._shown):
            self.refresh()
            return
        for y, (old, new) in enumerate(zip(before, self._shown, strict=False)):
            if old != new:
                self.refresh(Region(0, y, self.size.width, 1))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self._make(width, viewport.height))

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        return _strip(self._shown[y], width) if y < len(self._shown) else Strip.blank(width)

    def on_resize(self) -> None:
        self.show()

    def on_click(self, event: events.Click) -> None:
        self.post_message(self.Clicked(self, event.x))


class EpochTable(ScrollView, can_focus=True):
    """A line for each epoch; one of them is chosen."""

    DEFAULT_CSS = "EpochTable { height: 1fr; overflow-x: hidden; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)"),
        Binding("down,j", "move(1)"),
        Binding("pageup", "page(-1)"),
        Binding("pagedown", "page(1)"),
        Binding("home,g", "move(-1000000000)"),
        Binding("end,G", "move(1000000000)"),
        Binding("enter", "choose"),
    ]

    class Chosen(Message):
        """The message that an epoch is to be opened."""

        def __init__(self, key: Key) -> None:
            super().__init__()
            self.key = key

    def __init__(self, *, namespaces: bool, id: str) -> None:
        super().__init__(id=id)
        self._namespaces = namespaces
        self._rows: Sequence[Row] = ()
        self._lines: list[Line] = []
        self._at = 0
        self.fitted = Fitted.to(0, namespaces=namespaces)

    def show(self, rows: Sequence[Row]) -> None:
        """Show these rows, and draw the lines that changed. The chosen row stays chosen."""
        chosen = self.chosen
        before, was_at = self._lines, self._at
        # The scroll bar takes a column, and appears only after its rows.
        width = self.outer_size.width - (len(rows) > self.outer_size.height)
        self.fitted = Fitted.to(width, namespaces=self._namespaces)
        self._rows = rows
        self._lines = [self.fitted.row(row, width) for row in rows]
        keys = [row.key for row in rows]
        self._at = keys.index(chosen) if chosen in keys else max(0, min(was_at, len(rows) - 1))
        if len(before) != len(rows):
            self.virtual_size = Size(width, len(rows))
            self.refresh()
        for y, line in enumerate(self._lines):
            moved = was_at != self._at and y in (was_at, self._at)
            if moved or y >= len(before) or line != before[y]:
                self._refresh_row(y)

    @property
    def chosen(self) -> Key | None:
        """The epoch that is chosen; None while there is none."""
        return self._rows[self._at].key if self._at < len(self._rows) else None

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        y += self.scroll_offset.y
        if y >= len(self._lines):
            return Strip.blank(width)
        return _strip(self._lines[y], width, y == self._at)

    def on_resize(self) -> None:
        self._choose(self._at)

    def _refresh_row(self, y: int) -> None:
        y -= self.scroll_offset.y
        if 0 <= y < self.size.height:
            self.refresh(Region(0, y, self.size.width, 1))

    def _choose(self, y: int) -> None:
        before, self._at = self._at, max(0, min(y, len(self._rows) - 1))
        self._refresh_row(before)
        self._refresh_row(self._at)
        top, height = self.scroll_offset.y, self.scrollable_content_region.height
        if self._at < top:
            self.scroll_to(y=self._at, animate=False)
        elif self._at >= top + height:
            self.scroll_to(y=self._at - height + 1, animate=False)

    def action_move(self, rows: int) -> None:
        self._choose(self._at + rows)

    def action_page(self, pages: int) -> None:
        self._choose(self._at + pages * max(1, self.scrollable_content_region.height - 1))

    def action_choose(self) -> None:
        if (key := self.chosen) is not None:
            self.post_message(self.Chosen(key))

    def on_click(self, event: events.Click) -> None:
        y = event.y + self.scroll_offset.y
        if y < len(self._rows):
            self._choose(y)
            self.action_choose()
