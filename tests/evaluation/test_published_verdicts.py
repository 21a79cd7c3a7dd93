"""Verdicts of known judges on LLMBar Natural and PandaLM: every published or hand-counted number comes out.

Sources: Zeng et al. 2024 (LLMBar), arXiv:2310.07641, `statistics.json` beside the verdicts; Wang et al. 2023 (PandaLM),
arXiv:2306.05087. A stored verdict of LLMBar is a choice and no probability, so each order is 1 or 0.
"""

from collections import Counter

import numpy as np
import pytest

from align.constitutional.verdicts import Order, Verdict
from align.evaluation.agreement import agreement, annotators, kappa, majority, soft_label
from align.evaluation.diagnosis import diagnose
from align.evaluation.verdicts import win_rate
from tests.evaluation.published import llmbar, llmbar_orders, llmbar_truth, pandalm, words

pytestmark = pytest.mark.real_data

JUDGES = {
    # accuracy as given, swapped, mean; both right; inconsistent; first slot; kappa of orders
    "GPT-4": (0.95, 0.96, 0.955, 0.93, 0.05, 0.505, 0.898),
    "ChatGPT": (0.80, 0.83, 0.815, 0.67, 0.29, 0.605, 0.429),
    "LLaMA2": (0.79, 0.82, 0.805, 0.70, 0.21, 0.515, 0.573),
}
WINNERS = {
    # (winner as given, winner swapped) by the reply's number in the row
    "GPT-4": {(1, 1): 40, (2, 2): 55, (1, 2): 3, (2, 1): 2},
    "ChatGPT": {(1, 1): 27, (2, 2): 44, (1, 2): 25, (2, 1): 4},
    "LLaMA2": {(1, 1): 33, (2, 2): 46, (1, 2): 12, (2, 1): 9},
}


def percent(text):
    """A share that is written as `93 / 100 = 93.0%`, or as `95.5%`."""
    return float(text.split("=")[-1].rstrip("%")) / 100


@pytest.mark.parametrize(("judge", "numbers"), JUDGES.items())
def test_a_published_judge_has_its_published_numbers(real_data, judge, numbers):
    given, swapped, mean, both, inconsistent, first_slot, orders_kappa = numbers
    orders, (better, _) = llmbar_orders(real_data, judge), llmbar_truth(real_data)
    assert np.mean(orders.as_given == better) == given
    assert np.mean(1 - orders.swapped == better) == swapped
    # A judge that contradicts itself has half of a right answer.
    assert np.mean(np.where(better == 1, orders.hard(), 1 - orders.hard())) == pytest.approx(mean, abs=1e-12)
    assert np.mean(orders.hard() == better) == both
    assert np.mean(orders.contradicts()) == inconsistent
    assert np.mean(orders.first_slot()) == pytest.approx(first_slot, abs=1e-12)
    assert orders.kappa() == pytest.approx(orders_kappa, abs=5e-4)


@pytest.mark.parametrize("judge", JUDGES)
def test_the_numbers_are_those_of_the_statistics_beside_the_verdicts(real_data, judge):
    orders, (better, _) = llmbar_orders(real_data, judge), llmbar_truth(real_data)
    published = llmbar(real_data, judge, "statistics")
    assert np.mean(orders.as_given == better) == percent(published["correct_False"])
    assert np.mean(1 - orders.swapped == better) == percent(published["correct_True"])
    assert np.mean(orders.hard() == better) == percent(published["correct_both"])
    assert 1 - np.mean(orders.contradicts()) == pytest.approx(percent(published["equal"]), abs=1e-12)
    assert orders.kappa() == pytest.approx(published["kappa_agreement"], abs=1e-9)
    as_given = agreement(orders.as_given.tolist(), better.tolist())
    assert as_given.kappa is not None and as_given.accuracy.share == percent(published["correct_False"])


@pytest.mark.parametrize("judge", JUDGES)
def test_winners_of_both_orders_are_counted(real_data, judge):
    orders = llmbar_orders(real_data, judge)
    named = zip(2 - orders.as_given.astype(int), 1 + orders.swapped.astype(int), strict=True)
    assert Counter((int(a), int(b)) for a, b in named) == WINNERS[judge]
    found = win_rate(orders.hard())
    same, first = WINNERS[judge][1, 1] + WINNERS[judge][2, 2], WINNERS[judge][1, 1]
    assert (found.wins, found.ties, found.losses, found.missing) == (first, 100 - same, same - first, 0)


@pytest.mark.parametrize("judge", JUDGES)
def test_the_verdicts_of_constitutional_data_say_the_same(real_data, judge):
    orders = llmbar_orders(real_data, judge)
    pairs = [Order("natural", a, b) for a, b in zip(orders.as_given.tolist(), orders.swapped.tolist(), strict=True)]
    assert [pair.p for pair in pairs] == orders.soft().tolist() == orders.hard().tolist()
    assert [abs(pair.position_gap) for pair in pairs] == orders.position_gap().tolist()
    assert [not pair.consistent for pair in pairs] == [bool(one) for one in orders.contradicts()]
    assert all(Verdict((pair,)).p == 0.5 for pair in pairs if not pair.consistent)


