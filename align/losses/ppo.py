"""What PPO and its kin compute from sampled tokens: KL estimates, rewards, advantages, clipped losses.

Symbols: a log-probability is of the token that was sampled, at the temperature it was sampled at; the log-ratio is
d = log pi(token) - log pi_ref(token); V_t is the value of the state before token t.
Shapes: B completions of one rank, T = the longest; `mask` (B, T) is True where a token was sampled, the stop token
included. What lies outside the mask is never read, NaN or not, and comes back as 0. `group` (B,) is any whole number
that completions of one prompt share; `valid` (B,) is True where a completion has a return.
`reduce` sums a float64 vector over all ranks, and is the identity on one. A function that takes it calls it twice, so
every rank must call that function, also one that has no tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from align.config.schema import KLEstimator

Reduce = Callable[[Tensor], Tensor]

# e^20 is finite in fp32 with room for a product; a ratio that far off says that something is broken.
LOG_RATIO_BOUND = 20.0
# Below this share of the mean, the spread of fp32 numbers is their rounding.
ROUNDING = 1e-7


def kl_estimate(logps: Tensor, reference_logps: Tensor, estimator: KLEstimator) -> Tensor:
    """Each token's estimate of KL(policy || reference), whose mean over the policy's samples is that divergence.

    k1 = d is unbiased and may be negative; k2 = d^2 / 2 is biased and never negative; k3 = exp(-d) - 1 + d is unbiased
    and never negative, with d clamped to plus and minus 20. Shapes: any, all equal.
    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    estimator = KLEstimator(estimator)
    log_ratio = logps - reference_logps
    if estimator is KLEstimator.k1:
        return log_ratio
    if estimator is KLEstimator.k2:
        return log_ratio**2 / 2
    log_ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    # exp(-d) - 1 loses all digits of the d^2 / 2 that is left over near d = 0, in fp32 below |d| = 1e-4.
    return torch.expm1(-log_ratio) + log_ratio


def kl_loss(logps: Tensor, reference_logps: Tensor, estimator: KLEstimator) -> Tensor:
    """`kl_estimate` with a gradient that lowers the KL divergence: its value is the estimator's, its gradient k2's.

    Over the policy's own samples grad KL = E[d grad logp], which is what k2 gives. The others mislead: k1 gives
    E[grad logp] = 0, nothing but noise, and k3 gives E[(1 - exp(-d)) grad logp], the gradient of KL(reference ||
    policy). Two limits: from the second minibatch on the samples are no longer the policy's own; and what a token does
    to the divergence of later ones is left out, which the penalty in the reward takes in. Shapes: any, all equal.
    Source: Tang and Munos 2025, arXiv:2506.09477.
    """
    pull = kl_estimate(logps, reference_logps, KLEstimator.k2)
    value = kl_estimate(logps, reference_logps, estimator).detach()
    return value + (pull - pull.detach())


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coefficient: float) -> Tensor:
    """-kl_coefficient * kl at every sampled token, plus the completion's score once, at its last sampled token.

    Shapes: scores (B,), kl and mask (B, T); returns (B, T). A completion without tokens has no reward. A score that is
    NaN stays NaN in its own row.
    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2; the last token, so that no value past the end is needed.
    """
    penalties = (-kl_coefficient * kl).masked_fill(~mask, 0)
    tokens_left = mask.flip(1).cumsum(1).flip(1)
    return torch.where(mask & (tokens_left == 1), penalties + scores[:, None], penalties)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns = advantages + values, (B, T) each, without gradient.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    t + 1 is the next sampled token, and after the last one V = A = 0: the end of a completion is the end of the
    episode, stop token or not. Shapes: all (B, T).
    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = advantages.masked_fill(~mask, 0)
    return advantages, advantages + values


def rewards_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """The discounted sum of a token's reward and all later ones of its completion: G_t = r_t + gamma G_{t+1}.

    Shapes: all (B, T).
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def leave_one_out(returns: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """RLOO's baseline: the mean return of the other valid completions of the same prompt. The advantage is
    returns - leave_one_out(returns, group, valid).

    0 where a completion is not valid, and where it is the only valid one of its prompt: nothing to compare it with.
    Shapes: all (B,).
    Source: Ahmadian et al. 2024, arXiv:2402.14740.
    """
    kept, group, valid_ones = _of_groups(returns, group, valid)
    others = _group_sums(valid_ones, group) - 1
    baseline = (_group_sums(kept, group) - kept) / others.clamp(min=1)
    return baseline.masked_fill(~valid | (others < 1), 0).to(returns.dtype)


def group_normalised(returns: Tensor, group: Tensor, valid: Tensor, eps: float = 1e-4) -> Tensor:
    """GRPO's advantage: (return - mean) / (standard deviation + eps) over the valid completions of the same prompt.

    The deviation is the unbiased one and eps 1e-4, as in TRL; eps keeps rounding from becoming an advantage where all
    returns are equal. 0 where a completion is not valid, and where it is the only valid one. Shapes: all (B,).
    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    kept, group, valid_ones = _of_groups(returns, group, valid)
    count = _group_sums(valid_ones, group)
    centred = (kept - _group_sums(kept, group) / count.clamp(min=1)).masked_fill(~valid, 0)
    deviation = (_group_sums(centred**2, group) / (count - 1).clamp(min=1)).sqrt()
    return (centred / (deviation + eps)).to(returns.dtype)


