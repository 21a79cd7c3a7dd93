"""Numbers that follow the run from update to update: the weight of the KL penalty, and the moments of rewards.

Every rank holds the same: what they are updated with is a figure of all ranks. `state_dict()` is JSON, and what
`load_state_dict` makes of it goes on exactly as if there had been no interruption.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Ziegler et al. clip the relative error to this, so that one odd batch cannot move the weight by much.
LARGEST_ERROR = 0.2
# Reached only by an update of more than 4.5 horizons; a factor of 0 or below would end the penalty for good.
SMALLEST_FACTOR = 0.1


class FixedKL:
    """A weight of the KL penalty that stays."""

    def __init__(self, coefficient: float) -> None:
        """Raises: ValueError if the coefficient is negative or not finite."""
        self.coefficient = _checked_coefficient(coefficient)

    def update(self, nats_per_completion: float, completions: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = _checked_coefficient(state["coefficient"])


class AdaptiveKL:
    """A weight of the KL penalty that rises while the KL divergence is above its target and falls while below.

    The KL is that of whole completions, a sum over tokens: a target per token would mean another thing at each length.
    A weight of 0 stays 0.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2; per update n / horizon replaces its gain of 0.1.
    """

    def __init__(self, coefficient: float, *, target_nats_per_completion: float, horizon_completions: float) -> None:
        """Raises: ValueError if target or horizon is not above 0, or the coefficient is negative; finite, all three."""
        self.coefficient = _checked_coefficient(coefficient)
        settings = {
            "target_nats_per_completion": target_nats_per_completion,
            "horizon_completions": horizon_completions,
        }
        for name, value in settings.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be a number above 0")
        self.target_nats_per_completion = target_nats_per_completion
        self.horizon_completions = horizon_completions

    def update(self, nats_per_completion: float, completions: int) -> None:
        """coefficient *= 1 + clip(KL / target - 1, -0.2, 0.2) * completions / horizon, the factor at least 0.1.

        `nats_per_completion` is the mean over the `completions` of this update, of all ranks.
        Raises: ValueError if it is not finite.
        """
        if not math.isfinite(nats_per_completion):
            raise ValueError(f"the KL divergence of this update is {nats_per_completion}; no weight can follow that")
        error = nats_per_completion / self.target_nats_per_completion - 1
        error = min(max(error, -LARGEST_ERROR), LARGEST_ERROR)
        self.coefficient *= max(1 + error * completions / self.horizon_completions, SMALLEST_FACTOR)

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Target and horizon are settings, and stay."""
        self.coefficient = _checked_coefficient(state["coefficient"])


class RunningMoments:
    """Mean and standard deviation of all values so far, without keeping them.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squared_deviations = 0.0

    @property
    def std(self) -> float:
        """Unbiased. 1 while fewer than two values are known, so that dividing by it changes nothing; 0 where all are
        equal."""
        if self.count < 2:
            return 1.0
        return math.sqrt(self._squared_deviations / (self.count - 1))

    def update(self, values: Tensor | Sequence[float]) -> None:
        """Take in values (n,) of all ranks, the same on every rank, in float64; none changes nothing.

        Raises: ValueError if one is not finite: it would stay in the moments for good.
        """
        values = torch.as_tensor(values, dtype=torch.float64).cpu()
        if not values.isfinite().all():
            raise ValueError(f"{int((~values.isfinite()).sum())} of {values.numel()} values are not finite")
        new = values.numel()
        if not new:
            return
        new_mean = values.mean()
        shift, total = float(new_mean) - self.mean, self.count + new
        self._squared_deviations += float(((values - new_mean) ** 2).sum()) + shift**2 * self.count * new / total
        self.mean += shift * new / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squared_deviations": self._squared_deviations}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count = int(state["count"])
        self.mean = float(state["mean"])
        self._squared_deviations = float(state["squared_deviations"])


def _checked_coefficient(coefficient: float) -> float:
    if not (math.isfinite(coefficient) and coefficient >= 0):
        raise ValueError(f"the weight of the KL penalty is {coefficient}; it must be a number from 0 up")
    return coefficient
