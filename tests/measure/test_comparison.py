"""Intervals and verdicts: by hand, by property, and by thousands of comparisons of identical code."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanexp.measure.comparison import (
    RUNS_FLOOR,
    STEPS_FLOOR,
    Comparison,
    compare,
    compare_all,
    median_interval,
    median_of,
    student_quantile,
)

STEADY = [
    [100.0, 100.5, 99.5, 100.2, 99.8],
    [100.3, 100.8, 99.8, 100.5, 100.1],
    [99.7, 100.2, 99.2, 99.9, 99.5],
]


def times(factor: float, runs: list[list[float]] = STEADY) -> list[list[float]]:
    return [[factor * value for value in run] for run in runs]


def machine(
    rng: np.random.Generator, *, runs: int, speed: float, drift: float, noise: float, cells: int
) -> list[list[list[float]]]:
    """Cells of a sweep of identical code: drift between runs, a trend within them, noise, now and then a spike."""
    found = []
    for _ in range(cells):
        cell = []
        for _ in range(runs):
            steps = 100 * speed * np.exp(rng.normal(0, drift)) * np.exp(rng.normal(0, noise, 5))
            steps *= 1 + 0.01 * rng.random() * np.linspace(0, 1, 5)
            steps *= np.where(rng.random(5) < 0.05, 1 + rng.uniform(0.05, 0.3, 5), 1)
            cell.append([float(step) for step in steps])
        found.append(cell)
    return found


@pytest.mark.parametrize("runs", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("drift", "noise", "speed"),
    [(0.003, 0.002, 0.003), (0.01, 0.003, 0.005), (0.03, 0.01, 0.01), (0.05, 0.08, 0.03)],
)
def test_identical_code_raises_no_alarm(runs: int, drift: float, noise: float, speed: float) -> None:
    """120 reports of 16 cells each; drift and noise relative, speed: of the whole machine from day to day."""
    rng = np.random.default_rng([runs, round(1000 * drift)])
    false_reports = 0
    for _ in range(120):
        days = np.exp(rng.normal(0, speed, 2))
        before, now = (
            machine(rng, runs=runs, speed=float(day), drift=drift, noise=noise, cells=16) for day in days
        )
        verdicts = Counter(found.verdict for found in compare_all(list(zip(before, now, strict=True))))
        false_reports += bool(verdicts["slower"] or verdicts["faster"])
    assert false_reports <= 1  # of 120, at 16 verdicts each


def test_a_real_regression_is_found() -> None:
    """10 % with three runs a side, on a machine as steady as a GPU; one cell of many, and all of them."""
    rng = np.random.default_rng(7)
    found = {"one": 0, "all": 0}
    for _ in range(40):
        before, now = (machine(rng, runs=3, speed=1, drift=0.003, noise=0.002, cells=16) for _ in range(2))
        slow = [times(1.1, now[0]), *now[1:]]
        verdicts = [c.verdict for c in compare_all(list(zip(before, slow, strict=True)))]
        found["one"] += verdicts[0] == "slower" and not {"slower", "faster"} & set(verdicts[1:])
        all_slow = [times(1.1, cell) for cell in now]
        verdicts = [c.verdict for c in compare_all(list(zip(before, all_slow, strict=True)))]
        found["all"] += verdicts.count("slower") >= 12
    assert found["one"] >= 32
    assert found["all"] >= 32


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, "same"), (1.2, "slower"), (1 / 1.2, "faster"), (0.5, "faster"), (1.03, "unclear")],
)
def test_verdicts_over_runs(factor: float, verdict: str) -> None:
    found = compare(STEADY, times(factor))
    assert (found.verdict, found.over) == (verdict, "runs")
    assert found.ratio == pytest.approx(factor)
    assert found.low is not None and found.high is not None and found.low < factor < found.high


def test_one_run_a_side_asks_for_more() -> None:
    one, other = STEADY[:1], times(1.08, STEADY[1:2])
    found = compare(one, other)
    assert (found.verdict, found.over, found.floor) == ("unclear", "steps", STEPS_FLOOR)
    assert compare(one, times(1.3, STEADY[1:2])).verdict == "slower"
    assert compare(STEADY, times(1.08)).verdict == "slower"  # the same with repeats
    assert compare(STEADY, times(1.08)).floor == RUNS_FLOOR


def test_too_few_samples_are_unclear() -> None:
    found = compare([[100.0, 101.0]], [[300.0, 301.0, 302.0]])
    assert (found.verdict, found.low, found.high) == ("unclear", None, None)
    assert "too few samples" in str(found)
    with pytest.raises(ValueError, match="no samples"):
        compare([[]], STEADY)


def test_noisy_steps_raise_the_floor() -> None:
    noisy = [[100.0, 120.0, 80.0, 130.0, 90.0]]
    assert compare(noisy, times(1.4, noisy)).verdict == "unclear"
    assert compare(noisy, times(1.4, noisy)).floor > 0.5


def test_more_verdicts_in_a_table_are_wider() -> None:
    one, many = compare(STEADY, STEADY), compare(STEADY, STEADY, comparisons=50)
    assert one.low is not None and many.low is not None and many.low < one.low


def test_the_same_data_gives_the_same_numbers() -> None:
    assert compare(STEADY, times(1.01)) == compare(STEADY, times(1.01))
    assert median_interval(STEADY) == median_interval(STEADY)


@given(
    st.lists(st.lists(st.floats(1, 1e6), min_size=1, max_size=6), min_size=1, max_size=6),
    st.lists(st.lists(st.floats(1, 1e6), min_size=1, max_size=6), min_size=1, max_size=6),
    st.floats(1e-3, 1e3),
)
def test_properties(baseline: list[list[float]], candidate: list[list[float]], unit: float) -> None:
    found = compare(baseline, candidate)
    if found.low is not None and found.high is not None:
        assert found.low <= found.ratio * (1 + 1e-9) and found.ratio <= found.high * (1 + 1e-9)
    in_unit = compare(times(unit, baseline), times(unit, candidate))
    assert in_unit.ratio == pytest.approx(found.ratio)
    interval = median_interval(baseline)
    assert interval.low <= interval.median == median_of(baseline) <= interval.high


def test_interval_covers_the_median() -> None:
    """At least 93 of 100 95 % intervals over three runs hold the true median."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(1000):
        interval = median_interval([[float(value)] for value in rng.normal(100, 2, 3)])
        inside += interval.low <= 100 <= interval.high
    assert inside >= 930


def test_student_quantiles() -> None:
    """Against the tables that every textbook prints."""
    for freedom, expected in (
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (10, 2.228),
        (30, 2.042),
    ):
        assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-4)
    assert student_quantile(0.975, 10_000) == pytest.approx(1.960, abs=1e-3)


def test_words() -> None:
    assert (
        str(Comparison(0.5, 0.49, 0.52, "runs", 0.03, "faster"))
        == "faster: -50.0 % (-51.0 to -48.0) over runs"
    )
    assert math.isclose(compare(STEADY, times(2)).ratio, 2)
