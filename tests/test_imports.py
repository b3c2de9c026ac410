"""What is imported with the library, and what only with a part that needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["shmepoch", "shmepoch.cli.app"])
def test_asyncio_is_imported_by_its_first_use(module: str) -> None:
    """It takes as long as all the rest, and most workers and most commands never use it."""
    program = f"import sys, {module}; sys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
