import pytest

from wanexp.measure.statistics import noise_warning, summarise_samples


def test_summary_by_hand():
    summary = summarise_samples([4.0, 1.0, 3.0, 2.0])
    assert (summary.median, summary.mean, summary.minimum, summary.maximum, summary.n) == (2.5, 2.5, 1, 4, 4)
    assert summary.iqr == pytest.approx(1.5)  # quartiles 1.75 and 3.25
    assert summarise_samples([1, 2, 3, 4, 100]).iqr == pytest.approx(2)  # 2 and 4: outliers do not count


def test_one_sample_has_no_spread():
    summary = summarise_samples([7.0])
    assert (summary.median, summary.iqr, summary.n) == (7.0, 0.0, 1)
    assert noise_warning(summary, "the step time") is None


def test_no_samples():
    with pytest.raises(ValueError, match="no samples"):
        summarise_samples([])


def test_noise_warning_above_a_tenth_of_the_median():
    assert noise_warning(summarise_samples([95, 95, 100, 105, 105]), "it") is None  # exactly 10 %
    warning = noise_warning(summarise_samples([90, 90, 100, 110, 110]), "the step time")
    assert warning is not None
    assert warning.startswith("the step time is noisy: the quartiles of its 5 samples are 20 % of the median")
    assert noise_warning(summarise_samples([0, 0, 0]), "it") is None
    assert noise_warning(summarise_samples([-1, 0, 1]), "it") is not None
