"""RemoveIPC as systemd reads it: files, their order, and what is written in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shmepoch.monitoring.logind import removes_ipc

_ON, _OFF = "[Login]\nRemoveIPC=yes\n", "[Login]\nRemoveIPC=no\n"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, ...]:
    """The administrator's, the runtime's and the vendor's."""
    return tmp_path / "etc", tmp_path / "run", tmp_path / "usr"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_it_is_on_by_default(folders: tuple[Path, ...]) -> None:
    assert removes_ipc(folders) == (True, None)
    write(folders[0] / "logind.conf", "[Login]\n#RemoveIPC=no\n;RemoveIPC=no\n")
    assert removes_ipc(folders) == (True, None)


@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("[Login]\nRemoveIPC=no\n", False),
        ("[Login]\nRemoveIPC = NO\n", False),
        ("[Login]\n  RemoveIPC=off  \n", False),
        ("[Login]\nRemoveIPC=\\\n0\n", False),
        ("[Login]\nRemoveIPC=no\nRemoveIPC=yes\n", True),
        ("[Login]\nRemoveIPC=no\nRemoveIPC=perhaps\n", False),
        ("[Login]\nRemoveIPC=no\nRemoveIPC=\n", False),
        ("[Manager]\nRemoveIPC=no\n[Login]\nKillUserProcesses=no\n", True),
        ("RemoveIPC=no\n", True),
        ("[Login]\n[Other]\nRemoveIPC=no\n", True),
        ("[Login]\nremoveipc=no\n", True),
        ("\udcff[Login\n", True),
    ],
)
def test_what_is_written_counts(folders: tuple[Path, ...], text: str, on: bool) -> None:
    path = folders[0] / "logind.conf"
    path.parent.mkdir()
    path.write_text(text, errors="surrogateescape")
    assert removes_ipc(folders)[0] is on


def test_the_first_folder_has_the_main_file(folders: tuple[Path, ...]) -> None:
    vendor = write(folders[2] / "logind.conf", _OFF)
    assert removes_ipc(folders) == (False, vendor)
    write(folders[0] / "logind.conf", "[Login]\n")
    assert removes_ipc(folders) == (True, None), "the vendor's is not read any more"


def test_what_is_dropped_in_comes_after_it_in_the_order_of_names(folders: tuple[Path, ...]) -> None:
    write(folders[0] / "logind.conf", _ON)
    early = write(folders[2] / "logind.conf.d" / "10-vendor.conf", _OFF)
    assert removes_ipc(folders) == (False, early)
    late = write(folders[1] / "logind.conf.d" / "20-run.conf", _ON)
    assert removes_ipc(folders) == (True, late)
    write(folders[0] / "logind.conf.d" / "05-admin.conf", _OFF)
    write(folders[0] / "logind.conf.d" / "99-admin.txt", _OFF)
    assert removes_ipc(folders) == (True, late), "whatever its folder, a later name counts"


def test_of_one_name_the_first_folders_counts(folders: tuple[Path, ...]) -> None:
    write(folders[2] / "logind.conf.d" / "10-ipc.conf", _ON)
    admin = write(folders[0] / "logind.conf.d" / "10-ipc.conf", _OFF)
    assert removes_ipc(folders) == (False, admin)
    admin.unlink()
    admin.symlink_to("/dev/null")
    assert removes_ipc(folders) == (True, None), "a link to /dev/null takes it away"
