"""`shmepoch doctor`: whether this machine is fit for shmepoch, and what to do if not."""

from __future__ import annotations

import sys

from shmepoch.cli.exits import NOT_WELL, reporting
from shmepoch.cli.options import Json
from shmepoch.cli.streams import print_json, visible
from shmepoch.monitoring.machine import Level, examine


def doctor(json: Json = False) -> None:
    """Say whether this machine, and this user on it, are fit for shmepoch.

    It looks at shared memory and what lies there, at limits, at what may remove epochs, and tries
    what it needs of the kernel. It changes nothing.

    Examples:

        shmepoch doctor
        shmepoch doctor --json

    Exit status: 0 if there is no problem, 1 if there is one.
    """
    problems = False
    with reporting():
        for finding in examine():
            problems = problems or finding.level is Level.PROBLEM
            if json:
                print_json(finding.to_json())
                continue
            print(visible(f"{finding.level:8} {finding.check}: {finding.found}"))
            if finding.advice is not None:
                print(visible(f"{'':8} -> {finding.advice}"))
    if problems:
        sys.exit(NOT_WELL)
