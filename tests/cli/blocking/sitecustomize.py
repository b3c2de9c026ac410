"""Stops the import of a module: where an interpreter starts with this folder on its path.

The environment has BLOCKED_MODULE, and BLOCKED_FOLDER, in which a file "blocked" says that the
import has come there; a file "go" lets it go on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_FOLDER = Path(os.environ["BLOCKED_FOLDER"])


class _Blocking:
    """A finder that finds nothing."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if name == os.environ["BLOCKED_MODULE"]:
            (_FOLDER / "blocked").touch()
            while not (_FOLDER / "go").exists():
                time.sleep(0.01)


sys.meta_path.insert(0, _Blocking)
