"""Loss on raw text by the word, so that models with different tokenizers compare: what training made it forget.

Words are runs without white space, counted in the text itself; log-probabilities are sums over a document's tokens, in
nats. Shapes: (documents,).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np

from align.evaluation.intervals import DRAWS, SEED, Estimate, Values, percentiles, resampled


@dataclass(frozen=True)
class TextLoss:
    """Of all documents together: a long one counts for more."""

    per_word: float
    """-sum of log-probabilities / words, in nats."""
    perplexity: float
    """exp(per_word): word-normalised perplexity."""
    words: int
    documents: int


def word_counts(texts: Sequence[str]) -> Values:
    """Words of each text."""
    return np.array([len(text.split()) for text in texts], dtype=np.float64)


def text_loss(logps: Values, words: Values) -> TextLoss:
    """Loss and perplexity by the word. Raises: ValueError if there are no words, or a log-probability is no number."""
    logps, words = _checked(logps, words)
    per_word = float(-logps.sum() / words.sum())
    return TextLoss(per_word, exp(per_word) if per_word < 700 else float("inf"), int(words.sum()), len(words))


def text_loss_change(before: Values, after: Values, words: Values, *, draws: int = DRAWS, seed: int = SEED) -> Estimate:
    """How many nats a word more the texts cost after than before, with its interval from resampling documents.

    before, after: log-probabilities of the same documents.
    """
    before, words = _checked(before, words)
    after, _ = _checked(after, words)
    totals = np.stack([before - after, words], axis=1)
    found = np.concatenate([drawn[:, 0] / drawn[:, 1] for drawn in resampled(totals, draws=draws, seed=seed)])
    mean = totals[:, 0].sum() / words.sum()
    spread, count = totals[:, 0] - mean * words, len(words)
    error = np.sqrt(count / (count - 1) * (spread**2).sum()) / words.sum() if count > 1 else float("nan")
    return Estimate(float(mean), *percentiles(found), float(error), int(words.sum()), count)


def _checked(logps: Values, words: Values) -> tuple[Values, Values]:
    logps, words = np.asarray(logps, dtype=np.float64), np.asarray(words, dtype=np.float64)
    if logps.shape != words.shape or not words.sum() > 0 or not np.isfinite(logps).all():
        raise ValueError("one finite log-probability and one count of words a document, and some words, are needed")
    return logps, words