def whiten(values: Tensor, mask: Tensor, *, reduce: Reduce, shift_mean: bool = True) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8) over the masked values of all ranks; mean added again without shift_mean.

    The variance is unbiased and in float64, from deviations and not from squares. A single value has none and becomes
    its distance to the mean: 0. Shapes: values and mask equal, any; returns the same, in the precision of values.
    """
    count, mean, squared = _moments(values[mask].double()[None], reduce)
    variance = squared / (count - 1).clamp(min=1)
    whitened = (values.double() - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.to(values.dtype).masked_fill(~mask, 0)


def clipped_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's loss of each token, max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A), and whether a clip decided it.

    r = exp(logps - old_logps), the log-ratio clamped to plus and minus 20. A clipped token has no gradient. With
    dual_clip = c > 1 the loss of a token with A < 0 is at most -c A, which holds where r > c; 0 turns it off.
    Shapes: all equal, any; returns (losses, clipped bool).
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; two clips: Yu et al. 2025 (DAPO), arXiv:2503.14476;
    dual clip: Ye et al. 2020, arXiv:1912.09729.
    """
    assert dual_clip == 0 or dual_clip > 1, "a dual clip below 1 would bind where the policy has not moved"
    ratio = torch.exp((logps - old_logps).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    losses, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual_clip:
        ceiling = -dual_clip * advantages
        too_much = (advantages < 0) & (losses > ceiling)
        losses, clipped = torch.where(too_much, ceiling, losses), clipped | too_much
    return losses, clipped


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value, or of the value held within `clip` of its old one if that is larger.

    clip = 0 turns it off. Shapes: all equal, any; returns (losses, clipped bool); a clipped token has no gradient.
    Source: OpenAI baselines, ppo2/model.py, which Huang et al. 2024, arXiv:2403.17031, follow for language models.
    """
    plain = (values - returns) ** 2
    if not clip:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    held = torch.clamp(values, old_values - clip, old_values + clip)
    bounded = (held - returns) ** 2
    return torch.maximum(plain, bounded) / 2, bounded > plain


@torch.no_grad()
def importance_weights(trainer_logps: Tensor, sampler_logps: Tensor, *, cap: float) -> Tensor:
    """min(pi_trainer / pi_sampler, cap) of each token, without gradient; ones where cap is 0.

    Corrects a sampler that computes other probabilities than the trainer does for the same weights.
    Shapes: all equal, any.
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    if not cap:
        return torch.ones_like(trainer_logps)
    return torch.exp(trainer_logps - sampler_logps).clamp(max=cap)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, reduce: Reduce) -> float:
    """1 - Var(returns - values) / Var(returns) over the masked tokens of all ranks: 1 is perfect, 0 no better than
    a constant, below 0 worse than one.

    0.0 where returns do not vary by more than the rounding of fp32, or where there are none: nothing to explain.
    Shapes: all equal, any.
    """
    of_returns, of_values = returns[mask].double(), values[mask].double()
    count, means, squared = _moments(torch.stack([of_returns, of_returns - of_values]), reduce)
    if squared[0] <= count * (ROUNDING * means[0]) ** 2:
        return 0.0
    return float(1 - squared[1] / squared[0])


def _of_groups(returns: Tensor, group: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(returns in fp64, 0 where not valid; groups counted from 0; 1.0 where valid), each (B,)."""
    kept = returns.double().masked_fill(~valid, 0)
    return kept, torch.unique(group, return_inverse=True)[1], valid.double()


def _group_sums(values: Tensor, group: Tensor) -> Tensor:
    """The sum over each row's group, (B,)."""
    return torch.zeros_like(values).index_add(0, group, values)[group]


def _moments(columns: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """(count (), means (K,), sums of squared deviations (K,)) over all ranks, of columns (K, n) in float64."""
    count = columns.new_tensor([columns.shape[1]])
    sums = reduce(torch.cat([count, columns.sum(1)]))
    means = sums[1:] / sums[0].clamp(min=1)
    return sums[0], means, reduce(((columns - means[:, None]) ** 2).sum(1))
