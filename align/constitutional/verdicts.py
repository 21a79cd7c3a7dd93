"""From log-probabilities of answers to the probability that one reply is better than another. Pure numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev


@dataclass(frozen=True)
class Order:
    """One principle's verdict, in both orders; each number is the probability that the first slot's reply is better."""

    principle: str
    as_given: float
    """With the pair's first reply in the first slot."""
    swapped: float
    """With its second reply there."""

    @property
    def p(self) -> float:
        """Probability that the pair's first reply is better, without the judge's liking for a slot."""
        return (self.as_given + 1 - self.swapped) / 2

    @property
    def position_gap(self) -> float:
        """How much the first slot is preferred whatever stands there: 0 for a fair judge, 1 for one that looks no
        further."""
        return self.as_given + self.swapped - 1

    @property
    def consistent(self) -> bool:
        """Whether the orders do not prefer different replies; an even one contradicts nothing."""
        return (self.as_given - 0.5) * (0.5 - self.swapped) >= 0


@dataclass(frozen=True)
class Verdict:
    """A pair as all its principles see it."""

    orders: tuple[Order, ...]

    @property
    def p(self) -> float:
        """Probability that the first reply is better: the mean over principles."""
        return fmean(order.p for order in self.orders)

    @property
    def position_gap(self) -> float:
        return fmean(order.position_gap for order in self.orders)

    @property
    def disagreement(self) -> float:
        """Standard deviation of p over principles; 0 for one."""
        return pstdev(order.p for order in self.orders)


def first_slot(logps: Sequence[float], clamp: tuple[float, float] | None) -> float:
    """The probability of the first of two answers, given that it is one of the two, within `clamp`.

    Source: Bai et al. 2022, arXiv:2212.08073, section 4.1, which clamps what follows a chain of thought.
    """
    first, second = logps
    # exp of the negative difference cannot overflow.
    odds = math.exp(-abs(first - second))
    p = 1 / (1 + odds) if first >= second else odds / (1 + odds)
    return p if clamp is None else min(max(p, clamp[0]), clamp[1])
