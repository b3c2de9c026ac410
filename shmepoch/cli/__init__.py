"""The `shmepoch` command: what a user types, and what it shows."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line; exits with its status."""
    try:
        from shmepoch.cli.app import app

        app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit("the shmepoch command needs its extra: pip install 'shmepoch[cli]'")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
