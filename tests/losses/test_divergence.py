"""KL from samples, against the closed form of two small distributions."""

import numpy as np
import pytest

from align.losses.divergence import kl_figures

P, Q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 0.25, 0.25, 0.25])


def sampled(sequences, length, seed=0):
    tokens = np.random.default_rng(seed).choice(len(P), p=P, size=(sequences, length))
    return np.log(P)[tokens].tolist(), np.log(Q)[tokens].tolist()


def test_estimates_are_the_closed_form_up_to_chance():
    figures = kl_figures(*sampled(20_000, 3))
    kl, entropy = float((P * np.log(P / Q)).sum()), float(-(P * np.log(P)).sum())
    assert figures["k1_per_token"] == pytest.approx(kl, abs=0.01)
    assert figures["k3_per_token"] == pytest.approx(kl, abs=0.01)
    assert figures["k1_per_sequence"] == pytest.approx(3 * kl, abs=2 * figures["k1_per_sequence_reach"])
    assert figures["entropy_per_token"] == pytest.approx(entropy, abs=0.01)
    assert (figures["sequences"], figures["tokens"]) == (20_000, 60_000)


def test_a_model_is_no_distance_from_itself_and_one_token_is_the_formula():
    ours, _ = sampled(50, 4)
    same = kl_figures(ours, ours)
    assert same["k1_per_sequence"] == same["k3_per_sequence"] == same["k1_per_sequence_reach"] == 0
    one = kl_figures([[-1.0]], [[-3.0]])
    assert one["k1_per_token"] == 2.0 and one["k3_per_token"] == pytest.approx(np.exp(-2) - 1 + 2)
    assert one["k1_per_sequence_reach"] == 0.0
    assert kl_figures([], []) == {}


def test_sequences_count_by_their_tokens_per_token_and_once_per_sequence():
    figures = kl_figures([[-1.0, -1.0, -1.0], [-1.0]], [[-2.0, -2.0, -2.0], [-5.0]])
    assert figures["k1_per_token"] == pytest.approx((3 + 4) / 4)
    assert figures["k1_per_sequence"] == pytest.approx((3 + 4) / 2)


def test_the_interval_holds_the_closed_form_as_often_as_it_says():
    kl = 2 * float((P * np.log(P / Q)).sum())
    hits = 0
    for seed in range(400):
        figures = kl_figures(*sampled(60, 2, seed))
        hits += abs(figures["k1_per_sequence"] - kl) <= figures["k1_per_sequence_reach"]
    assert 0.91 <= hits / 400 <= 0.98


def test_log_probabilities_that_do_not_belong_together_are_refused():
    with pytest.raises(AssertionError):
        kl_figures([[-1.0, -2.0]], [[-1.0]])
    with pytest.raises(AssertionError):
        kl_figures([[]], [[]])
