"""What PPO computes from sampled tokens: by hand, against plain formulas, and by what must not change it."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions.kl import kl_divergence

from align.config.schema import KLEstimator
from align.losses.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    group_normalised,
    importance_weights,
    kl_estimate,
    kl_loss,
    leave_one_out,
    rewards_to_go,
    token_rewards,
    whiten,
)
from tests import oracles
from tests.conftest import REPO

NAN = math.nan
ESTIMATORS = list(KLEstimator)
LENGTHS = [5, 1, 3, 8]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def mask_of(lengths, longest=None):
    return torch.arange(longest or max(lengths))[None] < torch.tensor(lengths)[:, None]


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def alone(vector):
    """`reduce` on one rank."""
    return vector


class Ranks:
    """`reduce` of several ranks in one process: each call waits for all, then every rank has the sum."""

    def __init__(self, count):
        self.slots = [None] * count
        self.barrier = threading.Barrier(count, timeout=20)

    def summed(self, rank):
        def reduce(vector):
            self.slots[rank] = vector.clone()
            self.barrier.wait()
            total = sum(self.slots)
            self.barrier.wait()
            return total

        return reduce

    def run(self, work):
        """work(rank, reduce) on all ranks at once; their results in order."""
        results = [None] * len(self.slots)

        def one(rank):
            results[rank] = work(rank, self.summed(rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.slots))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


# KL


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_estimate_is_the_plain_formula(estimator):
    logps, reference = drawn(40, seed=1) * 3, drawn(40, seed=2) * 3
    d = logps - reference
    expected = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[estimator.value]
    assert torch.allclose(kl_estimate(logps, reference, estimator), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(kl_estimate(logps, reference, estimator.value), kl_estimate(logps, reference, estimator))


@pytest.mark.parametrize("estimator", [KLEstimator.k1, KLEstimator.k3])
def test_the_mean_over_all_tokens_by_their_probability_is_torchs_divergence(estimator):
    policy, reference = Categorical(logits=drawn(9, seed=3)), Categorical(logits=drawn(9, seed=4))
    estimates = kl_estimate(policy.logits, reference.logits, estimator)
    assert (policy.probs * estimates).sum().item() == pytest.approx(kl_divergence(policy, reference).item(), rel=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_of_a_policy_to_itself_is_exactly_zero(estimator):
    logps = drawn(30).float() * 10
    assert kl_estimate(logps, logps.clone(), estimator).eq(0).all()


def test_k3_keeps_its_digits_near_zero_in_fp32():
    d = torch.tensor([1e-4, -1e-4, 3e-3])
    expected = torch.exp(-d.double()) - 1 + d.double()
    found = kl_estimate(d, torch.zeros(3), KLEstimator.k3).double()
    assert torch.allclose(found, expected, rtol=2e-2, atol=0)


def test_k3_of_a_token_that_the_policy_has_ruled_out_is_finite_in_value_and_gradient():
    logps = torch.tensor([-2000.0, -1.0]).requires_grad_()
    reference = torch.tensor([-1.0, -2000.0])
    estimates = kl_estimate(logps, reference, KLEstimator.k3)
    estimates.sum().backward()
    assert estimates.tolist() == pytest.approx([math.exp(20) - 21, 19.0], rel=1e-6)
    assert torch.isfinite(logps.grad).all()


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_loss_has_the_value_of_its_estimator_and_the_gradient_d(estimator):
    logps, reference = drawn(20, seed=5).requires_grad_(), drawn(20, seed=6)
    losses = kl_loss(logps, reference, estimator)
    assert torch.equal(losses, kl_estimate(logps, reference, estimator))
    losses.sum().backward()
    assert torch.allclose(logps.grad, (logps - reference).detach(), rtol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_expected_gradient_of_kl_loss_is_that_of_the_divergence(estimator):
    logits = drawn(7, seed=7).requires_grad_()
    reference = Categorical(logits=drawn(7, seed=8))
    (wanted,) = torch.autograd.grad(kl_divergence(Categorical(logits=logits), reference), logits)
    policy = Categorical(logits=logits)
    weighted = policy.probs.detach() * kl_loss(policy.logits, reference.logits, estimator)
    (found,) = torch.autograd.grad(weighted.sum(), logits)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert wanted.abs().max() > 0.05


# Rewards


def test_the_score_is_added_once_at_the_last_sampled_token():
    mask = mask_of([3, 1, 4])
    kl = double([[0.5, -1.0, 2.0, NAN], [0.25, NAN, NAN, NAN], [0.0, 0.0, 1.0, 4.0]])
    found = token_rewards(double([7.0, -3.0, 10.0]), kl, mask, kl_coefficient=0.1)
    expected = double([[-0.05, 0.1, 6.8, 0], [-3.025, 0, 0, 0], [0, 0, -0.1, 9.6]])
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_a_score_that_is_not_a_number_stays_in_its_own_row():
    mask = mask_of([2, 3])
    found = token_rewards(double([NAN, 1.0]), torch.ones(2, 3).double(), mask, kl_coefficient=0.5)
    assert found[0].isnan().tolist() == [False, True, False]
    assert found[1].tolist() == [-0.5, -0.5, 0.5]


def test_the_score_passes_over_tokens_that_were_not_sampled():
    mask = torch.tensor([[True, False, True, False]])
    found = token_rewards(double([5.0]), double([[1.0, NAN, 2.0, NAN]]), mask, kl_coefficient=1.0)
    assert found.tolist() == [[-1.0, 0.0, 3.0, 0.0]]


def test_a_completion_without_tokens_has_no_reward():
    found = token_rewards(double([5.0, 2.0]), torch.ones(2, 2).double(), mask_of([0, 1], 2), kl_coefficient=1.0)
    assert found.tolist() == [[0, 0], [1, 0]]


# Advantages


def test_gae_of_three_tokens_worked_by_hand():
    # gamma = 0.9, lambda = 0.5, so a later error counts 0.45 a token. The stop token is the third; after it V = 0.
    #   delta_2 = 1.0 + 0.9 * 0.0 - 0.8 = 0.2          A_2 = 0.2
    #   delta_1 = 0.0 + 0.9 * 0.8 - 0.4 = 0.32         A_1 = 0.32 + 0.45 * 0.2  = 0.41
    #   delta_0 = -0.1 + 0.9 * 0.4 - 0.5 = -0.24       A_0 = -0.24 + 0.45 * 0.41 = -0.0555
    # returns = A + V = 0.4445, 0.81, 1.0
    rewards, values = double([[-0.1, 0.0, 1.0]]), double([[0.5, 0.4, 0.8]])
    advantages, returns = gae(rewards, values, mask_of([3]), gamma=0.9, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([-0.0555, 0.41, 0.2], abs=1e-15)
    assert returns[0].tolist() == pytest.approx([0.4445, 0.81, 1.0], abs=1e-15)


def test_gae_with_padding_and_no_stop_token_worked_by_hand():
    # gamma = 1, lambda = 0.5. The completion was cut after its second token: no stop token, V after it is 0 all the
    # same. The third column is padding; its 9 and 100 must not reach the second token.
    #   delta_1 = -1.0 + 0 - 0.6 = -1.6                A_1 = -1.6
    #   delta_0 = 0.2 + 0.6 - 0.3 = 0.5                A_0 = 0.5 + 0.5 * -1.6 = -0.3
    # returns = 0.0, -1.0
    for beyond in ((9.0, 100.0), (NAN, NAN)):
        rewards, values = double([[0.2, -1.0, beyond[0]]]), double([[0.3, 0.6, beyond[1]]])
        advantages, returns = gae(rewards, values, mask_of([2], 3), gamma=1.0, lam=0.5)
        assert advantages[0].tolist() == pytest.approx([-0.3, -1.6, 0.0], abs=1e-15)
        assert returns[0].tolist() == pytest.approx([0.0, -1.0, 0.0], abs=1e-15)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.8), (0.9, 0.0), (1.0, 1.0)])
def test_gae_of_ragged_rows_is_the_slow_sum_of_each(gamma, lam):
    mask = mask_of(LENGTHS)
    rewards, values = (drawn(*mask.shape, seed=seed).masked_fill(~mask, NAN) for seed in (1, 2))
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i, length in enumerate(LENGTHS):
        expected = oracles.gae(rewards[i, :length].tolist(), values[i, :length].tolist(), gamma, lam)
        assert advantages[i, :length].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)
        assert torch.allclose(returns[i, :length], double(expected) + values[i, :length], rtol=1e-10)
        assert advantages[i, length:].eq(0).all() and returns[i, length:].eq(0).all()


def test_tokens_that_were_not_sampled_inside_a_completion_are_passed_over():
    mask = torch.tensor([[True, False, False, True, True]])
    rewards, values = double([[1, NAN, 5, 2, 3]]), double([[4, 7, NAN, 5, 6]])
    found, returns = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    expected = oracles.gae([1, 2, 3], [4, 5, 6], 0.9, 0.7)
    assert found[mask].tolist() == pytest.approx(expected)
    assert returns[mask].tolist() == pytest.approx([a + v for a, v in zip(expected, [4, 5, 6], strict=True)])
    assert found[~mask].eq(0).all() and returns[~mask].eq(0).all()


def test_advantages_carry_no_gradient():
    values = torch.ones(1, 3).requires_grad_()
    advantages, returns = gae(torch.ones(1, 3), values, mask_of([3]), gamma=1.0, lam=0.9)
    assert not advantages.requires_grad and not returns.requires_grad


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_rewards_to_go_are_the_discounted_sums_of_each_row(gamma):
    mask = mask_of(LENGTHS)
    rewards = drawn(*mask.shape).masked_fill(~mask, NAN)
    found = rewards_to_go(rewards, mask, gamma=gamma)
    for i, length in enumerate(LENGTHS):
        expected = oracles.discounted_sums(rewards[i, :length].tolist(), gamma)
        assert found[i, :length].tolist() == pytest.approx(expected, rel=1e-10)
        assert found[i, length:].eq(0).all()


RETURNS = [1.0, 4.0, NAN, 7.0, 2.0, 2.0, 2.0, 5.0, NAN, -3.0, 0.5, 8.0]
GROUP = [90, 5, 90, 5, 5, 31, 31, 90, 31, 7, 12, 12]
VALID = [True, True, False, True, True, True, True, True, False, True, True, False]


def others_of(i):
    """Returns of the other valid completions of the same prompt."""
    return [RETURNS[j] for j in range(len(RETURNS)) if j != i and GROUP[j] == GROUP[i] and VALID[j]]


def groups():
    return double(RETURNS), torch.tensor(GROUP), torch.tensor(VALID)


def test_leave_one_out_is_the_mean_of_the_others():
    expected = [sum(o) / len(o) if VALID[i] and (o := others_of(i)) else 0.0 for i in range(len(RETURNS))]
    found = leave_one_out(*groups())
    assert found.tolist() == pytest.approx(expected)
    assert found[1].item() == 4.5  # (7 + 2) / 2
    assert found[9].item() == 0 and found[10].item() == 0  # alone; alone among valid ones


def test_group_normalised_is_the_standard_score_within_the_prompt():
    expected = []
    for i, value in enumerate(RETURNS):
        members = double([*others_of(i), value]) if VALID[i] else double([])
        score = (value - members.mean()) / (members.std() + 1e-4) if len(members) > 1 else torch.tensor(0.0)
        expected.append(score.item())
    found = group_normalised(*groups())
    assert found.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-15)
    assert found[5].item() == 0 and found[6].item() == 0  # equal returns have no advantage
    # 1 and 5: mean 3, unbiased deviation sqrt(8).
    assert found[0].item() == pytest.approx(-2 / (math.sqrt(8) + 1e-4), rel=1e-12)
    halved = group_normalised(*groups(), eps=math.sqrt(8))
    assert halved[0].item() == pytest.approx(-1 / math.sqrt(8), rel=1e-12)


@pytest.mark.parametrize("compared", [leave_one_out, group_normalised])
def test_groups_keep_the_precision_of_returns_and_may_be_empty(compared):
    returns = torch.tensor([1.0, 2.0])
    assert compared(returns, torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool)).dtype == torch.float32
    nothing = torch.zeros(0)
    assert compared(nothing, nothing.long(), nothing.bool()).shape == (0,)


def test_leave_one_out_makes_advantages_that_sum_to_zero_in_a_group():
    returns, group, valid = drawn(8), torch.tensor([3, 3, 3, 3, 1, 1, 1, 1]), torch.ones(8, dtype=torch.bool)
    advantages = returns - leave_one_out(returns, group, valid)
    assert advantages[:4].sum().abs() < 1e-12 and advantages[4:].sum().abs() < 1e-12
    assert advantages.abs().min() > 1e-3


# Whitening


def test_whitening_is_the_plain_formula_over_the_mask():
    mask = mask_of(LENGTHS)
    values = (drawn(*mask.shape) * 3 + 5).masked_fill(~mask, NAN)
    inside = values[mask]
    expected = (inside - inside.mean()) / torch.sqrt(inside.var(unbiased=True) + 1e-8)
    found = whiten(values, mask, reduce=alone)
    assert torch.allclose(found[mask], expected, rtol=1e-10, atol=1e-12)
    assert found[~mask].eq(0).all()
    kept = whiten(values, mask, reduce=alone, shift_mean=False)
    assert torch.allclose(kept[mask], expected + inside.mean(), rtol=1e-10)
    assert kept[~mask].eq(0).all()


def test_whitening_bears_a_large_mean_in_fp32():
    # Their mean, 2^24 + 3, is no fp32 number.
    values = torch.tensor([2.0**24, 2.0**24 + 2, 2.0**24 + 4, 2.0**24 + 6])
    found = whiten(values, torch.ones(4, dtype=torch.bool), reduce=alone)
    deviation = math.sqrt(20 / 3)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([x / deviation for x in (-3, -1, 1, 3)], rel=1e-6)


def test_whitening_bears_a_mean_far_above_the_spread():
    values, mask = drawn(50) * 1e-2, torch.ones(50, dtype=torch.bool)
    near, far = whiten(values, mask, reduce=alone), whiten(values + 1e7, mask, reduce=alone)
    assert torch.allclose(far, near, rtol=1e-4, atol=1e-6)


def test_whitening_very_small_values_is_bounded_by_the_term_under_the_root():
    found = whiten(double([1e-6, -1e-6]), torch.tensor([True, True]), reduce=alone)
    # Deviations 1e-6, unbiased variance 2e-12: 1e-6 / sqrt(1.0002e-8).
    assert found.tolist() == pytest.approx([1e-6 / math.sqrt(1.0002e-8), -1e-6 / math.sqrt(1.0002e-8)], rel=1e-9)


@pytest.mark.parametrize(("mask", "expected"), [([False, True], [0.0, 3.0]), ([False, False], [0.0, 0.0])])
def test_one_value_or_none_is_centred_and_not_scaled(mask, expected):
    values, mask = double([NAN, 3.0]), torch.tensor(mask)
    assert whiten(values, mask, reduce=alone).tolist() == [0.0, 0.0]
    assert whiten(values, mask, reduce=alone, shift_mean=False).tolist() == expected


@pytest.mark.parametrize("split", [[3, 1], [4, 0], [1, 2, 1]])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_over_several_ranks_is_whitening_over_one(split, shift_mean):
    mask = mask_of(LENGTHS)
    values = drawn(*mask.shape, seed=3) * 4 - 7
    whole = whiten(values, mask, reduce=alone, shift_mean=shift_mean)
    shares = list(zip(values.split(split), mask.split(split), strict=True))

    def work(rank, reduce):
        return whiten(*shares[rank], reduce=reduce, shift_mean=shift_mean)

    parts = Ranks(len(split)).run(work)
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-12, atol=1e-13)


def test_one_value_on_each_of_two_ranks_has_a_variance():
    found = Ranks(2).run(lambda rank, reduce: whiten(double([1.0 + 2 * rank]), torch.tensor([True]), reduce=reduce))
    assert [x.item() for x in found] == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)], rel=1e-7)


def test_two_processes_whiten_and_explain_as_one(tmp_path):
    values, returns = drawn(11, seed=1) + 3, drawn(11, seed=2) * 2
    rows = {
        "values": [values[:4].tolist(), values[4:].tolist()],
        "returns": [returns[:4].tolist(), returns[4:].tolist()],
    }
    (tmp_path / "input").write_text(json.dumps(rows))
    script = str(Path(__file__).with_name("two_ranks.py"))
    places = [str(tmp_path / name) for name in ("store", "input", "output")]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    ranks = [subprocess.Popen([sys.executable, script, str(rank), *places], env=environment) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    found = [json.loads((tmp_path / f"output.{rank}").read_text()) for rank in (0, 1)]
    mask = torch.ones(11, dtype=torch.bool)
    whole = whiten(values, mask, reduce=alone).tolist()
    assert found[0]["whitened"] + found[1]["whitened"] == pytest.approx(whole, rel=1e-12)
    explained = explained_variance(values, returns, mask, reduce=alone)
    assert [part["explained"] for part in found] == pytest.approx([explained] * 2, rel=1e-12)


# Losses


def test_policy_loss_is_the_plain_formula_case_by_case():
    old, new, advantages = drawn(400, seed=1), drawn(400, seed=2), drawn(400, seed=3) * 2
    for low, high, dual in [(0.2, 0.2, 0.0), (0.1, 0.4, 0.0), (0.2, 0.28, 3.0), (0.2, 0.2, 1.5)]:
        losses, _ = clipped_policy_loss(new, old, advantages, clip_low=low, clip_high=high, dual_clip=dual)
        tokens = zip(new.tolist(), old.tolist(), advantages.tolist(), strict=True)
        expected = [oracles.clipped_policy_loss(*token, low, high, dual) for token in tokens]
        assert losses.tolist() == pytest.approx(expected, rel=1e-12)


# clip_low = 0.1, clip_high = 0.5: the ratio is held in [0.9, 1.5]. (ratio, advantage, loss, clipped)
ASYMMETRIC = [
    (1.3, 2.0, -2.6, False),  # up by 0.3 is allowed: -1.3 * 2
    (1.6, 2.0, -3.0, True),  # held at 1.5: -1.5 * 2
    (0.8, 2.0, -1.6, False),  # a good token became rarer: no clip stands in the way back
    (0.8, -2.0, 1.8, True),  # held at 0.9: 0.9 * 2
    (0.95, -2.0, 1.9, False),
    (1.6, -2.0, 3.2, False),  # a bad token became likelier: unbounded without dual clip
    (1.6, 0.0, 0.0, False),
]
# clip 0.2 on both sides, dual_clip = 3: the loss of a bad token is at most 3 |A|.
DUAL = [
    (2.9, -2.0, 5.8, False),
    (5.0, -2.0, 6.0, True),  # 3 * 2 in place of 5 * 2
    (5.0, 2.0, -2.4, True),  # a good token knows the upper clip only: -1.2 * 2
    (0.5, -2.0, 1.6, True),  # the lower clip: 0.8 * 2
    (5.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize(
    ("cases", "clips"),
    [
        (ASYMMETRIC, {"clip_low": 0.1, "clip_high": 0.5, "dual_clip": 0}),
        (DUAL, {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3}),
    ],
)
def test_policy_loss_of_cases_worked_by_hand(cases, clips):
    ratios, advantages, expected, clipped = zip(*cases, strict=True)
    old = drawn(len(cases)) - 2
    logps = (old + double(ratios).log()).requires_grad_()
    losses, found = clipped_policy_loss(logps, old, double(advantages), **clips)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert found.dtype == torch.bool and found.tolist() == list(clipped)
    losses.sum().backward()
    # d(-r A) / d logp = -r A, and a clipped token has none.
    slopes = [0.0 if c else -r * a for r, a, _, c in cases]
    assert logps.grad.tolist() == pytest.approx(slopes, rel=1e-12)


def test_at_the_old_policy_the_loss_is_minus_the_advantage_and_so_is_its_gradient():
    logps, advantages = drawn(50, seed=1).float().requires_grad_(), drawn(50, seed=2).float()
    old = logps.detach().clone()
    losses, clipped = clipped_policy_loss(logps, old, advantages, clip_low=0.2, clip_high=0.2, dual_clip=2.0)
    losses.sum().backward()
    assert torch.equal(losses.detach(), -advantages) and torch.allclose(logps.grad, -advantages)
    assert not clipped.any()


def test_policy_loss_of_a_ratio_out_of_all_bounds_is_finite():
    logps = torch.tensor([0.0, 0.0, -900.0, -900.0]).requires_grad_()
    old, advantages = torch.tensor([-900.0, -900.0, 0.0, 0.0]), torch.tensor([-1.0, 1.0, -1.0, 1.0])
    losses, clipped = clipped_policy_loss(logps, old, advantages, clip_low=0.2, clip_high=0.2, dual_clip=0.0)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.exp(20), -1.2, 0.8, -math.exp(-20)], rel=1e-6)
    assert clipped.tolist() == [False, True, True, False]
    assert torch.isfinite(logps.grad).all()


def test_value_loss_is_the_plain_formula():
    old, values, returns = (drawn(200, seed=seed) for seed in (1, 2, 3))
    for clip in (0.2, 1.0, 0.0):
        losses, _ = clipped_value_loss(values, old, returns, clip=clip)
        tokens = zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)
        assert losses.tolist() == pytest.approx([oracles.clipped_value_loss(*t, clip) for t in tokens], rel=1e-12)


def test_value_loss_of_cases_worked_by_hand():
    # Old value 1, clip 0.2: a value is held in [0.8, 1.2].
    #   1.1 towards 2: 0.9^2 / 2 = 0.405, inside.       1.5 towards 2: held at 1.2, 0.8^2 / 2 = 0.32, clipped.
    #   0.5 towards 2: 1.5^2 / 2 = 1.125; the held 0.8 errs less, so the way back is open.
    values = double([1.1, 1.5, 0.5]).requires_grad_()
    losses, clipped = clipped_value_loss(values, double([1, 1, 1]), double([2, 2, 2]), clip=0.2)
    assert losses.tolist() == pytest.approx([0.405, 0.32, 1.125])
    assert clipped.tolist() == [False, True, False]
    losses.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, -1.5])


def test_without_a_value_clip_nothing_is_clipped():
    losses, clipped = clipped_value_loss(double([9.0]), double([1.0]), double([10.0]), clip=0)
    assert losses.tolist() == [0.5] and clipped.tolist() == [False]


def test_importance_weights_are_capped_ratios_without_gradient():
    trainer = torch.tensor([-1.0, -1.0, -3.0, 0.0]).requires_grad_()
    sampler = torch.tensor([-1.0, -1.5, -1.0, -900.0])
    found = importance_weights(trainer, sampler, cap=2.0)
    assert found.tolist() == pytest.approx([1.0, math.exp(0.5), math.exp(-2), 2.0])
    assert not found.requires_grad
    off = importance_weights(trainer, sampler, cap=0)
    assert off.tolist() == [1.0] * 4 and not off.requires_grad


# Figures


def test_explained_variance_is_the_plain_formula_over_the_mask():
    mask = mask_of(LENGTHS)
    returns = drawn(*mask.shape, seed=1).masked_fill(~mask, NAN)
    values = (0.7 * returns + 0.3 * drawn(*mask.shape, seed=2)).masked_fill(~mask, NAN)
    expected = 1 - (returns - values)[mask].var() / returns[mask].var()
    assert 0.3 < expected < 0.95
    assert explained_variance(values, returns, mask, reduce=alone) == pytest.approx(expected.item(), rel=1e-10)


def test_explained_variance_of_perfect_useless_and_harmful_values():
    returns, mask = double([1.0, 2.0, 3.0, 4.0]), torch.ones(4, dtype=torch.bool)
    assert explained_variance(returns - 5, returns, mask, reduce=alone) == pytest.approx(1.0)
    assert explained_variance(torch.full_like(returns, 2.0), returns, mask, reduce=alone) == pytest.approx(0.0)
    # Values of the wrong sign double the errors: 1 - 4.
    assert explained_variance(-returns, returns, mask, reduce=alone) == pytest.approx(-3.0)


@pytest.mark.parametrize("level", [0.1, 0.0, -12345.678])
def test_explained_variance_of_returns_that_do_not_vary_is_zero(level):
    returns, mask = torch.full((7,), level), torch.ones(7, dtype=torch.bool)
    assert explained_variance(drawn(7).float(), returns, mask, reduce=alone) == 0.0
    jittered = returns.double() * (1 + 1e-9 * drawn(7))
    assert explained_variance(drawn(7), jittered, mask, reduce=alone) == 0.0
    assert explained_variance(drawn(7), jittered, ~mask, reduce=alone) == 0.0


def test_explained_variance_over_two_ranks_is_that_of_one():
    values, returns, mask = drawn(9, seed=1), drawn(9, seed=2), torch.ones(9, dtype=torch.bool)
    halves = [slice(0, 2), slice(2, 9)]

    def work(rank, reduce):
        own = halves[rank]
        return explained_variance(values[own], returns[own], mask[own], reduce=reduce)

    whole = explained_variance(values, returns, mask, reduce=alone)
    assert Ranks(2).run(work) == pytest.approx([whole] * 2, rel=1e-12)
