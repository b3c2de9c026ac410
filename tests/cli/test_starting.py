"""Ctrl-C while the command starts: most of that is the import of its modules."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.cli.running import COMMAND, DEADLINE_S, nothing_left
from tests.support import eventually

#: Modules that the package imports first and late, and that the command and its subcommands import.
_MODULES = (
    "shmepoch.ids",
    "msgspec",
    "shmepoch.stores",
    "shmepoch.cli",
    "shmepoch.cli.streams",
    "shmepoch.cli.app",
    "typer",
    "rich.live",
)


def _script() -> str:
    script = shutil.which("shmepoch", path=sysconfig.get_path("scripts"))
    assert script is not None
    return script


@contextlib.contextmanager
def _blocked(
    command: Sequence[str], module: str, folder: Path, *, ignoring: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A command that stops at the import of a module, until there is a file "go"."""
    blocking = str(Path(__file__).parent / "blocking")
    environment = {"PYTHONPATH": blocking, "BLOCKED_MODULE": module, "BLOCKED_FOLDER": str(folder)}
    with subprocess.Popen(
        [*command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignoring else None,
    ) as process:
        try:
            eventually(lambda: (folder / "blocked").exists() or process.poll() is not None)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("module", _MODULES)
@pytest.mark.parametrize("script", [False, True])
def test_ctrl_c_during_an_import(namespace: str, tmp_path: Path, module: str, script: bool) -> None:
    command = [_script()] if script else COMMAND
    with _blocked([*command, "run", "-"], module, tmp_path) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out, err) == (130, "", "")
    nothing_left(namespace)


def test_a_job_in_the_background_does_not_hear_it(tmp_path: Path) -> None:
    with _blocked([*COMMAND, "--help"], "typer", tmp_path, ignoring=True) as process:
        process.send_signal(signal.SIGINT)
        (tmp_path / "go").touch()
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")
    assert "history" in out


_LIBRARY = """
import signal
{before}
import shmepoch
assert signal.getsignal(signal.SIGINT) is {expected}, signal.getsignal(signal.SIGINT)
"""


@pytest.mark.parametrize("name", ["program", "shmepoch"])
@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", "signal.default_int_handler"),
        ("handler = lambda *_: None; signal.signal(signal.SIGINT, handler)", "handler"),
    ],
)
def test_other_programs_keep_their_ctrl_c(
    tmp_path: Path, name: str, before: str, expected: str
) -> None:
    (tmp_path / name).write_text(_LIBRARY.format(before=before, expected=expected))
    # Without the folder of the program: there it would be found as the package.
    subprocess.run([sys.executable, "-P", tmp_path / name], check=True)


def test_other_programs_may_import_the_library_in_a_thread(tmp_path: Path) -> None:
    imports = "from concurrent.futures import *; import importlib\n"
    imports += "ThreadPoolExecutor().submit(importlib.import_module, 'shmepoch').result()\n"
    (tmp_path / "shmepoch").write_text(imports)
    subprocess.run([sys.executable, "-P", tmp_path / "shmepoch"], check=True)
