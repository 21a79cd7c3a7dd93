"""What the stage made, in numbers: all of them can be counted again from the files that it leaves."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from align.constitutional.judging import Pair
from align.constitutional.rows import PromptWork, counted
from align.constitutional.work import Spent
from align.data.leftovers import opens_like_refusal


@dataclass(frozen=True)
class Made:
    """All that the stage came to."""

    rows: Sequence[PromptWork]
    targets: dict[str, list[str]]
    pairs: Sequence[Pair]
    faults: Sequence[tuple[PromptWork, str, str]]
    """Replies that were compared with nothing: prompt, why, which."""
    helpful: int
    spent: dict[str, Spent]


def figures(made: Made, price: float) -> dict[str, Any]:
    """As JSON types. price: of all answers together, 0 where none was given."""
    rounds = [one for row in made.rows for one in row.rounds]
    heard = [one for one in rounds if one.criticised]
    learnt = [row for row in made.rows if row.id in made.targets]
    texts = [text for row in learnt for text in made.targets[row.id]]
    return {
        "prompts": len(made.rows),
        "left_out": counted(row.fault for row in made.rows if row.fault),
        "demonstrations": {
            "made": len(texts),
            "of_prompts": _share(len(learnt), len(made.rows)),
            "kept_as_they_were": sum(made.targets[row.id] == [row.initial] for row in learnt),
            "helpful_mixed_in": made.helpful,
        },
        "rounds": {
            "critiques": len(heard),
            "flaws": sum(one.critique.flaw for one in heard),
            "without_verdict": sum(not one.critique.marked for one in heard),
            "accepted": sum(one.accepted for one in rounds),
            "left_out": counted(one.fault for one in rounds if one.fault),
        },
        "refusals": {
            "initial": _share(sum(opens_like_refusal(row.initial) for row in learnt), len(learnt)),
            "targets": _share(sum(map(opens_like_refusal, texts)), len(texts)),
        },
        "words": {
            "initial": _mean([len(row.initial.split()) for row in learnt]),
            "targets": _mean([len(text.split()) for text in texts]),
        },
        "principles": _principles(made),
        "pairs": _pairs(made),
        "replies_left_out": counted(reason for _, reason, _ in made.faults),
        "steps": {
            step: {
                "calls": spent.calls,
                "prompt_tokens": spent.prompt_tokens,
                "new_tokens": spent.new_tokens,
                "failed": dict(spent.failed),
            }
            for step, spent in made.spent.items()
        },
        "price": price,
    }


def _principles(made: Made) -> dict[str, dict[str, float]]:
    """By principle: how often it was drawn, what its critiques found, what became of its revisions, how it judged."""
    found: dict[str, dict[str, float]] = {}
    rounds = [one for row in made.rows for one in row.rounds if one.criticised]
    orders = [order for pair in made.pairs if pair.verdict for order in pair.verdict.orders]
    means = {id(order): pair.verdict.p for pair in made.pairs if pair.verdict for order in pair.verdict.orders}
    names = dict.fromkeys([one.principle.id for one in rounds] + [order.principle for order in orders])
    for name in names:
        drawn = [one for one in rounds if one.principle.id == name]
        judged = [order for order in orders if order.principle == name]
        found[name] = {
            "critiques": len(drawn),
            "flaws": _share(sum(one.critique.flaw for one in drawn), len(drawn)),
            "accepted": _share(sum(one.accepted for one in drawn), sum(one.critique.flaw for one in drawn)),
            "judged": len(judged),
            "p": _mean([order.p for order in judged]),
            "from_the_others": _mean([abs(order.p - means[id(order)]) for order in judged]),
            "position_gap": _mean([order.position_gap for order in judged]),
        }
    return found


def _pairs(made: Made) -> dict[str, Any]:
    verdicts = [pair.verdict for pair in made.pairs if pair.verdict is not None]
    orders = [order for verdict in verdicts for order in verdict.orders]
    return {
        "judged": len(verdicts),
        "failed": counted(pair.fault for pair in made.pairs if pair.fault),
        "p_chosen": _mean([max(verdict.p, 1 - verdict.p) for verdict in verdicts]),
        "undecided": _share(sum(abs(verdict.p - 0.5) < 0.05 for verdict in verdicts), len(verdicts)),
        "disagreement": _mean([verdict.disagreement for verdict in verdicts]),
        "position_gap": _mean([verdict.position_gap for verdict in verdicts]),
        "orders_contradict": _share(sum(not order.consistent for order in orders), len(orders)),
        "p": [round(verdict.p, 4) for verdict in verdicts],
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
