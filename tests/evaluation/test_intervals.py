"""Means and their intervals: against formulas, against scipy's bootstrap, and against what is known of coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from align.evaluation.intervals import estimate
from align.evaluation.verdicts import paired_difference, win_rate

NAN = math.nan


def test_the_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).choice([0, 0.5, 1], size=300, p=[0.3, 0.2, 0.5])
    found = estimate(values, draws=9999)
    expected = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.004)
    assert found.standard_error == pytest.approx(stats.sem(values), rel=1e-12)


def test_the_standard_error_of_clusters_is_the_robust_one():
    values, prompts = np.array([1, 0, 1, 1, 0.5, 0]), ["a", "a", "a", "b", "b", "c"]
    mean = 3.5 / 6
    by_hand = sum(s**2 for s in (2 - 3 * mean, 1.5 - 2 * mean, 0 - mean))
    assert estimate(values, prompts).standard_error == pytest.approx(math.sqrt(3 / 2 * by_hand) / 6, rel=1e-12)


def test_prompts_and_not_pairs_are_what_is_resampled():
    values = np.repeat(np.random.default_rng(0).random(40) > 0.5, 25).astype(float)
    prompts = np.repeat(np.arange(40), 25).tolist()
    clustered, single, whole = estimate(values, prompts), estimate(values), estimate(values[::25])
    # 25 copies of a verdict tell no more than one: the interval is that of the 40.
    assert (clustered.low, clustered.high) == (whole.low, whole.high)
    assert clustered.standard_error == pytest.approx(whole.standard_error)
    assert (clustered.high - clustered.low) / (single.high - single.low) == pytest.approx(5, rel=0.15)
    assert (clustered.count, clustered.clusters) == (1000, 40)


def test_unequal_prompts_keep_the_weight_of_their_pairs():
    values, prompts = np.array([1.0] * 9 + [0.0]), ["a"] * 9 + ["b"]
    found = estimate(values, prompts)
    # Two prompts: a draw holds a twice, b twice, or one of each with 9 of 10.
    assert (found.mean, found.low, found.high) == (0.9, 0.0, 1.0)


def test_the_interval_holds_the_truth_in_about_95_of_100():
    draw = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        quality = draw.beta(3, 2, size=80)
        verdicts = (draw.random((80, 4)) < quality[:, None]).astype(float)
        found = estimate(verdicts.ravel(), np.repeat(np.arange(80), 4).tolist(), draws=1000)
        held += found.low <= 0.6 <= found.high
    assert 0.90 <= held / 300 <= 0.985


def test_missing_values_are_counted_and_not_filled_in():
    found = estimate(np.array([1, NAN, 0, NAN, 1]))
    assert (found.mean, found.count, found.missing) == (2 / 3, 3, 2)
    assert estimate(np.array([NAN, NAN])) is None and win_rate(np.array([NAN])) is None


def test_the_same_seed_gives_the_same_interval_and_another_one_a_near_one():
    values = np.random.default_rng(5).random(200)
    assert estimate(values) == estimate(values)
    other = estimate(values, seed=1)
    assert 0 < abs(other.low - estimate(values).low) < 0.01


def test_shares_of_nothing_but_wins_have_wilsons_interval():
    found = win_rate(np.ones(20)).rate
    expected = stats.binomtest(20, 20).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, 1.0))
    ties = win_rate(np.full(20, 0.5)).rate
    assert (ties.low, ties.high) == (0.5, 0.5)


def test_a_paired_difference_is_narrower_than_two_intervals():
    draw = np.random.default_rng(2)
    hard = draw.random(400)
    first, second = ((hard + draw.normal(size=400) * 0.05 + step > 0.5).astype(float) for step in (0.05, 0.0))
    found = paired_difference(first, second)
    alone = estimate(first), estimate(second)
    assert found.mean == pytest.approx(alone[0].mean - alone[1].mean)
    assert found.high - found.low < 0.5 * (alone[0].high - alone[0].low + alone[1].high - alone[1].low)
    assert paired_difference(first, first).low == paired_difference(first, first).high == 0.0


def test_a_pair_that_lacks_one_side_is_missing():
    found = paired_difference(np.array([1, NAN, 1]), np.array([0, 0, NAN]))
    assert (found.mean, found.count, found.missing) == (1.0, 1, 2)
    with pytest.raises(ValueError, match="2 values against 3"):
        paired_difference(np.zeros(2), np.zeros(3))


def test_names_of_prompts_must_be_as_many():
    with pytest.raises(ValueError, match="2 names of prompts for 3 values"):
        estimate(np.zeros(3), ["a", "b"])
