"""Are two cells different, or is it noise? Intervals of medians by bootstrap, and a verdict. Pure.

The unit is the run: what differs between two runs of one config (placement, temperature, clocks) does not show
in the steps of either. So three runs or more a side are compared by their medians; with fewer there are only
steps, and the verdict then asks for a difference that no drift between runs explains. docs/reviewing.md has the
false alarm rates, tests/measure/test_comparison.py the simulation behind them.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from wanexp.measure.statistics import summarise_samples

Runs = Sequence[Sequence[float]]  # the samples of each run of a cell

CONFIDENCE = 0.95  # of an interval; of all verdicts of a table together
MIN_RUNS = 3  # a side, to compare runs
MIN_SAMPLES = 3  # below this there is no interval
SAME_MARGIN = 0.03  # a difference up to this is none
RUNS_FLOOR = 0.03  # a difference between runs up to this is no verdict
STEPS_FLOOR = 0.10  # the same where there are only steps: drift between runs is then unknown
STEPS_FLOOR_IQRS = 3.0  # and this many relative IQRs of the steps of the noisier side; of runs: one
SCATTER_FLOOR = 6.0  # robust standard deviations of the ratios in one table, where they are many
MIN_SCATTER = 5
MAX_SPREAD = 1.5  # of an interval of a ratio, high over low: one that is wider, and unclear, says nothing
RESAMPLES = 2000
SEED = 20261122


@dataclass(frozen=True)
class Interval:
    """A median and its bootstrap interval, in the samples' unit. over: `runs` or `steps`, n of them."""

    median: float
    low: float
    high: float
    n: int
    over: str


@dataclass(frozen=True)
class Comparison:
    """Candidate over baseline. low, high: interval of the ratio, None where there are too few samples."""

    ratio: float
    low: float | None
    high: float | None
    over: str
    floor: float
    verdict: str

    @property
    def says_nothing(self) -> bool:
        """Whether noise hides even about how much it is. Of too few samples nobody knows."""
        if self.low is None or self.high is None:
            return False
        return self.verdict == "unclear" and self.high > MAX_SPREAD * self.low

    @property
    def difference(self) -> str:
        """`-49.7 % (-50.5 to -48.4)`, of the time."""
        change = f"{(self.ratio - 1) * 100:+.1f} %"
        if self.low is None or self.high is None:
            return f"{change} (too few samples)"
        if self.high > 10:
            return f"{change} (noise allows anything)"
        return f"{change} ({(self.low - 1) * 100:+.1f} to {(self.high - 1) * 100:+.1f})"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.difference} over {self.over}"


def median_of(runs: Runs) -> float:
    """Median of the runs' medians; of all steps where there are fewer than three runs. ValueError for none."""
    return statistics.median(_units(runs, by_run=_by_run(runs)))


def median_interval(runs: Runs, *, confidence: float = CONFIDENCE) -> Interval:
    """The median of `runs` with its interval; low and high are the median itself below three samples."""
    by_run = _by_run(runs)
    units = _units(runs, by_run=by_run)
    over, median = "runs" if by_run else "steps", statistics.median(units)
    if len(units) < MIN_SAMPLES:
        return Interval(median, median, median, len(units), over)
    low, high = _bounds(_bootstrap_medians(units, side=0), median, (len(units),), confidence)
    return Interval(median, max(low, 0.0), high, len(units), over)


def compare_all(pairs: Sequence[tuple[Runs, Runs]]) -> list[Comparison]:
    """Verdicts on (before, now) of the cells of two sweeps, which are alike unless something changed.

    Where the ratios of many cells scatter, that scatter is noise which no cell can know of alone: a verdict then
    asks for more than SCATTER_FLOOR times it. One cell that regressed hardly moves it, nor do all by the same.
    """
    floor = 0.0
    if len(pairs) >= MIN_SCATTER:
        logs = [math.log(median_of(now) / median_of(before)) for before, now in pairs]
        middle = statistics.median(logs)
        deviation = 1.4826 * statistics.median(abs(value - middle) for value in logs)  # normal: its sigma
        floor = math.expm1(SCATTER_FLOOR * deviation)
    return [compare(before, now, comparisons=len(pairs), floor=floor) for before, now in pairs]


