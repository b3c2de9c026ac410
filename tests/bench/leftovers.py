"""The processes that a test leaves running."""

from __future__ import annotations

import psutil


def children() -> set[psutil.Process]:
    """The children of this process, including those that have ended and are not reaped."""
    return set(psutil.Process().children())
