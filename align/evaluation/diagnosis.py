"""What is wrong with a judge, in words, each with the numbers that it rests on.

Three faults can be seen without knowing the truth: a liking for a slot, one for length, and no opinion at all. What
counts as one is stated here, and in the words themselves; a word is only said when the 95 % interval bears it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.evaluation.intervals import DRAWS, SEED, Values, cluster_ids, cluster_totals, percentiles, resampled
from align.evaluation.verdicts import TwoOrders

SLOT_SHARE = 0.55
"""One slot's share of verdicts from which it is called preferred: then one verdict in ten was made by place alone."""
PEOPLE_TAKE_LONGER = 0.68
"""How often people take the longer of two unequal replies: PandaLM's three annotators in 578 of 845 pairs."""
CHANCE_KAPPA = 0.4
"""Agreement of the orders below which it is at best fair (Landis & Koch 1977); published judges have 0.43 to 0.90."""
CHANCE_ACCURACY = 0.6
"""Agreement with people below which a judge that may be at 0.5 is called chance."""
DECIDED_SHARE = 0.2
"""A judge that decides fewer pairs than this has no opinion."""
ENOUGH_PAIRS = 30
"""With fewer pairs none of the words can be borne out."""
ENOUGH_OF_A_SIDE = 10
"""Pairs in which the first reply is the longer, and pairs in which the second is: fewer cannot part length from
quality."""


@dataclass(frozen=True)
class Figure:
    """A number with its interval, and the pairs that it is of."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Diagnosis:
    """A judge's habits."""

    pairs: int
    missing: int
    first_slot: Figure
    """Share of verdicts, over both orders, that go to the reply shown first; ties half."""
    inconsistent: Figure
    """Share of pairs whose orders name different winners."""
    decided: Figure
    """Share of pairs with a winner on which both orders agree."""
    position_gap: Figure
    kappa: Figure | None
    """Of the two orders; None where it is not defined."""
    takes_longer: Figure | None
    """How often the longer of two unequal replies wins, as the mean of the pairs in which the first is longer and of
    those in which the second is. So a system that is better and longer does not make its judge fond of length. None
    if one side has fewer than ENOUGH_OF_A_SIDE pairs."""
    right: Figure | None
    """Agreement with people's verdicts, where they are given; the judge's ties half, people's ties left out."""
    faults: tuple[str, ...]
    """Short names: first_slot, second_slot, length, brevity, chance, undecided."""
    words: tuple[str, ...]
    """A sentence for each fault; or that none was found, or could be looked for."""


