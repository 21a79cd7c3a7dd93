"""How well labels were guessed: accuracy, F1 by label, their mean, and which label was taken for which."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align.evaluation.intervals import Estimate, Values, estimate


@dataclass(frozen=True)
class Classified:
    """Guesses against the truth."""

    labels: list[str]
    accuracy: Estimate
    macro_f1: float
    """The mean of F1 over the labels that the rows have, each as heavy as the other."""
    f1: dict[str, float]
    precision: dict[str, float]
    """0 where a label was never guessed."""
    recall: dict[str, float]
    confusion: list[list[int]]
    """Rows: the true label; columns: the guessed one; in the order of `labels`."""
    unanswered: int
    """Rows without a guess: they count as wrong, and stand in no column."""
    right: Values
    """1 for each row that was guessed right, else 0."""


def classified(labels: Sequence[str], truth: Sequence[str], guessed: Sequence[str | None], *, draws: int) -> Classified:
    """Figures of guesses; None is no guess. draws: bootstrap resamples for the interval of accuracy.

    Raises: ValueError for no row, or a label that is not among `labels`.
    Source: macro-averaged F1 as in Opitz & Burst 2019, arXiv:1911.03347, eq. 2 (mean of F1s).
    """
    if not truth or len(truth) != len(guessed):
        raise ValueError(f"{len(guessed)} guesses for {len(truth)} rows")
    place = {label: index for index, label in enumerate(labels)}
    table = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for one, other in zip(truth, guessed, strict=True):
        if one not in place or (other is not None and other not in place):
            raise ValueError(f"{one!r} or {other!r} is none of {list(labels)}")
        if other is not None:
            table[place[one], place[other]] += 1
    counts = np.array([truth.count(label) for label in labels])
    hits, columns = np.diag(table), table.sum(axis=0)
    precision, recall = (hits / np.maximum(total, 1) for total in (columns, counts))
    f1 = 2 * hits / np.maximum(columns + counts, 1)
    right = np.array([float(one == other) for one, other in zip(truth, guessed, strict=True)])
    accuracy = estimate(right, share=True, draws=draws)
    assert accuracy is not None
    by_label = [dict(zip(labels, map(float, values), strict=True)) for values in (f1, precision, recall)]
    macro = float(f1[counts > 0].mean())
    return Classified(
        list(labels), accuracy, macro, *by_label, table.tolist(), sum(one is None for one in guessed), right
    )  # fmt: skip
