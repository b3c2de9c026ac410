"""The effect of logind on shared memory: RemoveIPC, as configured (logind.conf(5)).

RemoveIPC=yes is the default. Then the last logout of a user removes all files of that user in
/dev/shm, even files in use. System users, and users that linger, are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

#: The folders of its configuration, in the order in which they are searched.
FOLDERS: Final = tuple(
    map(Path, ("/etc/systemd", "/run/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd"))
)
_NAME: Final = "logind.conf"
_SECTION: Final = re.compile(r"\[(.*)\]")
_YES: Final = frozenset(("1", "yes", "y", "true", "t", "on"))
_NO: Final = frozenset(("0", "no", "n", "false", "f", "off"))


def removes_ipc(folders: Sequence[Path] = FOLDERS) -> tuple[bool, Path | None]:
    """Whether RemoveIPC is on, and the file that says so; None: it is the default."""
    found: tuple[bool, Path | None] = True, None
    for path in _files(folders):
        for value in _values(path.read_text(errors="replace")):
            if value in _YES or value in _NO:  # logind ignores anything else, too
                found = value in _YES, path
    return found


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    """The files that are read, in order: the last one with a value decides.

    If several folders have a file of one name, only the file in the first folder counts.
    """
    main = [folder / _NAME for folder in folders if (folder / _NAME).is_file()]
    drop_ins: dict[str, Path] = {}
    for folder in reversed(folders):
        drop_ins.update((path.name, path) for path in (folder / f"{_NAME}.d").glob("*.conf"))
    yield from main[:1]
    for _, path in sorted(drop_ins.items()):
        if path.is_file():  # a link to /dev/null takes one away
            yield path


def _values(text: str) -> Iterator[str]:
    section = ""
    for line in text.replace("\\\n", " ").splitlines():
        stripped = line.strip()
        if stripped.startswith(("#", ";")):
            continue
        if heading := _SECTION.fullmatch(stripped):
            section = heading[1]
        key, equals, value = stripped.partition("=")
        if section == "Login" and equals and key.strip() == "RemoveIPC":
            yield value.strip().lower()