def diagnose(
    orders: TwoOrders,
    longer_by: Values | None = None,
    prompts: Sequence[Any] | None = None,
    truth: Values | None = None,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Diagnosis | None:
    """A judge's habits on pairs judged in both orders; None if no pair has both verdicts.

    longer_by: (pairs,) length of the first reply less that of the second, in any unit. prompts: what names each pair's
    prompt. truth: (pairs,) people's probability that the first reply is better; NaN or 0.5 where they do not say.
    """
    there = np.isfinite(orders.as_given + orders.swapped)
    if not there.any():
        return None
    both = orders.complete
    ids = cluster_ids(prompts, len(there))[there]
    nothing = np.full(len(ids), np.nan)
    gap = nothing if longer_by is None else np.asarray(longer_by, dtype=np.float64)[there]
    true = nothing if truth is None else np.asarray(truth, dtype=np.float64)[there]
    columns = _columns(both, gap, true)
    totals = cluster_totals(np.stack(list(columns.values()), axis=1), ids)
    whole = dict(zip(columns, totals.sum(axis=0, keepdims=True).T, strict=True))
    drawn = np.concatenate(list(resampled(totals, draws=draws, seed=seed)))
    found, spread = _figures(whole), _figures(dict(zip(columns, drawn.T, strict=True)))
    counts = {"takes_longer": int((whole["first_longer"] + whole["second_longer"])[0]), "right": int(whole["told"][0])}
    figures = {
        name: Figure(float(value[0]), *percentiles(spread[name]), counts.get(name, len(ids)))
        for name, value in found.items()
    }
    sides = int(min(whole["first_longer"][0], whole["second_longer"][0]))
    kept = {
        **{name: figures[name] for name in ("first_slot", "inconsistent", "decided", "position_gap")},
        "kappa": figures["kappa"] if np.isfinite(figures["kappa"].value) else None,
        "takes_longer": figures["takes_longer"] if sides >= ENOUGH_OF_A_SIDE else None,
        "right": figures["right"] if counts["right"] else None,
    }
    told = min(whole["told_first_longer"][0], whole["told_second_longer"][0])
    people = (figures["people_take"], figures["over_people"]) if told >= ENOUGH_OF_A_SIDE else None
    faults = _faults(kept, people) if len(ids) >= ENOUGH_PAIRS else {}
    words = (*faults.values(), *_remarks(kept, faults, len(ids), None if longer_by is None else whole))
    return Diagnosis(pairs=len(ids), missing=int((~there).sum()), faults=tuple(faults), words=words, **kept)


def _columns(orders: TwoOrders, gap: Values, true: Values) -> dict[str, Values]:
    """What is summed over pairs: each figure is a ratio of such sums."""
    verdict = orders.hard()
    given = np.sign(orders.as_given - 0.5)
    swapped = np.sign(0.5 - orders.swapped)
    told = np.isfinite(true) & (true != 0.5)
    columns = {
        "pairs": np.ones_like(verdict),
        "first_slot": orders.first_slot(),
        "inconsistent": orders.contradicts(),
        "decided": (verdict != 0.5).astype(np.float64),
        "position_gap": orders.position_gap(),
        "first_longer": gap > 0,
        "first_longer_won": np.where(gap > 0, verdict, 0),
        "second_longer": gap < 0,
        "second_longer_won": np.where(gap < 0, 1 - verdict, 0),
        "told": told,
        "right": np.where(told, np.where(true > 0.5, verdict, 1 - verdict), 0),
        "told_first_longer": told & (gap > 0),
        "told_first_longer_won": np.where(told & (gap > 0), verdict, 0),
        "told_first_longer_better": told & (gap > 0) & (true > 0.5),
        "told_second_longer": told & (gap < 0),
        "told_second_longer_won": np.where(told & (gap < 0), 1 - verdict, 0),
        "told_second_longer_better": told & (gap < 0) & (true < 0.5),
    }
    for sign in (-1, 0, 1):
        columns[f"given {sign}"] = given == sign
        columns[f"swapped {sign}"] = swapped == sign
        columns[f"both {sign}"] = (given == sign) & (swapped == sign)
    return {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}


def _figures(sums: dict[str, Values]) -> dict[str, Values]:
    """Figures (draws,) of sums (draws,); NaN where one is not defined."""
    pairs = sums["pairs"]
    agreed = sum(sums[f"both {sign}"] for sign in (-1, 0, 1)) / pairs
    by_chance = sum(sums[f"given {sign}"] * sums[f"swapped {sign}"] for sign in (-1, 0, 1)) / pairs**2
    with np.errstate(divide="ignore", invalid="ignore"):
        takes_longer, takes_told, people_take = (
            (sums[f"{on}first_longer_{how}"] / sums[f"{on}first_longer"]
             + sums[f"{on}second_longer_{how}"] / sums[f"{on}second_longer"]) / 2
            for on, how in (("", "won"), ("told_", "won"), ("told_", "better"))
        )  # fmt: skip
        return {
            **{name: sums[name] / pairs for name in ("first_slot", "inconsistent", "decided", "position_gap")},
            "kappa": np.where(by_chance < 1, (agreed - by_chance) / (1 - by_chance), np.nan),
            "takes_longer": takes_longer,
            "people_take": people_take,
            "over_people": takes_told - people_take,
            "right": sums["right"] / sums["told"],
        }


Faults = dict[str, str]
"""Name -> sentence."""


def _faults(figures: dict[str, Figure | None], people: tuple[Figure, Figure] | None) -> Faults:
    slot = _slot_fault(figures["first_slot"])
    length = {} if figures["takes_longer"] is None else _length_fault(figures["takes_longer"], people)
    return {**slot, **length, **_chance_fault(figures, bool(slot))}


def _remarks(
    figures: dict[str, Figure | None], faults: Faults, pairs: int, sides: dict[str, Values] | None
) -> list[str]:
    """What is said besides faults: that there is none, and what could not be looked for."""
    if pairs < ENOUGH_PAIRS:
        return [f"too few pairs to judge the judge: {pairs}, of {ENOUGH_PAIRS} at least"]
    remarks = []
    if not faults:
        told = f" and it agrees with people in {figures['right']}" if figures["right"] else ""
        agreed = f"its orders agree with kappa {figures['kappa']}" if figures["kappa"] else "it always says one thing"
        remarks.append(f"no fault found: {agreed}, the first slot gets {figures['first_slot']}{told}")
    if sides is not None and figures["takes_longer"] is None:
        first, second = (int(sides[name][0]) for name in ("first_longer", "second_longer"))
        remarks.append(
            f"cannot part length from quality: the first reply is longer in {first} pairs, the second in {second} "
            f"({ENOUGH_OF_A_SIDE} of each needed)"
        )
    return remarks


def _slot_fault(share: Figure) -> Faults:
    if share.value >= SLOT_SHARE and share.low > 0.5:
        slot, got = "first", share
    elif share.value <= 1 - SLOT_SHARE and share.high < 0.5:
        slot, got = "second", Figure(1 - share.value, 1 - share.high, 1 - share.low, share.count)
    else:
        return {}
    return {f"{slot}_slot": f"prefers the {slot} slot: it gets {got} of verdicts (a preference from {SLOT_SHARE} on)"}


def _length_fault(share: Figure, people: tuple[Figure, Figure] | None) -> Faults:
    """Against what people take on these pairs, and how much more the judge does; else against people elsewhere."""
    if people is not None:
        take, over = people
        longer, shorter = over.low > 0, over.high < 0
        than = f"{take.value:.2f} with people, {over} more"
    else:
        longer, shorter = share.low > PEOPLE_TAKE_LONGER, share.high < 1 - PEOPLE_TAKE_LONGER
        than = f"{PEOPLE_TAKE_LONGER} with people elsewhere"
    if longer and share.low > 0.5:
        return {"length": f"prefers length: the longer reply wins {share} of unequal pairs ({than})"}
    if shorter and share.high < 0.5:
        return {"brevity": f"prefers brevity: the longer reply wins only {share} of unequal pairs ({than})"}
    return {}


def _chance_fault(figures: dict[str, Figure | None], has_a_slot: bool) -> Faults:
    right, agreed, decided = figures["right"], figures["kappa"], figures["decided"]
    if right is not None and right.count >= ENOUGH_PAIRS and right.low <= 0.5 and right.high < CHANCE_ACCURACY:
        return {"chance": f"looks like chance: it agrees with people in {right} (a coin: 0.50)"}
    if has_a_slot:
        return {}
    if agreed is not None and agreed.low <= 0 and agreed.high < CHANCE_KAPPA:
        return {
            "chance": f"looks like chance: its orders agree with kappa {agreed} and contradict each other in "
            f"{figures['inconsistent']} of pairs (a coin: 0 and 0.50)"
        }
    if decided.value < DECIDED_SHARE:
        return {"undecided": f"hardly ever decides: both orders name the same winner in {decided} of pairs"}
    return {}
