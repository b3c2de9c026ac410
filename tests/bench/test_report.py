"""The report: units, rows, and skipped contestants."""

from __future__ import annotations

import pytest

from bench import report
from bench.harness import Result


def found() -> Result:
    """A result of the first of the main measures."""
    return Result(
        "advance",
        caveats={"shmepoch": "", "slow": "unsafe"},
        figures={"slow": [3e-6] * 3, "shmepoch": [2e-9] * 3},
        skipped={"absent": "not installed"},
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (2.0, "2 s"),
        (1.0, "1 s"),
        (0.0123, "12.3 ms"),
        (4.5678e-5, "45.7 µs"),
        (1.5e-8, "15 ns"),
        (3e-10, "0.3 ns"),
    ],
)
def test_durations_have_the_unit_that_suits(seconds: float, shown: str) -> None:
    assert report.quantity(seconds, "s") == shown


def test_what_is_no_time_keeps_its_unit() -> None:
    assert report.quantity(65536, "B") == "65,536 B"
    assert report.quantity(0.8, "%") == "0.8 %"


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1e-6, "s", "1 M"),
        (4e-9, "s", "250 M"),
        (2e-5, "s", "50 k"),
        (0.5, "s", "2"),
        (4.0, "s", "0.25"),
        (0.0, "s", ""),
        (65536, "B", ""),
    ],
)
def test_rates_are_of_times_only(value: float, unit: str, shown: str) -> None:
    assert report.rate(value, unit) == shown


def test_every_contestant_has_a_row_and_who_is_skipped_the_reason() -> None:
    rows = [row for row in report.markdown([found()]).splitlines() if row.startswith("| advance |")]

    assert rows == [
        "| advance | slow | 3 µs | 333 k | 0% |  |  | 1.00 | unsafe |",
        "| advance | shmepoch | 2 ns | 500 M | 0% |  |  | 0.00 |  |",
        "| advance | absent | skipped | | | | | | not installed |",
    ]


def test_tails_are_shown_where_there_are_any() -> None:
    result = Result("job", caveats={"one": ""}, figures={"one": [1e-6] * 3})
    result.tails["one"] = [(2e-6, 3e-6)] * 3

    assert "| 2 µs | 3 µs |" in report.markdown([result])


def test_a_table_has_as_many_cells_in_every_row() -> None:
    tables = report.markdown([found()]).split("\n\n")[1:]

    for rows in tables:
        assert len({row.count("|") for row in rows.splitlines()}) == 1, rows


def test_the_main_table_goes_from_fast_to_slow_beside_shmepoch() -> None:
    rows = report.main_table([found(), Result("not one of the main ones")]).splitlines()[2:]

    assert rows == [
        "| advance a cursor | **shmepoch** | 2 ns | 1 |",
        "| advance a cursor | slow (unsafe) | 3 µs | 1,500 |",
    ]
