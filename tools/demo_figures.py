"""Counts the notices in a demo run's transcripts, and checks the run's summary."""

from __future__ import annotations

import json
import sys
from pathlib import Path

OUTCOMES = ("completed", "failed", "terminated", "cancelled")


def main(folder: Path) -> None:
    """Print the line of figures; exit 1 if a notice was lost or the summary does not add up."""
    summary = json.loads((folder / "summary.json").read_text())
    delivered = duplicates = lost = 0
    for session in summary["sessions"]:
        seqs = told(folder / f"{session['session_id']}.jsonl")
        delivered += len(set(seqs))
        duplicates += len(seqs) - len(set(seqs))
        lost += session["watermark"] - len(set(seqs))
    print(
        f"{summary['commands']} commands, {delivered} notices delivered, "
        f"{duplicates} duplicates, {lost} lost"
    )
    operations = summary["operations"]
    if lost:
        sys.exit(f"{lost} notices are in no transcript")
    if summary["notices"] != {"delivered": delivered, "duplicates": duplicates, "lost": lost}:
        sys.exit(f"the summary counts other notices: {summary['notices']}")
    if operations != summary["commands"] + summary["retried"]:
        sys.exit(f"{operations} operations are not the commands and those run again: {summary}")
    if operations != delivered or operations != sum(summary[outcome] for outcome in OUTCOMES):
        sys.exit(f"{operations} operations do not have one outcome and one notice each: {summary}")


def told(transcript: Path) -> list[int]:
    """The sequences of a transcript's notices, in order; a gap is not a notice."""
    notices = [json.loads(line) for line in transcript.read_text().splitlines()]
    return [notice["seq"] for notice in notices if "after_seq" not in notice]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
