"""Verdicts of a judge on pairs of replies, asked in both orders: the swap undone, ties, win rates with intervals.

A verdict is the probability that a reply is better, in [0, 1]: 1, 0.5 and 0 where the judge only chooses. NaN is a
verdict that is missing (unreadable, timed out): it is counted and never filled in. Shapes: (pairs,), float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.config.errors import UserError
from align.evaluation.agreement import kappa
from align.evaluation.intervals import DRAWS, SEED, Estimate, Values, estimate


@dataclass(frozen=True)
class TwoOrders:
    """The same pairs judged twice; each number is the probability that the reply shown first is better.

    Raises: UserError for a verdict outside [0, 1], ValueError for columns of unequal length.
    """

    as_given: Values
    """With the pair's first reply in the first slot."""
    swapped: Values
    """With its second reply there."""

    def __post_init__(self) -> None:
        for name in ("as_given", "swapped"):
            column = np.asarray(getattr(self, name), dtype=np.float64)
            bad = np.flatnonzero((column < 0) | (column > 1) | np.isinf(column))
            if len(bad):
                raise UserError(
                    f"verdict {bad[0]} ({name}) is {column[bad[0]]}; a verdict lies in [0, 1], or is missing"
                )
            object.__setattr__(self, name, column)
        if len(self.as_given) != len(self.swapped):
            raise ValueError(f"{len(self.as_given)} verdicts as given, {len(self.swapped)} swapped")

    @property
    def complete(self) -> "TwoOrders":
        """The pairs that have both verdicts; one alone cannot be cleared of a liking for a slot."""
        there = np.isfinite(self.as_given) & np.isfinite(self.swapped)
        return TwoOrders(self.as_given[there], self.swapped[there])

    @property
    def missing(self) -> int:
        """Pairs without one of the verdicts, or both."""
        return int((~np.isfinite(self.as_given + self.swapped)).sum())

    def soft(self) -> Values:
        """Each pair's verdict for its first reply: the mean of both orders, NaN where one is missing."""
        return (self.as_given + 1 - self.swapped) / 2

    def hard(self) -> Values:
        """The winner that both orders agree on, 1 or 0; 0.5 where they do not, or see a tie; NaN where one is missing.

        Source: Zheng et al. 2023 (MT-bench), arXiv:2306.05685, section 3.4.
        """
        given, swapped = choice(self.as_given), 1 - choice(self.swapped)
        return np.where(np.isnan(given + swapped), np.nan, np.where(given == swapped, given, 0.5))

    def contradicts(self) -> Values:
        """1 where the orders name different winners, else 0; a tie contradicts nothing. NaN where one is missing."""
        opposed = (choice(self.as_given) - 0.5) * (choice(self.swapped) - 0.5) > 0
        return np.where(np.isnan(self.as_given + self.swapped), np.nan, opposed.astype(np.float64))

    def first_slot(self) -> Values:
        """The share of a pair's two verdicts that went to the reply shown first, ties half; NaN without one of them."""
        return (choice(self.as_given) + choice(self.swapped)) / 2

    def position_gap(self) -> Values:
        """How far the two orders' probabilities for the same reply lie apart, in [0, 1]."""
        return np.abs(self.as_given - (1 - self.swapped))

    def kappa(self) -> float | None:
        """Cohen's kappa of the two orders, as two raters of the same pairs; None where it is not defined."""
        both = self.complete
        if not len(both.as_given):
            return None
        return kappa(choice(both.as_given).tolist(), (1 - choice(both.swapped)).tolist())


def choice(p: Values) -> Values:
    """1 where the first is more probably better, 0 where the second is, 0.5 where neither; NaN stays NaN."""
    return (1 + np.sign(np.asarray(p, dtype=np.float64) - 0.5)) / 2


@dataclass(frozen=True)
class WinRate:
    """How often one system wins against another; a tie is half a win."""

    rate: Estimate
    wins: int
    ties: int
    losses: int
    missing: int


def win_rate(
    verdicts: Values, prompts: Sequence[Any] | None = None, *, draws: int = DRAWS, seed: int = SEED
) -> WinRate | None:
    """The mean verdict, with an interval from resampling prompts. None if every verdict is missing.

    prompts: (pairs,) what names the prompt of each pair; without it each pair has one of its own.
    """
    verdicts = np.asarray(verdicts, dtype=np.float64)
    rate = estimate(verdicts, prompts, share=True, draws=draws, seed=seed)
    if rate is None:
        return None
    wins, losses = int((verdicts > 0.5).sum()), int((verdicts < 0.5).sum())
    return WinRate(rate, wins, int((verdicts == 0.5).sum()), losses, rate.missing)


def paired_difference(
    first: Values, second: Values, prompts: Sequence[Any] | None = None, *, draws: int = DRAWS, seed: int = SEED
) -> Estimate | None:
    """The mean of first - second on the same items, with its interval; items that lack either are missing.

    Of two systems on the same prompts this is much narrower than the difference of two intervals suggests.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}: a paired difference is of the same items")
    return estimate(first - second, prompts, draws=draws, seed=seed)
