"""Intervals cover as often as they claim, with prompts as the unit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exalign.evaluation.schema import Interval
from exalign.evaluation.statistics import BOOTSTRAP, Bootstrap, resample_weights


def coverage(draw, truth: float, trials: int = 600) -> float:
    """Share of trials whose 95 % interval for the mean of `draw(generator)` holds `truth`."""
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(trials):
        interval = Bootstrap(400, trial).mean(draw(generator))
        hits += interval.low <= truth <= interval.high
    return hits / trials


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda g: g.normal(2.0, 3.0, 40), 2.0),
        (lambda g: g.uniform(0, 1, 40), 0.5),
        (lambda g: g.exponential(1.0, 120), 1.0),
    ],
    ids=["normal", "uniform", "exponential"],
)
def test_coverage_on_known_distributions(draw, truth):
    # 600 trials have a standard error of 0.9 points at 95 %; skewed data may cost two more.
    assert coverage(draw, truth) == pytest.approx(0.95, abs=0.035)


def test_few_prompts_are_not_overconfident():
    assert coverage(lambda g: g.normal(size=8), 0.0) >= 0.90


def test_prompts_are_the_unit_not_samples():
    # 30 prompts with 50 equal samples each say as much as 30 prompts, not as much as 1,500 samples.
    levels = np.random.default_rng(1).normal(size=30)
    by_prompt = BOOTSTRAP.mean(levels)
    as_if_independent = BOOTSTRAP.mean(np.repeat(levels, 50))
    ratio = (by_prompt.high - by_prompt.low) / (as_if_independent.high - as_if_independent.low)
    assert ratio == pytest.approx(np.sqrt(50), rel=0.1)


def test_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(2).normal(size=400)
    interval = Bootstrap(4000).mean(values)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 20, rel=0.05)


def test_pairing_removes_what_both_share():
    generator = np.random.default_rng(3)
    level = generator.normal(0, 10, 50)
    first, second = level + 1 + 0.1 * generator.normal(size=50), level + 0.1 * generator.normal(size=50)
    paired = BOOTSTRAP.difference(first, second)
    assert paired.estimate == pytest.approx(1, abs=0.1)
    assert paired.high - paired.low < 0.15
    assert BOOTSTRAP.mean(first).high - BOOTSTRAP.mean(first).low > 4


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_the_interval_holds_the_estimate(values):
    interval = Bootstrap(50).mean(np.array(values))
    assert interval.estimate == pytest.approx(np.mean(values))
    if len(values) == 1:
        assert interval.low is None
        assert interval.high is None
    else:
        slack = 1e-9 * (1 + max(map(abs, values)))
        assert interval.low - slack <= interval.high


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(4).normal(size=20)
    assert Bootstrap(seed=7).mean(values) == Bootstrap(seed=7).mean(values)
    assert Bootstrap(seed=7).mean(values) != Bootstrap(seed=8).mean(values)


def test_weights_are_resamples():
    weights = resample_weights(5, num_resamples=100, seed=0)
    assert weights.shape == (100, 5)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights * 5, np.round(weights * 5))


@pytest.mark.parametrize("bad", [[], [1.0, np.nan], [np.inf]])
def test_what_has_no_mean_is_refused(bad):
    with pytest.raises(ValueError):
        BOOTSTRAP.mean(np.array(bad))


@pytest.mark.parametrize("prompts", [3, 5, 20])
def test_an_interval_of_few_prompts_covers_what_it_says(prompts):
    """Of the means of normal values: without the widening 80, 87 and 93 %."""
    draws = np.random.default_rng(0).normal(size=(1000, prompts))
    found = [BOOTSTRAP.mean(values) for values in draws]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in found])
    assert covered == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 1000))


def test_a_share_of_all_or_of_none_is_not_sure():
    """Wilson's bounds by hand: 10 of 10 are at least 1 − z²/(10 + z²) with z = 1.96."""
    z2 = 1.959964**2
    for share, low, high in ((1.0, 10 / (10 + z2), 1.0), (0.0, 0.0, z2 / (10 + z2))):
        found = BOOTSTRAP.share(np.full(10, share))
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)
    equal = BOOTSTRAP.share(np.full(10, 0.5))
    assert (equal.low, equal.high) == pytest.approx((0.5, 0.5))  # ties everywhere are no doubt
    assert BOOTSTRAP.share(np.array([1.0])) == Interval(1.0, None, None, 1)


def test_a_share_stays_within_0_and_1_and_weighs_by_size():
    found = BOOTSTRAP.share(np.array([1.0, 1.0, 0.9, 1.0]))
    assert 0 <= found.low <= found.high <= 1
    assert BOOTSTRAP.share(np.array([1.0, 0.0]), np.array([3.0, 1.0])).estimate == 0.75


def test_a_share_of_what_a_resample_does_not_have_has_no_interval():
    """One of 8 prompts has a gain: a third of the resamples have none."""
    rare = np.array([0.0] * 7 + [1.0])
    found = BOOTSTRAP.ratio(rare, rare)
    assert (found.estimate, found.low, found.high) == (1.0, None, None)


def test_unequal_prompts_cannot_be_paired():
    with pytest.raises(ValueError, match="same prompts"):
        BOOTSTRAP.difference(np.zeros(2), np.zeros(3))


def test_a_ratio_of_the_same_prompts_is_resampled_together() -> None:
    """Twice a value over that value is 2 in every resample of both, not where each is resampled on its own."""
    values = np.array([1.0, 2.0, 6.0])
    assert Bootstrap().ratio(2 * values, values, paired=True) == Interval(2.0, 2.0, 2.0, 3)
    alone = Bootstrap().ratio(2 * values, values)
    assert alone.low is not None and alone.low < 2
