"""What a test leaves running."""

from __future__ import annotations

import psutil


def children() -> set[psutil.Process]:
    """The processes of this one, and those that it has ended and not reaped."""
    return set(psutil.Process().children())
