"""The length-controlled win rate: against scipy's optimum, closed forms, and judges whose liking is known."""

import math

import numpy as np
import pytest
from scipy import optimize

from align.evaluation.length_control import RIDGE, fit, length_controlled

NAN = math.nan


def minimum(feature, target, ridge=0.0):
    """scipy's weights for the same likelihood."""

    def loss(w):
        odds = w[0] + w[1] * feature
        return (np.logaddexp(0, odds) - target * odds).sum() + ridge / 2 * (w @ w)

    return optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x


def fitted(feature, target):
    weights, held = fit(feature, target, np.ones((1, len(target))))
    return weights[0], bool(held[0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("soft", [False, True])
def test_the_fit_is_scipys_optimum(seed, soft):
    draw = np.random.default_rng(seed)
    feature = np.tanh(draw.normal(size=120))
    p = 1 / (1 + np.exp(-(draw.normal() + 2 * draw.normal() * feature)))
    target = p if soft else (draw.random(120) < p).astype(float)
    weights, held = fitted(feature, target)
    assert not held
    np.testing.assert_allclose(weights, minimum(feature, target), atol=2e-5)


def test_the_optimality_conditions_hold_to_rounding():
    draw = np.random.default_rng(11)
    feature, target = np.tanh(draw.normal(size=500)), draw.choice([0, 0.5, 1], size=500)
    (quality, slope), _ = fitted(feature, target)
    p = 1 / (1 + np.exp(-(quality + slope * feature)))
    assert abs((p - target).mean()) < 1e-9 and abs(((p - target) * feature).mean()) < 1e-9


def test_two_lengths_have_a_closed_form():
    # Longer by one unit: 30 of 40 won; shorter by one: 20 of 50. The model passes through both shares.
    first, second = np.array([2.0] * 40 + [1.0] * 50), np.array([1.0] * 40 + [2.0] * 50)
    verdicts = np.array([1.0] * 30 + [0] * 10 + [1] * 20 + [0] * 30)
    found = length_controlled(verdicts, first, second, draws=50)
    longer, shorter = math.log(30 / 10), math.log(20 / 30)
    assert found.slope > 0
    gap = first - second
    x = np.tanh(gap / gap.std(ddof=1))
    quality = (longer * -x[-1] + shorter * x[0]) / (x[0] - x[-1])
    assert found.rate == pytest.approx(1 / (1 + math.exp(-quality)), abs=1e-8)
    assert found.raw == 50 / 90


def test_equal_lengths_leave_the_raw_rate():
    verdicts = np.array([1, 1, 0, 0.5, 1, 0.25])
    found = length_controlled(verdicts, np.full(6, 9.0), np.full(6, 9.0), draws=50)
    assert found.rate == pytest.approx(found.raw, abs=1e-12) and found.slope == 0.0 and not found.separable


def test_lengths_that_have_nothing_to_do_with_it_hardly_move_the_rate():
    draw = np.random.default_rng(1)
    found = length_controlled((draw.random(2000) < 0.63).astype(float), *draw.integers(50, 400, (2, 2000)), draws=100)
    assert found.rate == pytest.approx(found.raw, abs=0.01)


@pytest.mark.parametrize("longer", [0, 40, 80])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_judge_that_prefers_length_only_comes_out_at_about_one_half(longer, seed):
    draw = np.random.default_rng(seed)
    first, second = draw.integers(50, 400, (2, 400)).astype(float)
    first += longer
    found = length_controlled((first > second).astype(float) + 0.5 * (first == second), first, second, draws=100)
    assert found.separable and found.rate == pytest.approx(0.5, abs=0.1)
    if longer == 80:
        assert found.raw > 0.62 and abs(found.rate - 0.5) < (found.raw - 0.5) * 0.6


def test_a_judge_that_likes_length_among_other_things_is_corrected_to_the_truth():
    draw = np.random.default_rng(3)
    first, second = draw.normal(300, 60, 6000), draw.normal(230, 60, 6000)
    gap = first - second
    p = 1 / (1 + np.exp(-(math.log(0.6 / 0.4) + 1.5 * np.tanh(gap / gap.std(ddof=1)))))
    found = length_controlled((draw.random(6000) < p).astype(float), first, second, draws=200)
    assert found.raw > 0.7 and found.rate == pytest.approx(0.6, abs=0.025)
    assert found.low < 0.6 < found.high and found.high - found.low < 0.08


def test_parted_wins_and_losses_are_held_by_the_stated_prior_and_said():
    first, second = np.array([5.0, 6, 7, 1, 2]), np.array([1.0, 1, 1, 4, 9])
    verdicts = np.array([1.0, 1, 1, 0, 0])
    found = length_controlled(verdicts, first, second, draws=50)
    gap = first - second
    expected = minimum(np.tanh(gap / gap.std(ddof=1)), verdicts, ridge=RIDGE)
    assert found.separable and found.slope == pytest.approx(expected[1], abs=1e-5)
    assert found.rate == pytest.approx(1 / (1 + math.exp(-expected[0])), abs=1e-6)
    # A soft verdict beyond the border, and the likelihood has a maximum.
    assert not length_controlled(np.array([1, 1, 1, 0, 0.5]), first, second, draws=50).separable


def test_wins_alone_are_a_rate_of_one_and_losses_of_none():
    lengths = np.array([3.0, 5, 9]), np.array([4.0, 4, 4])
    assert length_controlled(np.ones(3), *lengths, draws=50).rate == 1.0
    assert length_controlled(np.zeros(3), *lengths, draws=50).rate == 0.0


def test_a_difference_that_never_varies_cannot_be_told_from_quality():
    assert length_controlled(np.array([1, 0, 1.0]), np.full(3, 8.0), np.full(3, 5.0)) is None
    assert length_controlled(np.array([NAN]), np.ones(1), np.ones(1)) is None


def test_missing_verdicts_are_left_out_and_counted_and_lengths_are_of_the_rest():
    found = length_controlled(np.array([1, 0, NAN, 1]), np.array([12.0, 6, 999, 18]), np.array([10.0, 10, 1, 10]))
    assert (found.count, found.missing) == (3, 1)
    assert found.mean_lengths == (12.0, 10.0) and found.length_change == pytest.approx(0.2)
    lengthless = length_controlled(np.array([1, 0, 1, 1.0]), np.array([12.0, 6, NAN, 18]), np.array([10.0, 10, 1, 10]))
    assert (lengthless.rate, lengthless.missing) == (found.rate, 1)


def test_exchanging_the_systems_turns_the_rate_round():
    draw = np.random.default_rng(9)
    first, second = draw.integers(20, 200, (2, 150)).astype(float)
    verdicts = draw.random(150)
    one, other = length_controlled(verdicts, first, second), length_controlled(1 - verdicts, second, first)
    assert one.rate + other.rate == pytest.approx(1, abs=1e-8)
    assert one.low + other.high == pytest.approx(1, abs=1e-6)


def test_the_interval_is_of_prompts():
    draw = np.random.default_rng(2)
    first, second = draw.integers(20, 200, (2, 60)).astype(float)
    verdicts = (draw.random(60) < 0.6).astype(float)
    copies = [np.repeat(column, 4) for column in (verdicts, first, second)]
    once = length_controlled(verdicts, first, second)
    four = length_controlled(*copies, prompts=np.repeat(np.arange(60), 4).tolist())
    assert four.rate == pytest.approx(once.rate, abs=0.005)  # sd with ddof=1 of four copies is a little smaller
    assert four.high - four.low == pytest.approx(once.high - once.low, rel=0.1)
