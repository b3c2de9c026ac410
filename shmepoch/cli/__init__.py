"""The `shmepoch` command: its options and its output."""

from __future__ import annotations

import sys

from shmepoch import starting


def main() -> None:
    """Run the command line; exits with its status."""
    starting.end_on_interrupt()
    from shmepoch.cli import exits, logs, streams

    streams.prepare()
    logs.Log().configure()  # until the options say otherwise
    try:
        try:
            from shmepoch.cli.app import app

            app(prog_name="shmepoch")
        finally:
            sys.stdout.flush()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit("the shmepoch command needs its extra: pip install 'shmepoch[cli]'")
    except BrokenPipeError:
        streams.reader_left()
    except OSError as error:
        error.filename = error.filename or "standard output"  # the commands report all other errors
        streams.complain(error)
        streams.discard()
        sys.exit(exits.NOT_CARRIED_OUT)
    except KeyboardInterrupt:
        sys.exit(starting.INTERRUPTED)
