"""The weight of the KL penalty and the moments of rewards: by hand, against numpy, and across a resume."""

import json
import math

import numpy as np
import pytest
import torch

from align.losses.controllers import AdaptiveKL, FixedKL, RunningMoments


def adaptive(coefficient=0.1, target=6.0, horizon=1000):
    return AdaptiveKL(coefficient, target_nats_per_completion=target, horizon_completions=horizon)


def through_json(state):
    return json.loads(json.dumps(state, allow_nan=False))


def test_a_fixed_weight_stays():
    controller = FixedKL(0.05)
    controller.update(1e9, 10**6)
    assert controller.coefficient == 0.05


# target 6, horizon 1000, 100 completions: the error counts a tenth. (KL, factor)
STEPS = [
    (6.0, 1.0),
    (6.6, 1.01),  # 10 % above
    (5.4, 0.99),  # 10 % below
    (60.0, 1.02),  # nine times above, held at 20 %
    (0.0, 0.98),  # 100 % below, held at 20 %
    (-3.0, 0.98),  # an estimate may be negative
]


@pytest.mark.parametrize(("nats", "factor"), STEPS)
def test_an_adaptive_weight_follows_the_rule_worked_by_hand(nats, factor):
    controller = adaptive()
    controller.update(nats, 100)
    assert controller.coefficient == pytest.approx(0.1 * factor, rel=1e-12)


def test_the_factor_stays_positive_when_an_update_is_many_horizons():
    controller = adaptive(horizon=10)
    controller.update(0.0, 10**6)
    assert controller.coefficient == pytest.approx(0.01)


def test_the_weight_settles_where_the_divergence_meets_its_target():
    # A policy whose KL is 0.3 / weight: at the target of 6 nats the weight is 0.05.
    for start in (0.5, 0.005):
        controller = adaptive(start)
        for _ in range(500):
            controller.update(0.3 / controller.coefficient, 100)
        assert controller.coefficient == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_target_or_horizon_without_meaning_is_refused_by_name(value):
    with pytest.raises(ValueError, match="target_nats_per_completion"):
        adaptive(target=value)
    with pytest.raises(ValueError, match="horizon_completions"):
        adaptive(horizon=value)


@pytest.mark.parametrize("make", [FixedKL, adaptive])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_weight_without_meaning_is_refused_when_made_and_when_loaded(make, value):
    with pytest.raises(ValueError, match="weight of the KL penalty"):
        make(value)
    with pytest.raises(ValueError, match="weight of the KL penalty"):
        make(0.1).load_state_dict({"coefficient": value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_divergence_that_is_no_number_is_refused_and_changes_nothing(value):
    controller = adaptive()
    with pytest.raises(ValueError, match="KL divergence"):
        controller.update(value, 100)
    assert controller.coefficient == 0.1


@pytest.mark.parametrize("make", [FixedKL, adaptive])
def test_a_resumed_weight_goes_on_exactly(make):
    whole, before, after = make(0.1), make(0.1), make(0.7)
    first, rest = [(7.7, 33), (1.3, 100)], [(6.1, 7), (50.0, 100)]
    for controller, steps in ((whole, first + rest), (before, first)):
        for step in steps:
            controller.update(*step)
    after.load_state_dict(through_json(before.state_dict()))
    for step in rest:
        after.update(*step)
    assert after.coefficient == whole.coefficient


def rewards(count, seed=0, mean=3.0, spread=2.0):
    return np.random.default_rng(seed).normal(mean, spread, count)


@pytest.mark.parametrize("sizes", [[100], [1, 1, 98], [30, 0, 69, 1], [50, 50]])
def test_moments_of_pieces_are_numpys_of_the_whole(sizes):
    values, moments = rewards(100), RunningMoments()
    for piece in np.split(values, np.cumsum(sizes)[:-1]):
        moments.update(torch.from_numpy(piece))
    assert moments.count == 100
    assert moments.mean == pytest.approx(values.mean(), rel=1e-12)
    assert moments.std == pytest.approx(values.std(ddof=1), rel=1e-12)


def test_moments_bear_a_large_mean():
    values, moments = rewards(1000, mean=1e8, spread=1e-2), RunningMoments()
    for piece in np.split(values, 10):
        moments.update(torch.from_numpy(piece))
    assert moments.std == pytest.approx(values.std(ddof=1), rel=1e-6)


def test_moments_take_lists_arrays_and_tensors_of_any_precision():
    for values in ([1.0, 4.0], np.array([1.0, 4.0]), torch.tensor([1.0, 4.0]), torch.tensor([1, 4])):
        moments = RunningMoments()
        moments.update(values)
        assert (moments.count, moments.mean, moments.std) == pytest.approx((2, 2.5, math.sqrt(4.5)))


def test_dividing_by_the_spread_of_fewer_than_two_values_changes_nothing():
    moments = RunningMoments()
    assert (moments.count, moments.mean, moments.std) == (0, 0.0, 1.0)
    moments.update([5.0])
    assert (moments.count, moments.mean, moments.std) == (1, 5.0, 1.0)
    moments.update([5.0, 5.0])
    assert (moments.count, moments.mean, moments.std) == (3, 5.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused_and_changes_nothing(bad):
    moments = RunningMoments()
    moments.update([1.0, 2.0])
    before = moments.state_dict()
    with pytest.raises(ValueError, match="1 of 3 values"):
        moments.update([1.0, bad, 2.0])
    assert moments.state_dict() == before


def test_resumed_moments_go_on_exactly():
    whole, before, after = RunningMoments(), RunningMoments(), RunningMoments()
    first, rest = rewards(37, seed=1), rewards(53, seed=2)
    for moments, pieces in ((whole, [first, rest]), (before, [first])):
        for piece in pieces:
            moments.update(piece)
    after.load_state_dict(through_json(before.state_dict()))
    assert (after.count, after.mean, after.std) == (before.count, before.mean, before.std)
    after.update(rest)
    assert after.state_dict() == whole.state_dict()
