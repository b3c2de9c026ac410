"""The hooks around a fork: they run in one order, even if one of them fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from shmepoch import forking
from shmepoch.forking import Part, on_fork

#: The hooks that were called in this process.
called: list[str] = []


def hook(name: str) -> Callable[[], None]:
    """A hook that records its call, and fails."""

    def call() -> None:
        called.append(name)
        raise KeyboardInterrupt(name)

    return call


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part has hooks, which were registered in another order than the one they run in."""
    monkeypatch.setattr(forking, "_parts", {})
    monkeypatch.setattr(f"{__name__}.called", [])
    for part in (Part.DOORBELLS, Part.STORES, Part.ATTACHMENTS, Part.BINDINGS):
        on_fork(
            part,
            before=hook(f"before {part.name}"),
            after_in_parent=hook(f"parent {part.name}"),
            after_in_child=hook(f"child {part.name}"),
        )


@pytest.mark.usefixtures("hooks")
def test_the_parts_follow_in_one_order_and_each_has_its_turn() -> None:
    ours, theirs = Pipe()
    pid = os.fork()
    if pid == 0:
        theirs.send(called)
        os._exit(0)
    os.waitpid(pid, 0)
    in_child: Any = ours.recv()
    before = [f"before {name}" for name in ("STORES", "BINDINGS", "DOORBELLS", "ATTACHMENTS")]
    order = ("ATTACHMENTS", "DOORBELLS", "BINDINGS", "STORES")
    assert called == before + [f"parent {name}" for name in order]
    assert in_child == before + [f"child {name}" for name in order]
    ours.close()
    theirs.close()


@pytest.mark.usefixtures("hooks")
def test_a_part_has_its_hooks_once() -> None:
    with pytest.raises(ValueError, match="DOORBELLS"):
        on_fork(Part.DOORBELLS)


def test_the_whole_library_asks_for_forks_in_one_place() -> None:
    import shmepoch  # every part of it, as it is used

    assert set(shmepoch.forking._parts) == set(Part)
    [package] = map(Path, shmepoch.__path__)
    asking = [path for path in package.rglob("*.py") if "register_at_fork" in path.read_text()]
    assert asking == [package / "forking.py"]
