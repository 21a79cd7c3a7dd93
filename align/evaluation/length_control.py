"""The win rate that is left when replies are equally long.

A logistic model of the verdict, with an intercept and the length difference as its one feature,
    P(first wins) = sigmoid(quality + slope * tanh(longer_by / sd(longer_by)))
predicted at equal lengths: sigmoid(quality). Verdicts may be soft; they are fractional targets.
Source: the formula `np.tanh(std_delta_len) + not_gamed_baseline - 1` of alpaca_eval (Dubois et al. 2024,
arXiv:2404.04475), without the difficulty of instructions, which needs its file of weights, and without the L1 penalty
that it cross-validates: this is the maximum of the likelihood.

If some threshold of the feature parts all wins from all losses the likelihood has no maximum. Then, and only then, both
weights get a normal prior with standard deviation 1 / sqrt(RIDGE), and `separable` says so: a judge that looks at
nothing but length comes out at about 0.5.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.evaluation.intervals import DRAWS, SEED, Values, cluster_ids, percentiles

RIDGE = 1.0
STEPS = 60
"""Newton steps at most; a handful are taken."""
CLOSE = 1e-10
"""Largest gradient, a pair, at which a fit is done."""
AT_ONCE = 2**17
"""Weights of pairs held at once while resampling."""


@dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal lengths, beside the raw one."""

    rate: float
    low: float
    high: float
    raw: float
    """Mean verdict of the same pairs."""
    slope: float
    """Log-odds that a much longer reply gains; 0: length plays no part."""
    mean_lengths: tuple[float, float]
    """Of the first and the second system's replies."""
    length_change: float
    """How much longer the first system's replies are, as a share of the second's: 0.18 is 18 % longer."""
    separable: bool
    count: int
    missing: int


def length_controlled(
    verdicts: Values,
    first_lengths: Values,
    second_lengths: Values,
    prompts: Sequence[Any] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
) -> LengthControlled | None:
    """The first system's win rate at equal lengths, with a 95 % interval from resampling prompts.

    verdicts: (pairs,) in [0, 1], NaN where missing. Lengths: (pairs,) in any unit; characters is alpaca_eval's. The
    unit of the feature, the standard deviation, is of the pairs that have a verdict, and the same in all draws.
    A pair without a verdict or a length is missing. None if no pair is left, or if all differences are equal but not 0:
    then length cannot be told from quality.
    """
    verdicts, first, second = (np.asarray(c, dtype=np.float64) for c in (verdicts, first_lengths, second_lengths))
    there = np.isfinite(verdicts + first + second)
    if not there.any():
        return None
    target, first, second = verdicts[there], first[there], second[there]
    longer_by = first - second
    if np.ptp(longer_by) == 0 and longer_by[0] != 0:
        return None
    feature = np.tanh(longer_by / longer_by.std(ddof=1)) if np.ptp(longer_by) else np.zeros_like(longer_by)
    ones = np.ones((1, len(target)))
    weights, parted = fit(feature, target, ones)
    ids = cluster_ids(prompts, len(verdicts))[there]
    found = np.concatenate([_rates(fit(feature, target, drawn, weights[0])[0]) for drawn in _redrawn(ids, draws, seed)])
    return LengthControlled(
        float(_rates(weights)[0]), *percentiles(found), float(target.mean()), float(weights[0, 1]),
        (float(first.mean()), float(second.mean())),
        float(first.mean() / second.mean() - 1) if second.mean() else float("nan"),
        bool(parted[0]), len(target), int((~there).sum()),
    )  # fmt: skip


