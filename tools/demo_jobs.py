"""Prints the demo's jobs file: shell commands over the installed Python standard library.

Most take milliseconds, some a second or two; a few fail, each in a different way.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator

LIBRARY = shlex.quote(sysconfig.get_path("stdlib"))
PYTHON = shlex.quote(sys.executable)

PACKAGES = ("asyncio", "email", "encodings", "importlib", "json", "multiprocessing", "xml")
MODULES = ("argparse", "ast", "datetime", "inspect", "pickle", "subprocess", "typing")
COMPRESSORS = ("gzip -1", "gzip -9", "bzip2 -9", "xz -1", "xz -6")

#: Every module of the library itself, a few megabytes.
ALL = f"cat {LIBRARY}/*.py"


def main(scratch: str) -> None:
    """Print the commands; they write to `scratch`."""
    print(f"# Commands over {LIBRARY}")
    for command in (*hashing(), *compressing(), *compiling(scratch), *reading(), *failing()):
        print(command)


def hashing() -> Iterator[str]:
    """One command for each package, and one for everything."""
    for package in PACKAGES:
        yield f"find {LIBRARY}/{package} -name '*.py' -exec sha256sum {{}} + | sort | sha256sum"
    yield f"sha256sum {LIBRARY}/*.py | sort -k 2 | tail -n 20"
    yield f"find {LIBRARY} -name '*.py' -exec sha512sum {{}} + | wc -l"


def compressing() -> Iterator[str]:
    """Commands with the compressors of this machine."""
    for compressor in COMPRESSORS:
        if shutil.which(compressor.split()[0]):
            yield f"{ALL} | {compressor} | wc -c"
    yield f"tar -C {LIBRARY} -cf - {' '.join(PACKAGES)} | gzip | wc -c"


def compiling(scratch: str) -> Iterator[str]:
    """Commands that compile; bytecode goes to the scratch folder, and the library does not
    change."""
    into = f"PYTHONPYCACHEPREFIX={shlex.quote(scratch)}"
    for module in MODULES:
        yield f"{into} {PYTHON} -m py_compile {LIBRARY}/{module}.py"
    for package in PACKAGES:
        yield f"{into} {PYTHON} -m compileall -q -f {LIBRARY}/{package}"
    yield f"{PYTHON} -m ast {LIBRARY}/argparse.py | wc -l"
    yield f"{PYTHON} -m tokenize {LIBRARY}/typing.py | awk '{{print $2}}' | sort | uniq -c"


def reading() -> Iterator[str]:
    """Commands that count, sort, search, compare, and print a lot."""
    yield f"wc -lwc {LIBRARY}/*.py | sort -n | tail -n 10"
    yield f"grep -c '' {LIBRARY}/*.py | sort -t : -k 2 -n | tail -n 3"
    yield f"grep -rn --include='*.py' TODO {LIBRARY}/asyncio {LIBRARY}/email | wc -l"
    yield f"grep -rlE --include='*.py' '^class [A-Z]' {LIBRARY}/xml"
    yield f"{ALL} | tr -cs 'A-Za-z' '\\n' | sort | uniq -c | sort -rn | head -n 20"
    yield f"{ALL} | sort -u | wc -l"
    yield f"{ALL} | awk '/^def /{{n++}} END {{print n \" functions\"}}'"
    yield f"{ALL} | sed -n 's/^import //p' | sort | uniq -c | sort -rn | head -n 10"
    yield f"find {LIBRARY} -name '*.py' -size +64k | sort"
    yield f"du -sk {LIBRARY}/asyncio {LIBRARY}/json"
    yield f"cmp {LIBRARY}/ast.py {LIBRARY}/ast.py"
    # Ten megabytes: the library's modules, several times.
    yield f"for again in 1 2 3 4 5 6 7 8 9; do {ALL}; done | head -c 10485760"
    yield "printf 'no UTF-8: \\377\\376\\n'"
    yield "sleep 1.5"


def failing() -> Iterator[str]:
    """Commands that fail: by an exit status, by the shell, by a signal, and by a search and a
    comparison without a match."""
    yield "exit 3"
    yield f"grep -n 'no module says this' {LIBRARY}/os.py"
    yield f"diff {LIBRARY}/ast.py {LIBRARY}/typing.py"
    yield f"cat {LIBRARY}/there_is_no_such_module.py"
    yield "there-is-no-such-program --version"
    yield f"{LIBRARY}/json"
    yield f"echo 'def broken(:' | {PYTHON} -"
    yield f"{PYTHON} -c 'raise SystemExit(42)'"
    yield "kill -TERM $$"


if __name__ == "__main__":
    main(sys.argv[1])
