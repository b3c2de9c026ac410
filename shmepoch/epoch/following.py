"""Following a feed: its completions one after another, as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Final

from shmepoch.epoch.completions import (
    CompletionEntry,
    CompletionFeed,
    CompletionFeedGap,
    CompletionSeq,
)
from shmepoch.errors import EpochSealed


class FeedFollower:
    """The completions of a feed above a position, and then new ones. It works with `for` and with
    `async for`.

    If retention dropped completions before they were read, a `CompletionFeedGap` comes in their
    place. The iteration ends after the last completion of a sealed epoch, and raises `EpochGone`
    when the epoch is gone. Each iteration begins at the position again.
    """

    def __init__(self, feed: CompletionFeed, after_seq: CompletionSeq) -> None:
        self._feed: Final = feed
        self._after_seq: Final = after_seq

    def __iter__(self) -> Iterator[CompletionEntry | CompletionFeedGap]:
        after = self._after_seq
        sealed = False
        while not sealed:
            try:
                self._feed.wait_for_advance(after)
            except EpochSealed:
                sealed = True
            found, after = self._news(after)
            yield from found

    async def __aiter__(self) -> AsyncIterator[CompletionEntry | CompletionFeedGap]:
        after = self._after_seq
        sealed = False
        while not sealed:
            try:
                await self._feed.advanced(after)
            except EpochSealed:
                sealed = True
            found, after = self._news(after)
            for one in found:
                yield one

    def _news(
        self, after: CompletionSeq
    ) -> tuple[list[CompletionEntry | CompletionFeedGap], CompletionSeq]:
        batch = self._feed.list_since(after)
        gap = batch.gap_after(after)
        return [*([] if gap is None else [gap]), *batch.entries], max(after, batch.watermark)
