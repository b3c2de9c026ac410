"""Runs `shmepoch metrics`, and reads what it serves."""

from __future__ import annotations

import contextlib
import re
import subprocess
import urllib.request
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

from tests.cli.running import COMMAND, DEADLINE_S


@contextlib.contextmanager
def serving(*arguments: str, before: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """The command, on a port of its own; `before` is what starts it."""
    with subprocess.Popen(
        [*before, *COMMAND, "metrics", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def url_of(process: subprocess.Popen[str]) -> str:
    """Where it serves, once it does."""
    assert process.stderr is not None
    said = process.stderr.readline()
    found = re.fullmatch(r"shmepoch: serving (http://\S+/metrics)\n", said)
    assert found, said + process.stderr.read()
    return found[1]


def scrape(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Each series and its value."""
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(url: str, name: str, **labels: str) -> float | None:
    """The value of one series."""
    return scrape(url).get((f"shmepoch_{name}", frozenset(labels.items())))
