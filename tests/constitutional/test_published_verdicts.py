"""Verdicts of known judges on LLMBar Natural, as orders of pairs: the statistics are the published ones.

Source: Zeng et al. 2024 (LLMBar), arXiv:2310.07641; `statistics.json` beside the verdicts. A stored verdict is a choice
and no probability, so each order is 1 or 0. `winner` names the reply by its number in the row, also where the replies
were shown the other way round.
"""

import json
from statistics import fmean

import pytest

from align.constitutional.verdicts import Order, Verdict

JUDGES = {
    # first slot: counted from the published verdicts
    "GPT-4": 0.505,
    "ChatGPT": 0.605,
    "LLaMA2": 0.515,
}


@pytest.fixture
def folder(real_data):
    found = real_data / "llmbar"
    if not found.is_dir():
        pytest.skip(f"no {found}; name a folder with LLMBar's verdicts in ALIGN_REAL_DATA")
    return found


def stored(folder, judge, what):
    return json.loads((folder / f"Dataset__LLMBar__Natural__evaluators__{judge}__Vanilla__{what}.json").read_text())


def verdicts(folder, judge):
    """Each pair's verdict, and whether its first reply is the better one."""
    found = []
    for row in stored(folder, judge, "result"):
        [result] = row["results"]
        as_given = result["swap = False"]["winner"] == "1"
        # Shown the other way round, the first slot holds the second reply.
        swapped = result["swap = True"]["winner"] == "2"
        found.append((Verdict((Order("natural", float(as_given), float(swapped)),)), row["label"] == 1))
    return found


def percent(text):
    """A share that is written as `93 / 100 = 93.0%`, or as `95.5%`."""
    return float(text.split("=")[-1].rstrip("%")) / 100


@pytest.mark.real_data
@pytest.mark.parametrize("judge", JUDGES)
def test_statistics_of_a_published_judge_come_out_as_published(folder, judge):
    judged, published = verdicts(folder, judge), stored(folder, judge, "statistics")
    assert len(judged) == 100
    orders = [(verdict.orders[0], label) for verdict, label in judged]
    assert fmean((order.as_given > 0.5) == label for order, label in orders) == percent(published["correct_False"])
    assert fmean((order.swapped < 0.5) == label for order, label in orders) == percent(published["correct_True"])
    # A judge that contradicts itself has p = 0.5, half of a right answer.
    probability_of_right = fmean(verdict.p if label else 1 - verdict.p for verdict, label in judged)
    assert probability_of_right == pytest.approx(percent(published["correct_average"]), abs=1e-9)
    right = fmean(verdict.p == float(label) for verdict, label in judged)
    assert right == percent(published["correct_both"])
    assert fmean(order.consistent for order, _ in orders) == percent(published["equal"])
    assert kappa([order for order, _ in orders]) == pytest.approx(published["kappa_agreement"], abs=1e-9)


@pytest.mark.real_data
@pytest.mark.parametrize(("judge", "first_slot"), JUDGES.items())
def test_position_bias_of_a_published_judge(folder, judge, first_slot):
    judged = [verdict for verdict, _ in verdicts(folder, judge)]
    orders = [verdict.orders[0] for verdict in judged]
    assert fmean((order.as_given + order.swapped) / 2 for order in orders) == pytest.approx(first_slot)
    assert fmean(verdict.position_gap for verdict in judged) == pytest.approx(2 * first_slot - 1, abs=1e-9)
    undecided = {verdict.p for verdict in judged if not verdict.orders[0].consistent}
    assert undecided == {0.5}


def kappa(orders):
    """Cohen's kappa of the two orders, as raters of the same pairs."""
    agreed = fmean(order.consistent for order in orders)
    given, swapped = fmean(order.as_given for order in orders), fmean(1 - order.swapped for order in orders)
    by_chance = given * swapped + (1 - given) * (1 - swapped)
    return (agreed - by_chance) / (1 - by_chance)
