"""The examples: each runs as it stands, and is as short as the documents say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support import segments_in

_EXAMPLES: Final = Path(__file__).parents[1] / "examples"


def test_the_readme_has_the_smallest_program_as_it_stands() -> None:
    program = (_EXAMPLES / "smallest.py").read_text().partition('"""\n\n')[2]
    assert f"```python\n{program}```" in (_EXAMPLES.parent / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "most_lines", "printed"),
    [
        ("smallest", 15, {"index the repository completed: 1,204 files"}),
        (
            "two_workers",
            20,
            {"index src completed: indexed src", "index docs completed: indexed docs"},
        ),
    ],
)
def test_a_complete_program_is_short(
    namespace: str, name: str, most_lines: int, printed: set[str]
) -> None:
    path = _EXAMPLES / f"{name}.py"
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= most_lines
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.splitlines()) == printed
    assert segments_in(namespace) == []
