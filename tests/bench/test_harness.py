"""The benchmarks' harness: rounds, ratios, and the tables it ends with."""

from __future__ import annotations

import pytest

from bench.harness import Contestant, Measure, Skipped, run


def silent(_: str) -> None:
    """Says nothing."""


def test_contestants_take_turns_and_ratios_are_of_the_same_round() -> None:
    order: list[str] = []

    def taking(name: str, factor: float) -> Contestant:
        def sample() -> float:
            order.append(name)
            # The later rounds are ten times as slow for all contestants.
            return factor * (10 if len(order) > 8 else 1)

        return Contestant(name, sample)

    (result,) = run([Measure("job", [taking("one", 1.0), taking("two", 2.0)])], 6, silent)

    assert order[:6] == ["one", "two", "one", "two", "two", "one"]  # the first two warm up
    assert len(result.figures["one"]) == len(result.figures["two"]) == 6
    assert result.ratio("two", "one") == pytest.approx(2.0)


def test_a_sample_of_many_figures_has_tails() -> None:
    sample = [float(n) for n in range(1, 1001)]

    (result,) = run([Measure("job", [Contestant("one", lambda: sample)])], 3, silent)

    assert result.median("one") == pytest.approx(500.5)
    assert result.tail("one") == pytest.approx((990, 999), abs=1)


def test_who_is_skipped_is_told_with_the_reason() -> None:
    measure = Measure("job", [Contestant("one", lambda: 1.0), Skipped("two", "not installed")])

    (result,) = run([measure], 3, silent)

    assert result.skipped == {"two": "not installed"}
    assert list(result.figures) == ["one"]
