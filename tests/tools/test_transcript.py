"""The transcript of the commands in docs: their output for epochs at work, killed and stopped."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

_ROOT = Path(__file__).parents[2]
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Typed(NamedTuple):
    """A command of a transcript, and the names of what was shown."""

    command: str
    failed: bool
    labels: frozenset[str]


def typed(text: str) -> list[Typed]:
    """The commands of a transcript. What it says of this machine is left out."""
    found = []
    for block in re.split(r"^    \$ ", text, flags=re.M)[1:]:
        command, _, shown = block.partition("\n")
        command = _ID.sub("ID", command)
        is_of_epochs = command.startswith(("shmepoch ls", "shmepoch show"))
        labels = re.findall(r"^    ([a-z][a-z, ]*?)(?:  |$)", shown, re.M) if is_of_epochs else []
        failed = "(exit status" in shown and not command.startswith("shmepoch doctor")
        found.append(Typed(command, failed, frozenset(labels)))
    return found


@pytest.mark.timeout(240)  # about forty commands, each of which starts an interpreter
def test_it_is_what_is_shown_today(tmp_path: Path) -> None:
    made = tmp_path / "transcript.md"
    command = [sys.executable, "-m", "tools.transcript", str(made)]
    subprocess.run(command, cwd=_ROOT, check=True, timeout=230)
    today, documented = (typed(path.read_text()) for path in (made, _ROOT / "docs/transcript.md"))
    assert today == documented
    assert any("writer lock" in one.labels for one in today)
