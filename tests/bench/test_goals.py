"""The table of goals: met, missed, and not measured."""

from __future__ import annotations

import pytest

from bench.goals import GOALS, Goal, table
from bench.harness import Result

GOAL = Goal("jobs: twice the others", "job", ("one", "two"), 2.0)


def result(skipped: dict[str, str] | None = None, **seconds: float) -> dict[str, Result]:
    """The result of a run for the job."""
    figures = {name: [taken] * 3 for name, taken in seconds.items()}
    return {"job": Result("job", figures=figures, skipped=skipped or {})}


def test_a_goal_is_met_at_its_factor_and_not_below() -> None:
    assert GOAL.row(result(shmepoch=1.0, one=2.0, two=3.0)).endswith("| 2.00 (one) | yes |")
    assert GOAL.row(result(shmepoch=1.0, one=1.9, two=3.0)).endswith("| 1.90 (one) | **no** |")


def test_the_closest_peer_is_the_one_that_did_best() -> None:
    assert "| 2.50 (two) |" in GOAL.row(result(shmepoch=1.0, one=4.0, two=2.5))


def test_the_ratio_is_of_the_same_round() -> None:
    found = {"job": Result("job", figures={"shmepoch": [1.0, 10.0, 1.0], "one": [4.0, 30.0, 3.0]})}

    assert "| 3.00 (one" in GOAL.row(found)  # the medians' ratio would be 4


def test_a_goal_without_one_of_its_peers_says_so() -> None:
    assert "| 3.00 (two; without one) | yes |" in GOAL.row(result(shmepoch=1.0, two=3.0))


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({}, "not in this run"),
        (result(shmepoch=1.0, skipped={"one": "not installed"}), "not installed"),
        (result(one=1.0, two=1.0), "not in this run"),
    ],
)
def test_a_goal_without_its_contestants_is_not_measured(found: dict[str, Result], why: str) -> None:
    assert GOAL.row(found).endswith(f"| not measured: {why} | |")


def test_the_table_has_every_goal() -> None:
    rows = table({}).splitlines()[2:]

    assert len(rows) == len(GOALS)
    assert all("not measured" in row for row in rows)
