"""The floors: the time of the machine itself for a job, measured in C."""

from __future__ import annotations

import subprocess
import sysconfig
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

_HERE: Final = Path(__file__).parent


def build(stack: ExitStack, name: str) -> Path:
    """The program of that name, compiled into a folder that is removed with `stack`."""
    program = Path(stack.enter_context(TemporaryDirectory())) / name
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    source = _HERE / f"{name}.c"
    subprocess.run([*compiler, "-std=gnu11", "-O2", source, "-o", program, "-lrt"], check=True)
    return program


def seconds(program: Path, *arguments: object) -> list[float]:
    """The figures that the program prints, one in nanoseconds on each line; in seconds."""
    done = subprocess.run(
        [program, *map(str, arguments)], check=True, capture_output=True, text=True, timeout=120
    )
    return [float(line) * 1e-9 for line in done.stdout.split()]


def figure(program: Path, *arguments: object) -> float:
    """The one figure that the program prints, in seconds."""
    (one,) = seconds(program, *arguments)
    return one
