"""OPS-4: a transition becomes true by exactly one store. A build that counts commits checks it."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

import pytest

from tests.memory.commits import CASES

_TREE: Final = Path(__file__).parents[2]
_SOURCES: Final = sorted((_TREE / "shmepoch" / "native").glob("*.c"))

#: A program that uses the module at a path as the native one.
_COUNT: Final = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("shmepoch._native", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from tests.memory import commits
assert commits.at is module
commits.main()
"""


def build(folder: Path) -> Path:
    """The native module, which counts commits, compiled for this interpreter."""
    target = folder / "_native.so"
    options = ["-std=c11", "-fPIC", "-shared", "-fvisibility=hidden", "-DSHMEPOCH_AUDIT"]
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        options.append("-DPy_LIMITED_API=0x030B0000")
    compiler = sysconfig.get_config_var("CC").split()
    files = [f"-I{sysconfig.get_path('include')}", *map(str, _SOURCES), "-o", str(target)]
    subprocess.run([*compiler, *options, *files], check=True)
    return target


@pytest.mark.skipif(not _SOURCES, reason="the module was installed without its sources")
def test_a_transition_makes_one_commit_and_a_refused_one_none(tmp_path: Path) -> None:
    """Several starts make one commit each, and the end of an epoch makes its own."""
    counting = subprocess.run(
        [sys.executable, "-c", _COUNT, build(tmp_path)],
        cwd=_TREE,
        check=True,
        stdout=subprocess.PIPE,
    )
    assert json.loads(counting.stdout) == {name: case.commits for name, case in CASES.items()}
