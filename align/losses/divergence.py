"""How far a model has gone from another, estimated from what it samples itself. Numpy in, plain numbers out.

With d = log p - log q of a sampled token, p being the sampling model at the temperature of the samples:
    k1 = d                  unbiased, and of either sign
    k3 = exp(-d) - 1 + d    unbiased too, never negative
Source: joschu.net/blog/kl-approx.html. Intervals are of 95 %, by the spread over sequences.
"""

from collections.abc import Sequence

import numpy as np

NORMAL_975 = 1.959963984540054


def kl_figures(logps: Sequence[Sequence[float]], other_logps: Sequence[Sequence[float]]) -> dict[str, float]:
    """KL(p || q) and the entropy of p, of sampled sequences: {} for none.

    logps, other_logps: log-probability (nats) of each token of each sequence under p and under q; a sequence has one
    token at least. `_per_sequence`: mean of sums over tokens; `_per_token`: mean over all tokens.
    """
    if not logps:
        return {}
    differences = [
        np.asarray(ours, np.float64) - np.asarray(theirs, np.float64) for ours, theirs in _pairs(logps, other_logps)
    ]
    tokens = sum(map(len, differences))
    k1 = np.array([d.sum() for d in differences])
    k3 = np.array([(np.expm1(-d) + d).sum() for d in differences])
    entropy = np.array([-np.sum(ours) for ours in logps])
    return {
        "sequences": float(len(differences)),
        "tokens": float(tokens),
        "k1_per_sequence": float(k1.mean()),
        "k1_per_sequence_reach": _reach(k1),
        "k3_per_sequence": float(k3.mean()),
        "k1_per_token": float(k1.sum() / tokens),
        "k3_per_token": float(k3.sum() / tokens),
        "entropy_per_token": float(entropy.sum() / tokens),
    }


def _pairs(
    logps: Sequence[Sequence[float]], other_logps: Sequence[Sequence[float]]
) -> list[tuple[Sequence[float], Sequence[float]]]:
    pairs = list(zip(logps, other_logps, strict=True))
    assert all(len(ours) == len(theirs) > 0 for ours, theirs in pairs), "a log-probability for each token of both"
    return pairs


def _reach(values: np.ndarray) -> float:
    """Half the width of the mean's interval; 0 for a single value, of which nothing is known."""
    return float(NORMAL_975 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
