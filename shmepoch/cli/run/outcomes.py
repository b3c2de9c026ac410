"""How a command ended, as text in its operation: for people, and parsed again by the run.

A text that was cut is longer than the limit, because of its mark. So complete output is never taken
for a cut one.
"""

from __future__ import annotations

import re
import signal
from typing import Final, NamedTuple

from shmepoch.epoch.completions import CompletionEntry
from shmepoch.epoch.operations import Completed, Failed

#: How many bytes of the end of a command's output its operation keeps, as UTF-8.
TAIL_BYTES: Final = 4096
#: How many bytes of a command, or of a line of output, tables show.
NAME_BYTES: Final = 200

_ELLIPSIS: Final = "…"
_MARK: Final = re.compile(r"\[the end of (\d+) bytes\]\n")
_FAILURE: Final = re.compile(r"(?:exit status (\d+)|killed by (\S+)) after (\d+) ms\n")


class Ending(NamedTuple):
    """How a command ended; None for facts that are not in its outcome."""

    exit_status: int | None = None
    signal: str | None = None
    duration_ms: int | None = None
    #: The end of its output.
    output: str = ""
    #: The bytes of the whole output, if `output` is not all of it.
    output_bytes: int | None = None


def named(command: str) -> str:
    """The name of a command in tables; marked if it is cut."""
    return command if _fits(command, NAME_BYTES) else head(command, NAME_BYTES) + _ELLIPSIS


def name_is_cut(name: str) -> bool:
    """Whether this name is the beginning of a longer command."""
    return not _fits(name, NAME_BYTES)


def kept(output: str, size: int) -> str:
    """The kept end of an output of `size` bytes; marked if it is not all."""
    if size <= TAIL_BYTES and _fits(output, TAIL_BYTES):
        return output
    tail = output.encode()[-TAIL_BYTES:].decode(errors="ignore")
    return f"[the end of {size} bytes]\n{tail}"


def failure(status: int, duration_ms: int, output: str) -> str:
    """The error of an operation whose command ended with `status`, with the kept output."""
    how = f"exit status {status}" if status > 0 else f"killed by {_signal_name(-status)}"
    return f"{how} after {duration_ms} ms\n{output}"


def ending(entry: CompletionEntry) -> Ending:
    """How a command ended, from its completion."""
    match entry.terminal_outcome:
        case Completed(result):
            output, size = _unmarked(result.content)
            return Ending(0, None, result.duration_ms, output, size)
        case Failed(error) if found := _FAILURE.match(error):
            status, name, duration = found.groups()
            output, size = _unmarked(error[found.end() :])
            return Ending(
                None if status is None else int(status), name, int(duration), output, size
            )
        case _:
            return Ending()


def head(text: str, limit: int) -> str:
    """The beginning of `text` that fits `limit` bytes."""
    return text.encode()[:limit].decode(errors="ignore")


def _fits(text: str, limit: int) -> bool:
    return len(text.encode()) <= limit


def _unmarked(text: str) -> tuple[str, int | None]:
    """The output, and its whole length if this is not all of it."""
    found = None if _fits(text, TAIL_BYTES) else _MARK.match(text)
    return (text, None) if found is None else (text[found.end() :], int(found[1]))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
