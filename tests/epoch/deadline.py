"""The time limits of tests: as long as the machine needs, under a watchdog."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Final, TypeVar

from hypothesis import HealthCheck, settings

T = TypeVar("T")

#: Longer than any of this takes on any machine; a test that reaches it has failed.
DEADLINE_S: Final = 60.0

#: The time of an example depends on the machine, not on the code.
UNHURRIED: Final = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(coroutine: Coroutine[object, object, T]) -> T:
    """Run a coroutine in a new event loop."""

    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, DEADLINE_S)

    return asyncio.run(bounded())
