"""How far labels agree: a judge with people, people with each other, a judge with itself. Labels are any values.

Votes are (rows, annotators); None is a missing label or vote: left out, and counted.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from align.losses.calibration import Share, share_of

Labels = Sequence[Hashable]


@dataclass(frozen=True)
class OfClass:
    """One class, as the judge says it and as it is."""

    precision: float | None
    """Of what the judge calls this class, the share that is. None: it never says so."""
    recall: float | None
    """Of what is this class, the share the judge calls so. None: there is none."""
    said: int
    true: int


@dataclass(frozen=True)
class Agreement:
    """Labels against true ones."""

    accuracy: Share
    kappa: float | None
    classes: dict[Hashable, OfClass]
    confusion: dict[tuple[Hashable, Hashable], int]
    """(true, said) -> rows."""
    missing: int


def kappa(first: Labels, second: Labels) -> float | None:
    """Cohen's kappa: agreement above chance, 1 at most. None if both only ever say one thing.

    Then chance alone agrees fully, and there is nothing above it.

    Source: Cohen 1960, Educational and Psychological Measurement 20.
    """
    assert len(first) == len(second) > 0, "labels of the same rows"
    total = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    one, other = Counter(first), Counter(second)
    by_chance = sum(one[label] * other[label] for label in one) / total**2
    return None if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)


def agreement(said: Labels, true: Labels) -> Agreement | None:
    """Labels against true ones; a class that is never true (an unreadable verdict) is wrong wherever it is said.

    None if no row has both.
    """
    pairs = [(t, s) for t, s in zip(true, said, strict=True) if t is not None and s is not None]
    if not pairs:
        return None
    confusion = Counter(pairs)
    truths, sayings = Counter(t for t, _ in pairs), Counter(s for _, s in pairs)
    classes = {}
    for label in dict.fromkeys([*truths, *sayings]):
        right = confusion[label, label]
        classes[label] = OfClass(
            right / sayings[label] if sayings[label] else None,
            right / truths[label] if truths[label] else None,
            sayings[label],
            truths[label],
        )
    right = [float(t == s) for t, s in pairs]
    return Agreement(
        share_of(right), kappa([t for t, _ in pairs], [s for _, s in pairs]), classes, dict(confusion),
        len(said) - len(pairs),
    )  # fmt: skip


@dataclass(frozen=True)
class Annotators:
    """How far people agree."""

    unanimous: int
    no_majority: int
    """Rows in which no label has more votes than every other; those with no vote at all among them."""
    pairs: dict[tuple[int, int], tuple[float, float | None]]
    """(annotator, annotator), from 0 -> share of rows on which both say the same, and kappa."""


def annotators(votes: Sequence[Labels]) -> Annotators:
    """Agreement of annotators with each other. Raises: ValueError if rows have unequal numbers of them."""
    if len({len(row) for row in votes}) != 1:
        raise ValueError("each row of votes has a place for every annotator; None where one did not vote")
    pairs = {}
    for a, b in combinations(range(len(votes[0])), 2):
        both = [(row[a], row[b]) for row in votes if row[a] is not None and row[b] is not None]
        if both:
            first, second = zip(*both, strict=True)
            pairs[a, b] = sum(x == y for x, y in both) / len(both), kappa(first, second)
    return Annotators(
        sum(None not in row and len(set(row)) == 1 for row in votes), sum(majority(row) is None for row in votes), pairs
    )


def majority(votes: Labels) -> Any:
    """The label with more votes than any other; None where two lead, or nobody voted."""
    ranked = Counter(vote for vote in votes if vote is not None).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def soft_label(votes: Labels, first: Hashable, tie: Hashable) -> float | None:
    """The share of annotators who put `first` first, half of each who said `tie`; None if nobody voted."""
    cast = [vote for vote in votes if vote is not None]
    return sum(1.0 if vote == first else 0.5 if vote == tie else 0.0 for vote in cast) / len(cast) if cast else None


def accuracy_by_group(right: Sequence[float], groups: Sequence[str]) -> dict[str, Share]:
    """The share of right answers (1, 0, or 0.5 for a tie) of each group, in the order in which groups occur."""
    of: dict[str, list[float]] = {}
    for value, group in zip(right, groups, strict=True):
        of.setdefault(group, []).append(value)
    return {group: share_of(values) for group, values in of.items()}
