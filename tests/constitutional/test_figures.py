"""Every number of report.json, from rows that can be counted by hand."""

from collections import Counter

import pytest

from align.constitutional.figures import Made, figures
from align.constitutional.judging import Pair
from align.constitutional.prompts import Critique
from align.constitutional.rows import Round
from align.constitutional.verdicts import Order, Verdict
from align.constitutional.work import Spent
from tests.constitutional.making import principle, row

KIND, TRUE = principle("kind"), principle("true")


def round_(one, *, flaw=True, marked=True, revision=None, fault=None):
    return Round(one, "before", Critique("", flaw, marked), revision, fault)


def made():
    revised, kept, lost, left = row("revised"), row("kept"), row("lost"), row("left")
    revised.initial, kept.initial, lost.initial = "I can't do that", "one two three four", "I can't say"
    revised.rounds = [
        round_(KIND, marked=False, revision="a b"),
        round_(TRUE, revision="", fault="empty"),
        round_(KIND, fault="revision_timeout"),
        round_(TRUE, marked=False, fault="critique_timeout"),
    ]
    kept.rounds = [round_(TRUE, flaw=False), round_(KIND, flaw=False)]
    lost.rounds = [round_(KIND, revision="x", fault="judged_worse")]
    lost.drop("no_revision_accepted")
    left.drop("initial_empty")
    sure = Verdict((Order("kind", 1.0, 0.0), Order("true", 0.8, 0.4)))  # p 1 and 0.7: 0.85; gaps 0 and 0.2
    even = Verdict((Order("kind", 0.7, 0.8), Order("true", 0.5, 0.45)))  # p 0.45 and 0.525: 0.4875; gaps 0.5 and -0.05
    against = Verdict((Order("kind", 0.1, 0.9),))  # p 0.1; gap 0
    pairs = [
        Pair(revised, "a b", "c", "all", (KIND, TRUE), sure), Pair(revised, "a b", "d", "all", (KIND, TRUE), even),
        Pair(kept, "e", "f", "all", (KIND,), against), Pair(kept, "e", "g", "all", (KIND,), fault="verdict_timeout"),
    ]  # fmt: skip
    return Made(
        rows=[revised, kept, lost, left],
        targets={"revised": ["a b", "sorry, a b c"], "kept": ["one two three four"]},
        pairs=pairs,
        faults=[(work, "sample_repeated", "sample 2") for work in (revised, kept)] + [(kept, "reply_empty", "")],
        helpful=5,
        spent={"initial": Spent(4, 10, 20, Counter(timeout=1)), "judge": Spent(14, 300)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return figures(made(), 1.25)


def test_what_was_kept_and_left_out_is_counted(found):
    assert found["prompts"] == 4
    assert found["left_out"] == {"no_revision_accepted": 1, "initial_empty": 1}
    assert found["replies_left_out"] == {"sample_repeated": 2, "reply_empty": 1}
    assert found["demonstrations"] == {
        "made": 3, "of_prompts": 0.5, "kept_as_they_were": 1, "helpful_mixed_in": 5,
    }  # fmt: skip


def test_rounds_are_counted_and_a_critique_that_failed_found_nothing(found):
    assert found["rounds"] == {
        "critiques": 6, "flaws": 4, "without_verdict": 1, "accepted": 1,
        "left_out": {"empty": 1, "revision_timeout": 1, "critique_timeout": 1, "judged_worse": 1},
    }  # fmt: skip


def test_refusals_and_words_are_those_of_what_is_learnt_before_and_after(found):
    assert found["refusals"] == {"initial": 1 / 2, "targets": pytest.approx(1 / 3)}
    assert found["words"] == {"initial": (4 + 4) / 2, "targets": (2 + 4 + 4) / 3}


def test_each_principle_has_its_own_account(found):
    kind, true = found["principles"]["kind"], found["principles"]["true"]
    assert (kind["critiques"], kind["flaws"], kind["accepted"]) == (4, 0.75, pytest.approx(1 / 3))
    assert (true["critiques"], true["flaws"], true["accepted"]) == (2, 0.5, 0.0)
    assert (kind["judged"], kind["p"]) == (3, pytest.approx((1 + 0.45 + 0.1) / 3))
    assert (true["judged"], true["p"]) == (2, pytest.approx((0.7 + 0.525) / 2))
    assert kind["from_the_others"] == pytest.approx((0.15 + 0.0375 + 0) / 3)
    assert true["position_gap"] == pytest.approx((0.2 - 0.05) / 2)


def test_pairs_are_averaged_over_verdicts_and_contradictions_over_principles(found):
    pairs = found["pairs"]
    assert (pairs["judged"], pairs["failed"]) == (3, {"verdict_timeout": 1})
    assert pairs["p"] == [0.85, 0.4875, 0.1]
    assert pairs["p_chosen"] == pytest.approx((0.85 + 0.5125 + 0.9) / 3)
    assert pairs["undecided"] == pytest.approx(1 / 3)
    assert pairs["disagreement"] == pytest.approx((0.15 + 0.0375 + 0) / 3)
    assert pairs["position_gap"] == pytest.approx((0.1 + 0.225 + 0) / 3)
    assert pairs["orders_contradict"] == 1 / 5  # kind of the second pair: 0.7 and 0.8


def test_steps_and_price_are_told(found):
    assert found["steps"]["initial"] == {
        "calls": 4, "prompt_tokens": 10, "new_tokens": 20, "failed": {"timeout": 1},
    }  # fmt: skip
    assert list(found["steps"]) == ["initial", "judge"] and found["price"] == 1.25


def test_nothing_at_all_has_figures_too():
    found = figures(Made([], {}, [], [], 0, {}), 0.0)
    assert found["demonstrations"]["of_prompts"] == found["pairs"]["p_chosen"] == found["words"]["initial"] == 0.0
    assert found["principles"] == {} and found["pairs"]["p"] == []
