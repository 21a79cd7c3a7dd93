"""How good a reward model's scores are, on held-out pairs with known answers: numpy in, plain numbers out.

The model's probability that chosen is better is sigmoid(chosen - rejected), the scores' difference read as log-odds
(Bradley-Terry). Reliability of that number itself would be degenerate: the answer is "chosen" in nearly every row, so
a bin of low probabilities can only hold mistakes. Calibration is therefore asked of the side that the model prefers:
    confidence   sigmoid(|chosen - rejected|), in [0.5, 1]
    outcome      the label's probability that the preferred side is better: p where that is chosen, 1 - p where it is
                 rejected, 0.5 where the model has no preference
Intervals are of 95 %, and take pairs as independent; the pairs of one ranking are not, so theirs are too narrow.
Shapes: chosen and rejected scores, p, margin and token counts are (pairs,), float64.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.config.errors import UserError

Values = NDArray[np.float64]

NORMAL_975 = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """A share of `count` cases with its interval."""

    share: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Group:
    """The share of right answers among pairs of which some value lies between `smallest` and `largest`."""

    smallest: float
    largest: float
    accuracy: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence lies between `start` and `end`."""

    start: float
    end: float
    confidence: float
    """Mean of what the model said."""
    accuracy: float
    """Mean of what was so."""
    low: float
    high: float
    count: int


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Where the true share lies, with 95 %: the score interval, which stays in [0, 1] and holds for small counts.

    With halves among the cases (ties, soft labels) it is a little too wide. Source: Wilson 1927, JASA 22.
    """
    assert count > 0, "a share of nothing"
    z2 = NORMAL_975**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = NORMAL_975 / (1 + z2 / count) * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(float(middle - reach), 0.0), min(float(middle + reach), 1.0)


def share_of(outcomes: Values) -> Share:
    """The mean of outcomes in [0, 1] as a share."""
    share = float(np.mean(outcomes))
    return Share(share, *wilson_interval(share, len(outcomes)), len(outcomes))


def right_answers(chosen: Values, rejected: Values) -> Values:
    """1 where chosen scores higher, 0 where rejected does, 0.5 where they tie."""
    return (1 + np.sign(chosen - rejected)) / 2


def accuracy(chosen: Values, rejected: Values) -> Share:
    """The share of pairs in which chosen scores higher; equal scores count half."""
    return share_of(right_answers(chosen, rejected))


def preferred_side(chosen: Values, rejected: Values, p: Values) -> tuple[Values, Values]:
    """(confidence, outcome) of the side that the model prefers, as defined above."""
    right = right_answers(chosen, rejected)
    confidence = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    return confidence, right * p + (1 - right) * (1 - p)


def reliability_bins(confidence: Values, outcome: Values, bins: int = 10) -> list[Bin]:
    """Equally wide bins of confidence over [0.5, 1], the last one closed; bins without pairs are left out."""
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], confidence, side="right")
    found = []
    for index in np.unique(place):
        inside = place == index
        so = share_of(outcome[inside])
        start, end = edges[index : index + 2].tolist()
        found.append(Bin(start, end, float(confidence[inside].mean()), so.share, so.low, so.high, so.count))
    return found


def expected_calibration_error(confidence: Values, outcome: Values, bins: int = 10) -> float:
    """Mean over pairs of how far their bin's confidence is from its accuracy: 0 is calibrated.

    Chance alone makes it larger than 0, the more so the fewer the pairs.
    Source: Guo et al. 2017, arXiv:1706.04599, section 2, whose bins span [0, 1].
    """
    found = reliability_bins(confidence, outcome, bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in found) / len(confidence)


def brier_score(confidence: Values, outcome: Values) -> float:
    """Mean squared error of the probability against a label drawn with probability `outcome`.

    0 is best, 0.25 is what indifference gets. The same for either side of a pair, so the preferred one is no choice.
    Source: Brier 1950, Monthly Weather Review 78.
    """
    return float(np.mean(outcome * (1 - confidence) ** 2 + (1 - outcome) * confidence**2))


def quantile_edges(values: Values, groups: int) -> Values:
    """Borders that part the values into groups of about equal size, fewer where many values are equal."""
    shares = np.arange(1, groups) / groups
    return np.unique(np.quantile(values, shares, method="inverted_cdf"))


def accuracy_by(right: Values, values: Values, edges: Values) -> list[Group]:
    """Right answers by a value of the pair, in the groups (-inf, e0], (e0, e1], ... (en, inf) that hold any."""
    place = np.searchsorted(edges, values, side="left")
    groups = []
    for index in np.unique(place):
        inside = place == index
        so = share_of(right[inside])
        smallest, largest = float(values[inside].min()), float(values[inside].max())
        groups.append(Group(smallest, largest, so.share, so.low, so.high, so.count))
    return groups


def pearson(first: Values, second: Values) -> float | None:
    """Linear correlation, None where one of the two does not vary."""
    a, b = first - first.mean(), second - second.mean()
    if not (np.ptp(first) and np.ptp(second)):
        return None
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def spearman(first: Values, second: Values) -> float | None:
    """Correlation of ranks; equal values share their mean rank."""
    return pearson(_mean_ranks(first), _mean_ranks(second))


def _mean_ranks(values: Values) -> Values:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def rating_figures(scores: Values, ratings: Values, predicted: Values | None = None) -> dict[str, float]:
    """How the scores of completions go with the ratings that the data gives them, all (completions,).

    Ratings are NaN where there is none. `predicted`: the rating that each score stands for, of a model that was
    trained on ratings. `rating_rmse` is then its error in the data's unit, to be held against `rating_spread`, which is
    what always saying the mean would get. A correlation that is not defined is left out, and all without ratings.
    """
    there = np.isfinite(scores) & np.isfinite(ratings)
    if not there.any():
        return {}
    scores, ratings = scores[there], ratings[there]
    figures = {
        "rated": int(there.sum()),
        "rating_pearson": pearson(scores, ratings),
        "rating_spearman": spearman(scores, ratings),
        "rating_spread": float(ratings.std()),
    }
    if predicted is not None:
        figures["rating_rmse"] = float(np.sqrt(np.mean((predicted[there] - ratings) ** 2)))
    return {name: figure for name, figure in figures.items() if figure is not None}


def summary(
    chosen: Values,
    rejected: Values,
    p: Values,
    margin: Values,
    chosen_tokens: Values,
    rejected_tokens: Values,
    *,
    completions: tuple[Values, Values] | None = None,
    groups: int = 5,
) -> dict[str, Any]:
    """All of the above for held-out pairs, as plain numbers: `figures` for the log, `tables` for the page.

    `p` is at least 0.5. Ties (p = 0.5) have no right answer: they count for calibration only. Pairs with a score that
    is not finite are left out and counted. `completions`: (scores, tokens) of every completion once, where pairs come
    from rankings and hold some more often; without it, both sides of all pairs. A figure that is not defined
    (a correlation with lengths that are all equal) is left out.
    Raises: UserError if no pair is left to judge.
    """
    scored = np.isfinite(chosen) & np.isfinite(rejected)
    chosen, rejected, p, margin, chosen_tokens, rejected_tokens = (
        np.asarray(column, dtype=np.float64)[scored]
        for column in (chosen, rejected, p, margin, chosen_tokens, rejected_tokens)
    )
    assert (p >= 0.5).all(), "chosen is the side that labels put first"
    decided = p > 0.5
    if not decided.any():
        raise UserError(
            f"none of {len(scored)} held-out pairs can be judged ({(~scored).sum()} with scores that are not finite, "
            f"{len(p)} ties); hold out more pairs, or look for NaN in the loss"
        )
    if completions is None:
        completions = np.concatenate([chosen, rejected]), np.concatenate([chosen_tokens, rejected_tokens])
    confidence, outcome = preferred_side(chosen, rejected, p)
    longer_by = (chosen_tokens - rejected_tokens)[decided]
    gap = (chosen - rejected)[decided]
    right = right_answers(chosen, rejected)[decided]
    figures = {
        "pairs": len(p),
        "pairs_tied": int((~decided).sum()),
        "pairs_not_finite": int((~scored).sum()),
        **_accuracy_figures(right),
        "ece": expected_calibration_error(confidence, outcome),
        "brier": brier_score(confidence, outcome),
        "score_margin": float(gap.mean()),
        **_length_figures(right, longer_by, completions),
    }
    tables = {
        "reliability": reliability_bins(confidence, outcome),
        "by_score_margin": accuracy_by(right, np.abs(gap), quantile_edges(np.abs(gap), groups)),
        "by_label_margin": accuracy_by(right, margin[decided], quantile_edges(margin[decided], groups)),
        "by_longer_side": accuracy_by(right, np.sign(longer_by), np.array([-1.0, 0.0])),
        "by_length_difference": accuracy_by(right, longer_by, quantile_edges(longer_by, groups)),
    }
    return {
        "figures": {name: figure for name, figure in figures.items() if figure is not None},
        "tables": {name: [asdict(row) for row in rows] for name, rows in tables.items()},
    }


def _accuracy_figures(right: Values) -> dict[str, float]:
    found = share_of(right)
    return {"accuracy": found.share, "accuracy_low": found.low, "accuracy_high": found.high}


def _length_figures(right: Values, longer_by: Values, completions: tuple[Values, Values]) -> dict[str, float | None]:
    """How scores go with length, and how often model and labels take the longer of two unequal answers.

    Labels may take longer answers for good reasons; a model that does so more often than they do has a bias.
    """
    scores, tokens = (np.asarray(column, dtype=np.float64) for column in completions)
    finite = np.isfinite(scores)
    unequal = longer_by != 0
    chosen_is_longer = longer_by[unequal] > 0
    takes_longer = np.where(chosen_is_longer, right[unequal], 1 - right[unequal])
    return {
        "length_pearson": pearson(scores[finite], tokens[finite]),
        "length_spearman": spearman(scores[finite], tokens[finite]),
        "model_takes_longer": float(takes_longer.mean()) if unequal.any() else None,
        "labels_take_longer": float(chosen_is_longer.mean()) if unequal.any() else None,
    }
