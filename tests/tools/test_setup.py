"""tools/setup on machines that lack something: its installations and its messages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

_TREE: Final = Path(__file__).parents[2]
_LACKING: Final = Path(__file__).parent / "lacking"
_VERSION: Final = "python{}.{}".format(*sys.version_info)

#: An apt-get that records its arguments and installs the packages; a simulation prints CHANGES.
_APT_GET: Final = """#!/bin/sh
echo "apt-get $*" >>"$CALLS"
case "$*" in
    *--simulate*) printf '%s\\n' "$CHANGES" "Inst gcc (4:12.2.0-3 Debian:12.5/stable [amd64])" ;;
    *install*) case "$*" in *gcc*) rm -f "$LACKS/compiler" ;; esac
        case "$*" in *-dev*) rm -f "$LACKS/headers" ;; esac
        case "$*" in *-venv*) rm -f "$LACKS/venv" ;; esac ;;
esac
"""
_DPKG_QUERY: Final = '#!/bin/sh\ntest "$PACKAGED" = yes\n'


class Machine:
    """A copy of the files that tools/setup reads, on a machine that lacks things."""

    def __init__(self, folder: Path, *lacks: str) -> None:
        self._bin, self._lacks, self._calls = folder / "bin", folder / "lacks", folder / "calls"
        self.tree = folder / "tree"
        shutil.copytree(_TREE / "tools", self.tree / "tools")
        self._bin.mkdir()
        self._lacks.mkdir()
        for lack in lacks:
            (self._lacks / lack).touch()
        (self._bin / "python3").symlink_to(os.path.realpath(sys.executable))
        for name, text in (("apt-get", _APT_GET), ("dpkg-query", _DPKG_QUERY)):
            (self._bin / name).write_text(text)
            (self._bin / name).chmod(0o755)

    def without(self, *names: str) -> None:
        """Remove commands; those of the system are hidden, too."""
        for name in names:
            (self._bin / name).unlink()
        for name in ("bash", "dirname", "grep", "env"):
            found = shutil.which(name)
            assert found is not None
            (self._bin / name).symlink_to(found)
        self._path = str(self._bin)

    _path = ""

    def setup(self, *, root: bool, packaged: bool, changes: str = "") -> str:
        """Run it; returns its output. It ends where it would make the venv, or before."""
        # In a new user namespace any user can be root, and root can be another user.
        as_user = ["unshare", "--user", *(["--map-root-user"] if root else [])]
        if subprocess.run([*as_user, "true"], capture_output=True, check=False).returncode:
            pytest.skip("this machine does not let this user have a user namespace")
        unshare = shutil.which("unshare")
        assert unshare is not None
        done = subprocess.run(
            [unshare, *as_user[1:], "/bin/bash", self.tree / "tools" / "setup"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={
                "PATH": self._path or f"{self._bin}:{os.defpath}",
                "PYTHONPATH": str(_LACKING),
                "LACKS": str(self._lacks),
                "CALLS": str(self._calls),
                "CHANGES": changes,
                "PACKAGED": "yes" if packaged else "no",
            },
        )
        assert done.returncode in (1, 9)
        return done.stderr

    def calls(self) -> list[str]:
        """The calls of apt-get, in order, and "venv" if it went on to make that."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.mark.parametrize(
    ("lacks", "packages"),
    [
        (("compiler", "headers", "venv"), f"gcc libc6-dev {_VERSION}-dev {_VERSION}-venv"),
        (("headers",), f"{_VERSION}-dev"),
        (("venv",), f"{_VERSION}-venv"),
        (("compiler",), "gcc libc6-dev"),
    ],
)
def test_root_gets_what_the_own_interpreter_lacks(
    tmp_path: Path, lacks: tuple[str, ...], packages: str
) -> None:
    machine = Machine(tmp_path, *lacks)
    said = machine.setup(root=True, packaged=True)
    update, simulated, installed, venv = machine.calls()
    assert update.startswith("apt-get update")
    assert "--simulate" in simulated
    for call in (simulated, installed):
        assert call.startswith("apt-get install ")
        assert "--no-upgrade" in call.split()
        assert call.endswith(f" {packages}")
    assert venv == "venv"
    assert f"installing {packages}" in said


@pytest.mark.parametrize(
    "changes",
    [
        "Inst python3.11 [3.11.2-6] (3.11.2-6+deb12u6 Debian:12.5/stable [amd64])",
        "Remv python3-distro [1.8.0-1]",
    ],
)
def test_nothing_that_is_there_is_changed(tmp_path: Path, changes: str) -> None:
    """Not even a dependency of a package, to which --no-upgrade does not apply."""
    machine = Machine(tmp_path, "headers")
    said = machine.setup(root=True, packaged=True, changes=changes)
    assert [call for call in machine.calls() if "--simulate" not in call] == ["apt-get update -qq"]
    assert changes in said
    assert "nothing was installed" in said


@pytest.mark.parametrize("lacks", [("headers",), ("venv",), ("compiler", "headers")])
@pytest.mark.parametrize("root", [True, False])
def test_nothing_is_installed_for_another_interpreter(
    tmp_path: Path, lacks: tuple[str, ...], root: bool
) -> None:
    machine = Machine(tmp_path, *lacks)
    said = machine.setup(root=root, packaged=False)
    assert machine.calls() == []
    assert f"bin/python3 lacks what a build takes ({', '.join(lacks)})" in said
    assert "PYTHON=/usr/bin/python3" in said
    assert "apt-get" not in said


def test_root_gets_a_compiler_for_any_interpreter(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "compiler")
    machine.setup(root=True, packaged=False)
    assert machine.calls()[2].endswith(" gcc libc6-dev")
    assert machine.calls()[3:] == ["venv"]


def test_another_user_is_told_what_root_may_install(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "compiler", "venv")
    said = machine.setup(root=False, packaged=True)
    assert machine.calls() == []
    assert f"'apt-get install gcc libc6-dev {_VERSION}-venv' as root" in said


def test_where_nothing_is_lacking_nothing_is_installed(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.setup(root=True, packaged=True)
    assert machine.calls() == ["venv"]


def test_a_machine_without_apt_get_is_told_what_it_takes(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "headers")
    machine.without("apt-get", "dpkg-query")  # and without a compiler
    said = machine.setup(root=True, packaged=False)
    assert machine.calls() == []
    assert "lacks what a build takes (compiler, headers)" in said
    assert "elsewhere, install a C compiler and this interpreter's headers" in said
