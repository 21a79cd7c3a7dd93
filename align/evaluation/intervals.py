"""Means with 95 % intervals, by resampling prompts: verdicts on the same prompt come and go together.

Shapes: values are (items,), float64; clusters are (items,), any names, one of each prompt's items. NaN is a missing
value: left out, and counted.
Source: percentile bootstrap, Efron & Tibshirani 1993, section 13.3, over clusters as in Davison & Hinkley 1997, 3.8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.losses.calibration import wilson_interval

Values = NDArray[np.float64]

DRAWS = 2000
SEED = 0
AT_ONCE = 2**21
"""Numbers drawn at once, so that memory stays small for any number of prompts."""
LOW, HIGH = 2.5, 97.5


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values on `clusters` prompts, and where it may lie."""

    mean: float
    low: float
    high: float
    standard_error: float
    """From the spread between prompts; sd / sqrt(n) where each has one value. NaN for one prompt."""
    count: int
    clusters: int
    missing: int = 0


def estimate(
    values: Values,
    clusters: Sequence[Any] | None = None,
    *,
    share: bool = False,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Estimate | None:
    """The mean of values with its interval; None if no value is there. Without clusters each value is a prompt's own.

    share: values are in [0, 1]. Where every one is 0, or every one 1, resampling knows no doubt; the interval of a
    share is then Wilson's, of as many cases as there are prompts.
    """
    values = np.asarray(values, dtype=np.float64)
    there = np.isfinite(values)
    if not there.any():
        return None
    missing = int((~there).sum())
    ids = cluster_ids(clusters, len(values))[there]
    values = values[there]
    totals = cluster_totals(np.stack([values, np.ones_like(values)], axis=1), ids)
    found = np.concatenate([drawn[:, 0] / drawn[:, 1] for drawn in resampled(totals, draws=draws, seed=seed)])
    mean = float(values.mean())
    low, high = percentiles(found)
    if share and mean in (0.0, 1.0):
        low, high = wilson_interval(mean, len(totals))
    return Estimate(mean, low, high, _standard_error(totals), len(values), len(totals), missing)


def cluster_ids(clusters: Sequence[Any] | None, count: int) -> NDArray[np.int64]:
    """Names as numbers (count,); raises ValueError if there are not as many names as values."""
    if clusters is None:
        return np.arange(count)
    if len(clusters) != count:
        raise ValueError(f"{len(clusters)} names of prompts for {count} values")
    places: dict[Any, int] = {}
    return np.array([places.setdefault(name, len(places)) for name in clusters], dtype=np.int64)


def cluster_totals(columns: Values, ids: NDArray[np.int64]) -> Values:
    """Sums of each column by cluster: (items, columns) -> (clusters that occur, columns)."""
    _, place = np.unique(ids, return_inverse=True)
    totals = np.zeros((place.max() + 1, columns.shape[1]))
    np.add.at(totals, place, columns)
    return totals


def resampled(totals: Values, *, draws: int = DRAWS, seed: int = SEED) -> Iterator[Values]:
    """Column sums of clusters drawn with replacement, a few draws (draws, columns) at a time.

    A mean over items is then a ratio of two columns, so that prompts with more items keep their weight.
    """
    generator = np.random.default_rng(seed)
    chunk = max(AT_ONCE // len(totals), 1)
    for start in range(0, draws, chunk):
        chosen = generator.integers(len(totals), size=(min(chunk, draws - start), len(totals)))
        yield np.stack([column[chosen].sum(axis=1) for column in totals.T], axis=1)


def percentiles(found: Values) -> tuple[float, float]:
    """The middle 95 % of what draws found; draws in which it is not defined are left out. NaN if all are."""
    found = found[np.isfinite(found)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.percentile(found, [LOW, HIGH])
    return float(low), float(high)


def _standard_error(totals: Values) -> float:
    clusters = len(totals)
    if clusters < 2:
        return float("nan")
    sums, counts = totals.T
    spread = sums - counts * (sums.sum() / counts.sum())
    return float(np.sqrt(clusters / (clusters - 1) * (spread**2).sum()) / counts.sum())
