"""The workers of one test run attach to one epoch by the run's id, and hammer it together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.support import segments_in

_ROOT: Final = Path(__file__).parents[2]


def test_the_workers_of_a_run_share_an_epoch(namespace: str, tmp_path: Path) -> None:
    # What xdist tells the workers of this run is not for those of the other.
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.processes.together.plugin"),
            *("--rootdir", tmp_path, "-c", os.devnull, "-p", "no:cacheprovider", "--noconftest"),
            *("--tx", "4*popen", "--dist", "each", "-q", "tests/processes/together/hammer.py"),
        ],
        cwd=_ROOT,
        env=environment | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 passed" in done.stdout
    assert "operations ended, each once" in done.stdout
    assert segments_in(namespace) == []
