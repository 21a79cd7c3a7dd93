"""How sure a reward model may be: the temperature T at which sigmoid(gap / T) fits the labels best.

T is 1 for a calibrated model, 3 for one whose scores are three times too far apart. It is fitted on one part of the
pairs and judged on the other, so that what is shown is no memory of the labels.
Source: temperature scaling, Guo et al. 2017, arXiv:1706.04599, section 4.2.
"""

from dataclasses import dataclass

import numpy as np

from align.config.errors import UserError
from align.evaluation.intervals import SEED, Values
from align.losses.calibration import expected_calibration_error, preferred_side

STEPS = 100
LARGEST = 50.0
"""Of 1 / T times the mean gap: beyond it every label is on the side of its score, and no T is best."""


@dataclass(frozen=True)
class Temperature:
    """Scores before and after they are divided by T; the figures are of pairs that T was not fitted on."""

    temperature: float
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    fitted_on: int
    judged_on: int


def nll(gap: Values, p: Values) -> float:
    """Mean negative log-likelihood, in nats, of labels p under sigmoid(gap). Shapes: (pairs,)."""
    return float(np.mean(np.logaddexp(0, -gap) * p + np.logaddexp(0, gap) * (1 - p)))


def fit_temperature(gap: Values, p: Values) -> float:
    """The T that minimises the NLL of sigmoid(gap / T); infinite where the scores are no better than none.

    gap: (pairs,) chosen - rejected. p: (pairs,) the labels' probability that chosen is better.
    Raises: UserError if every label is on the side of its score: the smaller T, the better, without end.
    """
    gap, p = np.asarray(gap, dtype=np.float64), np.asarray(p, dtype=np.float64)
    scale = np.abs(gap).mean()
    if not scale or float((gap * (p - 0.5)).sum()) <= 0:
        return float("inf")
    unit, low, high = gap / scale, 0.0, LARGEST
    if _slope(high, unit, p) < 0:
        raise UserError(f"no temperature fits {len(gap)} pairs: the scores order every one as its label does; use more")
    # The likelihood is concave in 1 / T, so its slope changes sign once.
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(middle, unit, p) > 0 else (middle, high)
    return float(scale / ((low + high) / 2))


def temperature(chosen: Values, rejected: Values, p: Values, *, seed: int = SEED) -> Temperature:
    """T fitted on half of the pairs, drawn with the seed, and judged on the others.

    Raises: UserError for fewer than two pairs, and what fit_temperature raises.
    """
    chosen, rejected, p = (np.asarray(c, dtype=np.float64) for c in (chosen, rejected, p))
    if len(p) < 2:
        raise UserError(f"{len(p)} pairs to fit a temperature on and to judge it; hold out more")
    order = np.random.default_rng(seed).permutation(len(p))
    fitted, judged = order[: len(p) // 2], order[len(p) // 2 :]
    t = fit_temperature((chosen - rejected)[fitted], p[fitted])
    gap, labels = (chosen - rejected)[judged], p[judged]
    return Temperature(
        t, _ece(gap, labels), _ece(gap / t, labels), nll(gap, labels), nll(gap / t, labels), len(fitted), len(judged)
    )


def _slope(inverse: float, unit: Values, p: Values) -> float:
    """Of the NLL, by 1 / T in units of the mean gap."""
    with np.errstate(over="ignore"):
        return float(np.mean(unit * (1 / (1 + np.exp(-inverse * unit)) - p)))


def _ece(gap: Values, p: Values) -> float:
    return expected_calibration_error(*preferred_side(gap, np.zeros_like(gap), p))
