"""Whether two models are the same by what they do: greedy replies token by token, and log-probabilities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NEAR_TIE = 2
"""Tolerances. Where no log-probability differs by more than t, a token that one model prefers by more than 2t is also
the other's."""


@dataclass(frozen=True)
class Read:
    """What a model does with the same prompts; a list a prompt."""

    replies: list[list[int]]
    """Greedy, the stop token included."""
    own_logps: list[list[float]]
    """Log-probability (nats) of each token of them."""
    trained_logps: list[list[float]]
    """The same of the trained model's replies, read by this model."""


@dataclass(frozen=True)
class Parity:
    """A model against the trained one."""

    prompts: int
    same: int
    """Replies that are equal in every token."""
    near_ties: int
    """Replies that part where two tokens are as likely as each other, within the tolerance."""
    tokens: int
    largest: float
    """Difference in a token's log-probability, nats."""
    mean: float
    tolerance: float
    fault: str
    """The first thing that is beyond the tolerance; empty if nothing is."""


def parity(trained: Read, other: Read, tolerance: float) -> Parity:
    """Compare a model with the trained one.

    Replies may part where the other model prefers its token by at most twice `tolerance` (nats): then rounding alone
    can have turned it. Log-probabilities of the trained model's replies may differ by `tolerance` at each token.
    """
    differences = [
        [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(trained.trained_logps, other.trained_logps, strict=True)
    ]
    same, ties, fault = 0, 0, ""
    for place, (ours, theirs) in enumerate(zip(trained.replies, other.replies, strict=True)):
        parted = _first_difference(ours, theirs)
        if parted is None:
            same += 1
        elif parted < min(len(ours), len(theirs)):
            gap = other.own_logps[place][parted] - other.trained_logps[place][parted]
            if gap <= NEAR_TIE * tolerance:
                ties += 1
            else:
                fault = fault or (
                    f"reply {place + 1}, token {parted + 1}: {theirs[parted]} instead of {ours[parted]}, preferred by "
                    f"{gap:.3g} nats"
                )
        else:
            fault = fault or f"reply {place + 1}: {len(theirs)} tokens instead of {len(ours)}"
        worst = _largest(differences[place])
        if not worst <= tolerance:
            token = differences[place].index(worst) + 1
            fault = fault or f"reply {place + 1}, token {token}: its log-probability differs by {worst:.3g} nats"
    every = [value for row in differences for value in row]
    return Parity(
        len(trained.replies), same, ties, len(every), _largest(every), sum(every) / len(every), tolerance, fault
    )  # fmt: skip


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    if ours == theirs:
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _largest(values: Sequence[float]) -> float:
    """A not-a-number is larger than any number."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)
