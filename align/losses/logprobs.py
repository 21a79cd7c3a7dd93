"""Log-probabilities of tokens and of completions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target under its row of logits, in fp32 whatever the logits are.

    Shapes: logits (S, V), targets (S,); returns (S,).
    """
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def completion_logps(token_logps: Tensor, completion: Tensor, completions: int) -> Tensor:
    """Sum of the token log-probabilities of each completion, in fp64.

    Shapes: token_logps (S,), completion (S,) = which completion a token belongs to; returns (completions,).
    """
    # A sum near -500 has steps of 3e-5 in fp32, and the loss is made of the small difference of two of them.
    sums = torch.zeros(completions, dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, completion, token_logps.double())


def completion_lengths(completion: Tensor, completions: int) -> Tensor:
    """Scored tokens of each completion, in fp64; shapes as in `completion_logps`."""
    return torch.bincount(completion, minlength=completions).double()