def compare(baseline: Runs, candidate: Runs, *, comparisons: int = 1, floor: float = 0.0) -> Comparison:
    """The verdict on `candidate`, whose samples are times: less is faster.

    comparisons: how many verdicts stand in the same table; each is given at the confidence that keeps the
    chance of any false one among them at 1 - CONFIDENCE (Bonferroni). floor: a relative difference up to this is
    no verdict; the built-in floors hold anyway.
    """
    by_run = _by_run(baseline) and _by_run(candidate)
    sides = [_units(runs, by_run=by_run) for runs in (baseline, candidate)]
    over = "runs" if by_run else "steps"
    medians = [statistics.median(side) for side in sides]
    ratio = medians[1] / medians[0]
    noise = max(_step_noise(runs) for runs in (baseline, candidate))
    floor = max(floor, *((RUNS_FLOOR, noise) if by_run else (STEPS_FLOOR, STEPS_FLOOR_IQRS * noise)))
    sizes = tuple(map(len, sides))
    if min(sizes) < MIN_SAMPLES:
        return Comparison(ratio, None, None, over, floor, "unclear")
    logs = [np.log(_bootstrap_medians(side, side=number)) for number, side in enumerate(sides)]
    bounds = _bounds(logs[1] - logs[0], math.log(ratio), sizes, 1 - (1 - CONFIDENCE) / comparisons)
    low, high = (math.exp(min(bound, 700.0)) for bound in bounds)
    return Comparison(ratio, low, high, over, floor, _verdict(low, high, floor))


def _verdict(low: float, high: float, floor: float) -> str:
    """From the interval of the ratio. Slower by x and faster by x are judged alike: 1 + x and 1 / (1 + x)."""
    if high < 1 / (1 + floor):
        return "faster"
    if low > 1 + floor:
        return "slower"
    same = low >= 1 / (1 + SAME_MARGIN) and high <= 1 + SAME_MARGIN
    return "same" if same else "unclear"


def _by_run(runs: Runs) -> bool:
    return sum(1 for run in runs if run) >= MIN_RUNS


def _units(runs: Runs, *, by_run: bool) -> list[float]:
    if by_run:
        return [statistics.median(run) for run in runs if run]
    units = [value for run in runs for value in run]
    if not units:
        raise ValueError("no samples to compare")
    return units


def _step_noise(runs: Runs) -> float:
    """Relative IQR of the steps within a run; the median over the runs."""
    summaries = [summarise_samples(run) for run in runs if run]
    return statistics.median(summary.iqr / summary.median for summary in summaries)


def _bootstrap_medians(values: Sequence[float], *, side: int) -> np.ndarray:
    """Medians of RESAMPLES resamples of `values`; the two sides of a comparison are drawn apart."""
    return np.median(np.asarray(values)[_draws(len(values), side)], axis=1)


@lru_cache(maxsize=64)
def _draws(size: int, side: int) -> np.ndarray:
    return np.random.default_rng([SEED, size, side]).integers(size, size=(RESAMPLES, size))


def _bounds(
    resampled: np.ndarray, centre: float, sizes: Sequence[int], confidence: float
) -> tuple[float, float]:
    """The width of the 95 % percentile interval, about `centre`, stretched to `confidence` and for small samples.

    The percentile interval of n values is too narrow by sqrt((n - 1) / n), and by the ratio of Student's t to
    the normal quantile (Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 4.1). Three values
    say nothing of a skew: centred, the interval of three holds the median of normal noise in 94 of 100 cases, as it
    lies in 92.
    """
    low, high = np.percentile(resampled, [2.5, 97.5])
    smallest = min(sizes)
    freedom = sum(sizes) - len(sizes)
    stretch = (
        student_quantile(0.5 + confidence / 2, freedom) / 1.959964 * math.sqrt(smallest / (smallest - 1))
    )
    half = stretch * float(high - low) / 2
    return centre - half, centre + half


@lru_cache(maxsize=1024)
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t for `probability` above a half, by bisection of its distribution."""
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return high


def _student_cdf(t: float, freedom: int) -> float:
    """For whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4), t >= 0."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    if freedom % 2:
        term = cosine
        total = cosine if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = 2 / math.pi * (theta + sine * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = sine * total
    return 0.5 + inside / 2
