"""Hides tools of a build from an interpreter that starts with this folder on its path.

The environment has LACKS, a folder with a file for each missing tool, and CALLS, a file that
records a venv instead of making it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

_lacks = set(os.listdir(os.environ["LACKS"]))

if "compiler" in _lacks:
    os.environ["CC"] = "no-such-compiler"
if "headers" in _lacks:
    sysconfig.get_path = lambda *_, **__: "/no/such/folder"
if "venv" in _lacks:
    _find_spec: Any = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: (
        None if name == "ensurepip" else _find_spec(name, *rest)
    )
if sys.orig_argv[1:3] == ["-m", "venv"]:
    with Path(os.environ["CALLS"]).open("a") as calls:
        calls.write("venv\n")
    os._exit(9)