def test_what_is_said_of_each_published_judge(real_data):
    better, longer_by = llmbar_truth(real_data)
    found = {judge: diagnose(llmbar_orders(real_data, judge), longer_by, truth=better) for judge in JUDGES}
    assert {judge: one.faults for judge, one in found.items()} == {
        "GPT-4": (), "ChatGPT": ("first_slot",), "LLaMA2": ("length",),
    }  # fmt: skip
    # Without the labels nobody knows that on these pairs the longer output is hardly ever the better for it.
    assert diagnose(llmbar_orders(real_data, "LLaMA2"), longer_by).faults == ()
    assert "the longer reply wins 0.70 [0.62, 0.77] of unequal pairs (0.55 with people" in found["LLaMA2"].words[0]
    assert "prefers the first slot: it gets 0.60" in found["ChatGPT"].words[0]
    assert found["GPT-4"].words[0].startswith("no fault found") and found["GPT-4"].takes_longer.count == 94
    assert found["GPT-4"].right.value == pytest.approx(0.955)


def test_the_longer_output_is_the_better_one_in_52_of_94(real_data):
    better, longer_by = llmbar_truth(real_data)
    unequal = longer_by != 0
    assert (unequal.sum(), ((longer_by > 0) == (better == 1))[unequal].sum()) == (94, 52)


@pytest.fixture
def votes(real_data):
    return [[row["annotator1"], row["annotator2"], row["annotator3"]] for row in pandalm(real_data)]


def test_pandalms_annotators_agree_as_counted(votes):
    found = annotators(votes)
    assert (len(votes), found.unanimous, found.no_majority) == (999, 879, 0)
    assert {pair: round(share, 3) for pair, (share, _) in found.pairs.items()} == {
        (0, 1): 0.913, (0, 2): 0.929, (1, 2): 0.918,
    }  # fmt: skip
    assert Counter(map(majority, votes)) == {2: 472, 1: 422, 0: 105}


def test_two_labels_in_the_lead_are_no_majority():
    assert majority([1, 2]) is None and majority([1, 2, 0]) is None and majority([None, None]) is None
    assert majority([1, 2, 1, None]) == 1
    assert annotators([[1, 2], [1, None], [2, 2]]).no_majority == 1
    with pytest.raises(ValueError, match="a place for every annotator"):
        annotators([[1, 2], [1]])


def test_soft_labels_are_shares_of_annotators(votes):
    labels = [soft_label(row, first=1, tie=0) for row in votes]
    assert soft_label([1, 2, 0], first=1, tie=0) == 0.5 and soft_label([None, 1, 0], first=1, tie=0) == 0.75
    # A unanimous tie is 0.5, so are one vote each and a tie; majorities stay on their side.
    for row, label in zip(votes, labels, strict=True):
        if majority(row) == 1:
            assert label > 0.5
    assert sum(labels) / len(labels) == pytest.approx(
        sum(row.count(1) + row.count(0) / 2 for row in votes) / (3 * len(votes))
    )


@pytest.mark.parametrize(
    ("name", "key", "accuracy", "expected_kappa"),
    [("gpt-3.5-turbo", "gpt_result", 0.698, 0.476), ("pandalm-7b", "pandalm_result", 0.668, 0.435)],
)
def test_pandalms_judges_agree_with_the_majority_as_counted(real_data, votes, name, key, accuracy, expected_kappa):
    said = [row[key] for row in pandalm(real_data, f"{name}-testset-v1")]
    said = [{"1": 1, "2": 2, "Tie": 0}.get(one, one) for one in said]
    found = agreement(said, [majority(row) for row in votes])
    assert (round(found.accuracy.share, 3), round(found.kappa, 3)) == (accuracy, expected_kappa)
    assert found.accuracy.count == 999 and found.missing == 0
    if "garbage" in said:
        # An unreadable verdict is wrong wherever it stands, and no class of people's.
        assert (found.classes["garbage"].said, found.classes["garbage"].true) == (25, 0)
        assert found.classes["garbage"].recall is None
    for label in (0, 1, 2):
        right = found.confusion.get((label, label), 0)
        assert found.classes[label].recall == right / found.classes[label].true


def test_people_prefer_the_longer_answer_in_578_of_845(real_data, votes):
    both = [(row["response1"], row["response2"]) for row in pandalm(real_data)]
    # Six responses are no text but `true` or `false`.
    gaps = [words(a) - words(b) if isinstance(a, str) and isinstance(b, str) else 0 for a, b in both]
    unequal = [(gap > 0) == (majority(row) == 1) for gap, row in zip(gaps, votes, strict=True) if gap and majority(row)]
    assert (len(unequal), sum(unequal)) == (845, 578)


def test_clusters_are_the_170_prompts_and_widen_the_interval(real_data, votes):
    rows = pandalm(real_data)
    prompts = [(row["instruction"], row["input"]) for row in rows]
    labels = np.array([soft_label(row, first=1, tie=0) for row in votes])
    clustered, single = win_rate(labels, prompts).rate, win_rate(labels).rate
    assert (clustered.clusters, single.clusters, clustered.mean) == (170, 999, single.mean)
    assert clustered.high - clustered.low > 1.1 * (single.high - single.low)
    for one in (clustered, single):
        # Percentile intervals are about two standard errors to each side.
        assert (one.high - one.low) / one.standard_error == pytest.approx(3.92, rel=0.08)


def test_kappa_of_people_and_of_a_coin():
    draw = np.random.default_rng(0)
    coins = draw.integers(0, 2, (2, 4000)).tolist()
    assert abs(kappa(*coins)) < 0.05
    assert kappa([1, 2, 1, 2], [1, 2, 1, 2]) == 1.0 and kappa([1, 1, 2, 2], [1, 2, 1, 2]) == 0.0
    assert kappa([1, 2], [2, 1]) == -1.0 and kappa([1, 1], [1, 1]) is None