def fit(
    feature: Values, target: Values, counts: Values, near: Values | None = None
) -> tuple[Values, NDArray[np.bool_]]:
    """(intercept, slope) of many fits at once, (draws, 2), and which of them had to be held by the ridge, (draws,).

    feature, target: (pairs,). counts: (draws, pairs), how often each pair is in a draw. near: (2,) weights to start
    from, which spares steps and changes nothing. Where all verdicts of a draw
    are 1 the intercept is +inf, where all are 0 -inf; where its feature does not vary the slope is 0.
    """
    held = _separable(feature, target, counts)
    share = (counts @ target) / counts.sum(axis=1)
    varies = _extremes(feature, counts > 0)
    flat = varies[0] == varies[1]
    with np.errstate(divide="ignore"):
        start = np.log(share) - np.log1p(-share)
    weights = np.stack([start, np.zeros_like(start)], axis=1)
    open_ = np.isfinite(start) & ~flat
    if open_.any():
        begin = np.zeros(2) if near is None or not np.isfinite(near).all() else near
        weights[open_] = _newton(feature, target, counts[open_], np.where(held[open_], RIDGE, 0.0), begin)
    return weights, held & open_


def _newton(feature: Values, target: Values, counts: Values, ridge: Values, begin: Values) -> Values:
    """Newton's method for every draw, a step halved as long as it makes the likelihood worse."""
    weights = np.tile(begin, (len(counts), 1))
    loss = _loss(weights, feature, target, counts, ridge)
    for _ in range(STEPS):
        p = _sigmoid(weights[:, :1] + weights[:, 1:] * feature)
        residual = counts * (p - target)
        gradient = np.stack([residual.sum(axis=1), residual @ feature], axis=1) + ridge[:, None] * weights
        if np.abs(gradient).max() < CLOSE * counts.shape[1]:
            break
        curve = counts * p * (1 - p)
        a, b, c = curve.sum(axis=1) + ridge, curve @ feature, curve @ feature**2 + ridge
        det = np.maximum(a * c - b**2, 1e-300)
        step = np.stack([c * gradient[:, 0] - b * gradient[:, 1], a * gradient[:, 1] - b * gradient[:, 0]], axis=1)
        step /= det[:, None]
        for _ in range(STEPS):
            tried = _loss(weights - step, feature, target, counts, ridge)
            # The last steps change the loss by no more than its rounding.
            worse = ~(tried <= loss + 1e-12 * np.abs(loss))
            if not worse.any():
                break
            step[worse] /= 2
        weights, loss = weights - step, tried
    return weights


def _loss(weights: Values, feature: Values, target: Values, counts: Values, ridge: Values) -> Values:
    odds = weights[:, :1] + weights[:, 1:] * feature
    # log(1 + exp(odds)), which np.logaddexp takes four times as long for.
    softplus = np.maximum(odds, 0) + np.log1p(np.exp(-np.abs(odds)))
    return (counts * (softplus - target * odds)).sum(axis=1) + ridge / 2 * (weights**2).sum(axis=1)


def _separable(feature: Values, target: Values, counts: Values) -> NDArray[np.bool_]:
    """Whether a threshold parts what won from what lost, equality included; a tie or soft verdict is on both sides."""
    won, lost = (_extremes(feature, (counts > 0) & side) for side in (target > 0, target < 1))
    return (won[0] >= lost[1]) | (won[1] <= lost[0])


def _extremes(feature: Values, inside: NDArray[np.bool_]) -> tuple[Values, Values]:
    """Smallest and largest feature (draws,) of what is inside (draws, pairs); +inf and -inf of nothing."""
    return np.where(inside, feature, np.inf).min(axis=1), np.where(inside, feature, -np.inf).max(axis=1)


def _redrawn(ids: NDArray[np.int64], draws: int, seed: int) -> Iterator[Values]:
    """How often each pair is in each draw of prompts, a few draws (draws, pairs) at a time."""
    _, place = np.unique(ids, return_inverse=True)
    clusters = int(place.max()) + 1
    generator = np.random.default_rng(seed)
    chunk = max(AT_ONCE // len(place), 1)
    for start in range(0, draws, chunk):
        times = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(chunk, draws - start))
        yield times[:, place].astype(np.float64)


def _rates(weights: Values) -> Values:
    return _sigmoid(weights[:, 0])


def _sigmoid(odds: Values) -> Values:
    small = np.exp(-np.abs(odds))
    return np.where(odds >= 0, 1, small) / (1 + small)
