"""Middle and spread of a handful of samples. Pure; standard library only."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NOISY_IQR_FRACTION = 0.10  # of the median


@dataclass(frozen=True)
class Summary:
    """In the unit of the samples. iqr: distance between the quartiles (0 for one sample)."""

    median: float
    mean: float
    minimum: float
    maximum: float
    iqr: float
    n: int


def summarise_samples(values: Sequence[float]) -> Summary:
    """Summary of `values`, quartiles by linear interpolation between samples. Raises ValueError for none."""
    if not values:
        raise ValueError("no samples to summarise")
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0] * 3
    return Summary(
        median=statistics.median(values),
        mean=statistics.fmean(values),
        minimum=min(values),
        maximum=max(values),
        iqr=third - first,
        n=len(values),
    )


def noise_warning(summary: Summary, what: str) -> str | None:
    """A sentence where the spread makes the median doubtful (IQR above 10 % of it), else None."""
    if summary.iqr <= NOISY_IQR_FRACTION * abs(summary.median):
        return None
    percent = f"{100 * summary.iqr / abs(summary.median):.0f} %" if summary.median else "more than all"
    return (
        f"{what} is noisy: the quartiles of its {summary.n} samples are {percent} of the median apart; "
        "look for other load, or measure more steps (workload.num_steps)"
    )
