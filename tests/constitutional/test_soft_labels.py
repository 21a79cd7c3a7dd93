"""The probability that a judge gives is the label that DPO and the reward model learn: gradients in closed form."""

import pytest
import torch

from align.losses.pairwise import PairLogps, PairObjective
from align.losses.reward import RewardObjective, TreeScores
from tests.oracles import sigmoid

BETA = 0.3
LABELS = [0.5, 0.55, 0.75, 1.0]
CHOSEN, REJECTED = [2.0, -1.0, 0.25, 0.0], [-1.0, 0.5, 0.25, 3.0]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def reward_gradients(scores, labels):
    """Of the score of the chosen and of the rejected completion of each pair; pairs stand one after the other."""
    leaf = double([score for pair in scores for score in pair]).requires_grad_()
    pairs = len(scores)
    tree = torch.arange(pairs).repeat_interleave(2)
    seen = TreeScores(leaf, double([0.0, 1.0] * pairs), tree, double(labels), torch.zeros(pairs, dtype=torch.float64))
    RewardObjective()(seen).sum().backward()
    return leaf.grad.view(pairs, 2).tolist()


def test_the_reward_losss_gradient_is_the_models_probability_minus_p():
    found = reward_gradients(list(zip(CHOSEN, REJECTED, strict=True)), LABELS)
    for chosen, rejected, p, (up, down) in zip(CHOSEN, REJECTED, LABELS, found, strict=True):
        expected = sigmoid(chosen - rejected) - p
        assert (up, down) == pytest.approx((expected, -expected), rel=1e-9)


def test_a_verdict_of_one_half_leaves_equal_scores_alone_and_draws_others_together():
    assert reward_gradients([(1.5, 1.5)], [0.5]) == [[0.0, 0.0]]
    [[higher, lower]] = reward_gradients([(2.0, 1.0)], [0.5])
    assert higher > 0 > lower


def test_the_dpo_losss_gradient_is_beta_times_the_models_probability_minus_p():
    policy = double([CHOSEN, REJECTED]).requires_grad_()
    reference = (double([0.5, 0.5, -1.0, 0.0]), double([0.0, -0.5, -1.0, 1.0]))
    ones = torch.ones(4, dtype=torch.float64)
    PairObjective(beta=BETA)(PairLogps(*policy, *reference, ones, ones, double(LABELS))).sum().backward()
    for i, p in enumerate(LABELS):
        margin = (CHOSEN[i] - reference[0][i].item()) - (REJECTED[i] - reference[1][i].item())
        expected = BETA * (sigmoid(BETA * margin) - p)
        assert policy.grad[:, i].tolist() == pytest.approx([expected, -expected], rel=1e-9)
