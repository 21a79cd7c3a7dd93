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
