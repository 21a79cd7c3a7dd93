"""The slow, obvious versions that the fast ones are held against."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def token_logps(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> list[Tensor]:
    """Log-probability of each completion token, from one forward of the whole sequence by itself."""
    ids = [*prompt, *completion]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    logps = []
    for i in range(len(prompt), len(ids)):
        probabilities = torch.exp(logits[i - 1]) / torch.exp(logits[i - 1]).sum()
        logps.append(torch.log(probabilities[ids[i]]))
    return logps


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def dpo(chosen: float, rejected: float, beta: float, p: float = 1.0, smoothing: float = 0.0) -> float:
    """-E log sigmoid(+-beta * difference) over the two orders of the pair."""
    z = beta * (chosen - rejected)
    label = p * (1 - smoothing) + (1 - p) * smoothing
    return -label * math.log(sigmoid(z)) - (1 - label) * math.log(1 - sigmoid(z))


def robust_dpo(chosen: float, rejected: float, beta: float, p: float, smoothing: float) -> float:
    """Each order of the pair with the unbiased loss, weighted by how likely it is."""

    def unbiased(z: float) -> float:
        return ((1 - smoothing) * -math.log(sigmoid(z)) + smoothing * math.log(sigmoid(-z))) / (1 - 2 * smoothing)

    z = beta * (chosen - rejected)
    return p * unbiased(z) + (1 - p) * unbiased(-z)


def hinge(chosen: float, rejected: float, beta: float, p: float) -> float:
    z = beta * (chosen - rejected)
    return p * max(0.0, 1 - z) + (1 - p) * max(0.0, 1 + z)


def ipo(chosen: float, rejected: float, chosen_tokens: int, rejected_tokens: int, beta: float, p: float) -> float:
    h = chosen / chosen_tokens - rejected / rejected_tokens
    return p * (h - 1 / (2 * beta)) ** 2 + (1 - p) * (-h - 1 / (2 * beta)) ** 2


def dpo_batch_loss(model: nn.Module, reference: nn.Module, rows: Sequence[dict], beta: float) -> Tensor:
    """Mean DPO loss of rows of pairs, sequence by sequence, with gradient."""
    losses = []
    for row in rows:
        difference = torch.zeros((), dtype=torch.float64)
        for sign, completion in ((1, row["chosen_ids"]), (-1, row["rejected_ids"])):
            policy = torch.stack(token_logps(model, row["prompt_ids"], completion)).sum()
            with torch.no_grad():
                frozen = torch.stack(token_logps(reference, row["prompt_ids"], completion)).sum()
            difference = difference + sign * (policy - frozen)
        losses.append(-torch.log(1 / (1 + torch.exp(-beta * difference))))
    return torch.stack(losses).mean()


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """Advantages of one completion: for each token, all later one-step errors, discounted by gamma * lam a token."""
    following = [*values[1:], 0.0]
    errors = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * error for k, error in enumerate(errors[t:])) for t in range(len(errors))]


def discounted_sums(rewards: Sequence[float], gamma: float) -> list[float]:
    """For each token, its reward and all later ones of the completion, discounted."""
    return [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]


def clipped_policy_loss(
    logp: float, old_logp: float, advantage: float, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> float:
    """Minus PPO's objective of one token, case by case."""
    ratio = math.exp(logp - old_logp)
    objective = ratio * advantage
    if advantage > 0 and ratio > 1 + clip_high:
        objective = (1 + clip_high) * advantage
    if advantage < 0 and ratio < 1 - clip_low:
        objective = (1 - clip_low) * advantage
    if dual_clip and advantage < 0 and ratio > dual_clip:
        objective = dual_clip * advantage
    return -objective


def clipped_value_loss(value: float, old_value: float, wanted: float, clip: float) -> float:
    """Half the larger squared error, of the value and of the value held near the old one."""
    held = min(max(value, old_value - clip), old_value + clip) if clip else value
    return 0.5 * max((value - wanted) ** 2, (held - wanted) ** 2)
