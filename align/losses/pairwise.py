"""Preference losses: one loss a pair, from the log-ratios of its two completions.

Symbols: a log-ratio is log pi(y|x) - log pi_ref(y|x), summed over the tokens of completion y; `beta` is the strength
of the pull to the reference; `p` is the probability that the completion called chosen is better (1 = a hard label).
All inputs and outputs have shape (pairs,). Definitions agree with TRL 1.16's DPOTrainer at p = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from align.config.errors import UserError


def _binary_nll(logits: Tensor, p: Tensor) -> Tensor:
    """-p log s(z) - (1 - p) log s(-z): cross-entropy of a coin with bias p against sigmoid(z)."""
    return -p * F.logsigmoid(logits) - (1 - p) * F.logsigmoid(-logits)


def _smoothed(p: Tensor, label_smoothing: float) -> Tensor:
    """The label after a share `label_smoothing` of all labels was swapped."""
    return p * (1 - label_smoothing) + (1 - p) * label_smoothing


def sigmoid_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, p: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """DPO, and conservative DPO where label_smoothing > 0 or p < 1.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO".
    """
    return _binary_nll(beta * (chosen_logratios - rejected_logratios), _smoothed(p, label_smoothing))


def robust_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, p: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """DPO made unbiased under labels of which a share `label_smoothing` < 0.5 is swapped.

    Source: Chowdhury et al. 2024, arXiv:2403.00409, the loss of its Robust DPO.
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    kept, swapped = _binary_nll(logits, p), _binary_nll(-logits, p)
    return ((1 - label_smoothing) * kept - label_smoothing * swapped) / (1 - 2 * label_smoothing)


def hinge_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, p: Tensor, *, beta: float) -> Tensor:
    """A margin of 1 between the two rewards; with p < 1 the mean over both orders.

    Source: Liu et al. 2023 (RSO), arXiv:2309.06657, hinge-norm, after SLiC (Zhao et al. 2023, arXiv:2305.10425).
    """
    logits = beta * (chosen_logratios - rejected_logratios)
    return p * F.relu(1 - logits) + (1 - p) * F.relu(1 + logits)


def ipo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    p: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Squared distance of the difference of log-ratios, each a mean over its tokens, to 1 / (2 beta).

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17 with tau = beta; the mean over tokens is what its authors used.
    """
    difference = chosen_logratios / chosen_tokens - rejected_logratios / rejected_tokens
    target = 1 / (2 * beta)
    return p * (difference - target) ** 2 + (1 - p) * (difference + target) ** 2


def sigmoid_norm_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    p: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Length-normalised DPO: each log-ratio is a mean over its tokens.

    Source: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, section 5.
    """
    difference = chosen_logratios / chosen_tokens - rejected_logratios / rejected_tokens
    return _binary_nll(beta * difference, _smoothed(p, label_smoothing))


def nll_loss(chosen_logps: Tensor, chosen_tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each chosen completion, a mean over its own tokens.

    The mean is taken inside the pair, so the batch mean does not depend on how a batch is split. TRL's `sft` term is a
    mean over all tokens of a micro-batch: the same number where chosen completions are equally long.
    Source: Pang et al. 2024, arXiv:2404.19733, eq. 2.
    """
    return -chosen_logps / chosen_tokens


@dataclass(frozen=True)
class PairLogps:
    """What a pair loss sees; every field has shape (pairs,), log-probabilities are sums over completion tokens."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    p: Tensor


@dataclass(frozen=True)
class PairObjective:
    """A preference loss with its settings, plus nll_weight times the NLL of the chosen completion."""

    loss: str = "sigmoid"
    """sigmoid | hinge | ipo | robust | sigmoid_norm"""
    beta: float = 0.1
    label_smoothing: float = 0.0
    """Assumed share of swapped labels, in [0, 0.5); only sigmoid, sigmoid_norm and robust have one."""
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss={self.loss} is not one of {', '.join(LOSSES)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing={self.label_smoothing} must lie in [0, 0.5)")
        if self.label_smoothing and self.loss in ("hinge", "ipo"):
            raise UserError(f"label_smoothing has no effect on loss={self.loss}; set it to 0")
        if self.beta <= 0:
            raise UserError(f"beta={self.beta} must be above 0")

    def __call__(self, logps: PairLogps) -> Tensor:
        """Loss of each pair, shape (pairs,)."""
        losses = LOSSES[self.loss](self, logps)
        if self.nll_weight:
            losses = losses + self.nll_weight * nll_loss(logps.chosen, logps.chosen_tokens)
        return losses

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards beta * log-ratio of chosen and rejected, without gradient."""
        chosen = self.beta * (logps.chosen - logps.reference_chosen)
        rejected = self.beta * (logps.rejected - logps.reference_rejected)
        return chosen.detach(), rejected.detach()


def _logratios(logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
    return logps.chosen - logps.reference_chosen, logps.rejected - logps.reference_rejected, logps.p


def _lengths(logps: PairLogps) -> tuple[Tensor, Tensor]:
    return logps.chosen_tokens, logps.rejected_tokens


LOSSES: dict[str, Callable[[PairObjective, PairLogps], Tensor]] = {
    "sigmoid": lambda o, x: sigmoid_loss(*_logratios(x), beta=o.beta, label_smoothing=o.label_smoothing),
    "hinge": lambda o, x: hinge_loss(*_logratios(x), beta=o.beta),
    "ipo": lambda o, x: ipo_loss(*_logratios(x), *_lengths(x), beta=o.beta),
    "robust": lambda o, x: robust_loss(*_logratios(x), beta=o.beta, label_smoothing=o.label_smoothing),
    "sigmoid_norm": lambda o, x: sigmoid_norm_loss(
        *_logratios(x), *_lengths(x), beta=o.beta, label_smoothing=o.label_smoothing
    ),
}
