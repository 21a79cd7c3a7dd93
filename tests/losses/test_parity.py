"""Two models compared by their greedy replies and log-probabilities, by hand."""

import math

import pytest

from align.losses.parity import Read, parity

TRAINED = Read([[5, 6, 1], [7, 1]], [[-0.1, -0.2, -0.3], [-0.4, -0.5]], [[-0.1, -0.2, -0.3], [-0.4, -0.5]])


def test_the_same_model_is_the_same():
    found = parity(TRAINED, TRAINED, 1e-6)
    assert (found.same, found.prompts, found.tokens, found.largest, found.mean, found.fault) == (2, 2, 5, 0, 0, "")


def test_differences_are_of_each_token_in_nats():
    other = Read(TRAINED.replies, TRAINED.own_logps, [[-0.1, -0.2, -0.2], [-0.4, -0.5]])
    found = parity(TRAINED, other, 0.2)
    assert (found.largest, found.mean) == (pytest.approx(0.1), pytest.approx(0.02))
    assert found.fault == "" and found.same == 2
    assert parity(TRAINED, other, 0.05).fault == "reply 1, token 3: its log-probability differs by 0.1 nats"


@pytest.mark.parametrize(("own", "ties", "fault"), [(-0.15, 1, ""), (-0.01, 0, "reply 1, token 2: 9 instead of 6")])
def test_a_reply_may_part_only_where_rounding_can_have_turned_it(own, ties, fault):
    """With a tolerance of 0.05, a token that is preferred by more than 0.1 nats is the other model's too."""
    other = Read([[5, 9, 1], [7, 1]], [[-0.1, own, -0.1], [-0.4, -0.5]], TRAINED.trained_logps)
    found = parity(TRAINED, other, 0.05)
    assert (found.same, found.near_ties) == (1, ties)
    assert found.fault.startswith(fault) and bool(found.fault) == bool(fault)


def test_a_reply_of_another_length_is_a_fault():
    other = Read([[5, 6], [7, 1]], [[-0.1, -0.2], [-0.4, -0.5]], TRAINED.trained_logps)
    assert parity(TRAINED, other, 10.0).fault == "reply 1: 2 tokens instead of 3"


def test_a_log_probability_that_is_no_number_is_a_fault():
    other = Read(TRAINED.replies, TRAINED.own_logps, [[-0.1, -0.2, math.nan], [-0.4, -0.5]])
    assert "reply 1, token" in parity(TRAINED, other, 10.0).fault
