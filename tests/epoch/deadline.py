"""Coroutines under a watchdog."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Final, TypeVar

T = TypeVar("T")

#: Longer than any of this takes on any machine; a test that reaches it has failed.
DEADLINE_S: Final = 60.0


def run(coroutine: Coroutine[object, object, T]) -> T:
    """The coroutine's result, in an event loop of its own."""

    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, DEADLINE_S)

    return asyncio.run(bounded())
