"""Tasks whose answer is one number, as gsm8k's: right or wrong by exact match, before and after training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from align.config.errors import UserError
from align.evaluation.intervals import DRAWS, SEED, Estimate, Values
from align.evaluation.verdicts import paired_difference
from align.losses.calibration import Share, share_of

MARK = "####"
NUMBER = re.compile(r"(?:(?<![\w.)])-)?[$€£]?(?:(?<![\w.)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A minus between two numbers is a dash or a difference; a full stop after one ends the sentence."""


def gold_answer(solution: str, where: str = "") -> Decimal:
    """The number after the mark of a worked solution, without commas.

    Raises: UserError with `where` (file:line) if there is none.
    """
    _, mark, rest = solution.rpartition(MARK)
    found = numbers(rest)
    if not mark or len(found) != 1:
        raise UserError(f"{where or 'answer'}: no single number after {MARK}; give `… {MARK} 42`")
    return found[0]


def given_answer(reply: str) -> Decimal | None:
    """The number a reply gives: the first after its last mark; the last of all where there is none. None: no number."""
    _, mark, rest = reply.rpartition(MARK)
    if mark and (found := numbers(rest)):
        return found[0]
    found = numbers(reply)
    return found[-1] if found else None


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order, without commas and signs of money; 3, 3.0 and 3.00 are the same."""
    found = (re.sub(r"[,$€£]", "", match.group()) for match in NUMBER.finditer(text))
    return [Decimal(number) for number in found]


@dataclass(frozen=True)
class Exact:
    """How many answers are the right one."""

    right: Values
    """(rows,) 1 or 0."""
    accuracy: Share
    without_number: int
    """Replies that give no number at all: wrong, and counted here."""


def exact_match(replies: Sequence[str], solutions: Sequence[str]) -> Exact | None:
    """Replies against worked solutions; None of none. Raises: UserError if a solution has no answer, by its row."""
    if not replies:
        return None
    gold = [gold_answer(solution, f"row {row}") for row, solution in enumerate(solutions, 1)]
    given = [given_answer(reply) for reply in replies]
    right = np.array([float(one == answer) for one, answer in zip(given, gold, strict=True)])
    return Exact(right, share_of(right), given.count(None))


@dataclass(frozen=True)
class Change:
    """The same rows before and after training."""

    before: float
    after: float
    difference: Estimate
    """after - before, paired: its interval is of the rows that changed."""
    gained: int
    """Rows that were wrong and are right."""
    lost: int


def change(before: Values, after: Values, *, draws: int = DRAWS, seed: int = SEED) -> Change | None:
    """What became of each row: right answers (rows,) before and after, None of none. Any task.

    A row that is NaN in either is left out, and counted as missing in the difference."""
    difference = paired_difference(after, before, draws=draws, seed=seed)
    if difference is None:
        return None
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    both = np.isfinite(before + after)
    before, after = before[both], after[both]
    return Change(
        float(before.mean()), float(after.mean()), difference, int((after > before).sum()), int((after < before).sum())
    )
