"""Judges and reward models that are made up, so that the right figure is known before it is computed."""

import math

import numpy as np
import pytest
from scipy import optimize

from align.config.errors import UserError
from align.evaluation.temperature import fit_temperature, nll, temperature
from align.evaluation.verdicts import TwoOrders, win_rate
from align.losses.calibration import accuracy, expected_calibration_error, preferred_side

PAIRS = 20_000


def calibrated(pairs=PAIRS, seed=0):
    """(chosen, rejected) scores; which is chosen was drawn with sigmoid of the gap."""
    draw = np.random.default_rng(seed)
    first, second = draw.normal(size=(2, pairs)) * 1.5
    won = draw.random(pairs) < 1 / (1 + np.exp(second - first))
    return np.where(won, first, second), np.where(won, second, first)


def test_a_calibrated_reward_model_has_no_calibration_error_and_temperature_one():
    chosen, rejected = calibrated()
    found = temperature(chosen, rejected, np.ones(PAIRS))
    assert found.temperature == pytest.approx(1, abs=0.05)
    assert expected_calibration_error(*preferred_side(chosen, rejected, np.ones(PAIRS))) < 0.01
    assert found.ece_before < 0.015 and (found.fitted_on, found.judged_on) == (PAIRS // 2, PAIRS // 2)


@pytest.mark.parametrize("times", [3.0, 0.2])
def test_scores_that_are_multiplied_have_that_temperature_and_lose_their_error_by_it(times):
    chosen, rejected = calibrated()
    found = temperature(times * chosen, times * rejected, np.ones(PAIRS))
    assert found.temperature == pytest.approx(times, rel=0.05)
    assert found.ece_before > 0.1 and found.ece_after < 0.015 and found.nll_after < found.nll_before
    one = fit_temperature(chosen - rejected, np.ones(PAIRS))
    assert fit_temperature(times * (chosen - rejected), np.ones(PAIRS)) == pytest.approx(times * one, rel=1e-9)


def test_the_temperature_is_fitted_on_one_half_and_judged_on_the_other():
    chosen, rejected = calibrated(200)
    gap, order = chosen - rejected, np.random.default_rng(0).permutation(200)
    found = temperature(chosen, rejected, np.ones(200))
    t = fit_temperature(gap[order[:100]], np.ones(100))
    assert found.temperature == t
    assert found.nll_after == nll(gap[order[100:]] / t, np.ones(100))


def test_the_temperature_is_scipys_optimum_for_soft_labels_too():
    draw = np.random.default_rng(2)
    gap, p = draw.normal(size=300) * 4, draw.random(300)
    p = np.clip(p + 0.1 * gap, 0, 1)
    expected = optimize.minimize_scalar(lambda log_t: nll(gap / math.exp(log_t), p), bounds=(-4, 6), method="bounded")
    assert fit_temperature(gap, p) == pytest.approx(math.exp(expected.x), rel=1e-3)


def test_scores_worth_nothing_have_no_temperature_and_neither_have_perfect_ones():
    gap = np.array([1.0, -1, 2, -2])
    assert fit_temperature(gap, np.array([0.5, 0.5, 0.5, 0.5])) == math.inf
    assert fit_temperature(-gap, np.array([1.0, 0, 1, 0])) == math.inf
    with pytest.raises(UserError, match="no temperature fits 4 pairs"):
        fit_temperature(gap, np.array([1.0, 0, 1, 0]))
    with pytest.raises(UserError, match="1 pairs to fit"):
        temperature(np.ones(1), np.zeros(1), np.ones(1))


def test_the_likelihood_by_hand():
    assert nll(np.array([math.log(3), 0.0]), np.array([1.0, 0.5])) == pytest.approx((-math.log(0.75) + math.log(2)) / 2)


def test_swapping_all_labels_turns_accuracy_round():
    chosen, rejected = calibrated(501)
    rejected[0] = chosen[0]
    assert accuracy(chosen, rejected).share + accuracy(rejected, chosen).share == pytest.approx(1, abs=1e-12)


def test_a_judge_that_always_takes_the_first_slot_wins_half_and_contradicts_itself_always():
    judge = TwoOrders(np.ones(64), np.ones(64))
    found = win_rate(judge.hard())
    assert (found.rate.mean, found.ties, found.rate.low, found.rate.high) == (0.5, 64, 0.5, 0.5)
    assert judge.contradicts().mean() == 1 and judge.kappa() == 0.0 and judge.soft().tolist() == [0.5] * 64
