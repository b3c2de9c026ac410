"""The files, definitions and tests that the documents name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def text_of(*patterns: str) -> str:
    return "\n".join(path.read_text() for pattern in patterns for path in _ROOT.glob(pattern))


_SOURCES = text_of("shmepoch/**/*.py", "shmepoch/**/*.pyi", "shmepoch/**/*.c")
#: Classes and functions; those of C stand at the beginning of a line.
_DEFINED = set(re.findall(r"^(?: *class | *def | *async def |)(\w+)[(:]", _SOURCES, re.M))
_INVARIANTS = set(re.findall(r"\b([A-Z]+-\d)[:,]", _SOURCES))
_TESTS = set(re.findall(r"def test_(\w+)\(", text_of("tests/**/test_*.py")))


def pitfalls() -> list[list[str]]:
    """The cells of each row: what happened, what shmepoch does, where, and the tests."""
    page = (_ROOT / "docs/pitfalls.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in row.strip("|").split(" | ")]
        for row in rows
        if not row.startswith(("| what happened |", "| --- |"))
    ]


def is_file(name: str) -> bool:
    return (_ROOT / name).is_file() or (_ROOT / "shmepoch" / name).is_file()


def is_test(name: str) -> bool:
    if name.endswith("..."):
        return any(test.startswith(name.removesuffix("...")) for test in _TESTS)
    return name in _TESTS


def unknown(enforced: str, tests: str) -> Iterator[str]:
    for name in re.split(", | and | in ", enforced.replace("`", "")):
        if not (name in _INVARIANTS or is_file(name) or _DEFINED.issuperset(name.split("."))):
            yield name
    for name in tests.replace("`", "").split(", "):
        if not (is_file(name) or is_test(name)):
            yield name


def test_what_a_pitfall_names_exists() -> None:
    rows = pitfalls()
    assert len(rows) > 100
    assert {len(row) for row in rows} == {4}
    assert [name for _, _, enforced, tests in rows for name in unknown(enforced, tests)] == []


def test_no_pitfall_is_told_twice() -> None:
    told = [row[0] for row in pitfalls()]
    assert len(set(told)) == len(told)
