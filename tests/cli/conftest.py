"""The environment that the processes of a run inherit from the test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of a run imports the library; where bytecode is not kept, each compiles it."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
