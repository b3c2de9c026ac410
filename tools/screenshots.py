"""Takes pictures of `shmepoch watch` while real processes work; see `tools/screenshots`.

There is a run of commands in several sessions, whose agents and workers are killed now and then,
and one of whose agents is stopped; and epochs that were abandoned, sealed and damaged.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shmepoch import RuntimeSessionAdapter, SessionId
from shmepoch import _native as at
from shmepoch.cli.watch.app import WatchApp
from shmepoch.cli.watch.reading import EpochReader, Reader
from shmepoch.memory.files import SHM_DIR
from shmepoch.memory.participants import Role
from shmepoch.memory.segment import ObservedSegment
from shmepoch.monitoring.epochs import EpochState

PICTURES: Final = Path(__file__).parents[1] / "docs" / "pictures"
SIZES: Final = {"epochs": (120, 14), "epoch": (132, 26)}
#: How long the sparklines fill, and how long the agent is stopped then.
FILL_S: Final = 50.0
STOPPED_S: Final = 12.0
#: What the commands are called with; each of them is a script that takes a while.
COMMANDS: Final = {
    "index": ("src/epoch", "src/memory", "src/runtime", "tests", "docs"),
    "lint": ("src", "tests", "bench", "tools"),
    "fetch": ("12 pages", "40 pages", "the changelog", "the issues"),
    "render": ("report.html", "figures.svg", "slides.pdf"),
}
#: Each script reports what it does.
SCRIPT: Final = """#!/usr/bin/env bash
if ((RANDOM % 30 == 0)); then rounds=60; else rounds=$((RANDOM % 14 + 2)); fi
for ((round = 1; round <= rounds; round++)); do
    echo "$round of $rounds"
    sleep 0.25
done
exit $((RANDOM % 20 == 0 ? 3 : 0))
"""
#: As a terminal has it; pictures in a page load no fonts.
FONTS: Final = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@contextlib.contextmanager
def run(folder: Path, sessions: int) -> Iterator[None]:
    """A run of these commands."""
    for name in COMMANDS:
        script = folder / name
        script.write_text(SCRIPT)
        script.chmod(0o700)
    every = [f"{name} {what}" for name, subjects in COMMANDS.items() for what in subjects]
    jobs = folder / "jobs"
    jobs.write_text("\n".join(random.choices(every, k=2000)))
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "shmepoch", "run", str(jobs), "--sessions", str(sessions)),
            *("--workers", "3", "--kill-every", "3", "--retries", "3"),
        ],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield
        finally:
            process.terminate()


def leave(*, sealed: bool = False, damaged: bool = False) -> None:
    """Leave an epoch behind, by a process that is killed."""
    pid = os.fork()
    if pid == 0:
        segment = RuntimeSessionAdapter.ephemeral().prepare_bindings(SessionId.new())._segment
        if sealed:
            segment.seal()
        if damaged:
            segment.memory.store(at.CHECKSUM_AT, 0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


@contextlib.contextmanager
def stopped_agent(namespace: str, session_id: SessionId) -> Iterator[None]:
    """Stop a session's agent, so that its cursor falls behind."""
    segment = ObservedSegment.peek(namespace, session_id)
    agents = [one for one in segment.participants.list() if one.role is Role.AGENT and one.alive]
    segment.close()
    for one in agents:
        os.kill(one.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for one in agents:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGCONT)


async def take(namespace: str) -> dict[str, str]:
    """The pictures, after a while in which the sparklines fill."""
    taken = {}
    reader = Reader(namespace)
    app = WatchApp(namespace, interval=1.0, summaries=reader, epoch=EpochReader)
    async with app.run_test(size=SIZES["epochs"]) as pilot:
        await asyncio.sleep(FILL_S)
        session_id = max(
            (one for one in reader.summaries() if one.state is EpochState.OPEN),
            key=lambda one: one.watermark,
        ).session_id
        with stopped_agent(namespace, session_id):
            await asyncio.sleep(STOPPED_S)
            taken["epochs"] = app.export_screenshot(title="shmepoch watch")
            await pilot.resize_terminal(*SIZES["epoch"])
            await app.open((namespace, session_id))
            await asyncio.sleep(STOPPED_S)
            taken["epoch"] = app.export_screenshot(title="shmepoch watch")
    reader.close()
    return taken


def in_own_fonts(picture: str) -> str:
    """The picture without fonts from elsewhere."""
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    return re.sub(r"font-family: ?[^;]*;", f"font-family: {FONTS};", picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=PICTURES)
    into: Path = parser.parse_args().into
    namespace = os.environ["SHMEPOCH_NAMESPACE"] = f"pictures-{secrets.token_hex(4)}"
    folder = Path(tempfile.mkdtemp())
    try:
        leave()
        leave(sealed=True)
        leave(damaged=True)
        with run(folder, sessions=5):
            pictures = asyncio.run(take(namespace))
    finally:
        for path in SHM_DIR.glob(f"shmepoch.{namespace}.*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder)
    into.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (into / f"watch-{name}.svg").write_text(in_own_fonts(picture))


if __name__ == "__main__":
    main()
