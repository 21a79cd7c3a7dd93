"""Verdicts by hand: the swap undone, ties, missing ones; and judges whose habits are known."""

import math

import numpy as np
import pytest

from align.config.errors import UserError
from align.evaluation.diagnosis import ENOUGH_PAIRS, diagnose
from align.evaluation.verdicts import TwoOrders, win_rate

NAN = math.nan


def orders(*pairs):
    given, swapped = zip(*pairs, strict=True)
    return TwoOrders(np.array(given, dtype=float), np.array(swapped, dtype=float))


#            first wins  second wins  slot 1   slot 2   tie, win    two ties    soft        one missing
BY_HAND = [(1, 0), (0, 1), (1, 1), (0, 0), (0.5, 0), (0.5, 0.5), (0.7, 0.4), (NAN, 0)]


def test_both_orders_make_one_verdict():
    found = orders(*BY_HAND)
    np.testing.assert_array_equal(found.hard(), [1, 0, 0.5, 0.5, 0.5, 0.5, 1, NAN])
    np.testing.assert_allclose(found.soft(), [1, 0, 0.5, 0.5, 0.75, 0.5, 0.65, NAN])
    np.testing.assert_array_equal(found.contradicts(), [0, 0, 1, 1, 0, 0, 0, NAN])
    np.testing.assert_array_equal(found.first_slot(), [0.5, 0.5, 1, 0, 0.25, 0.5, 0.5, NAN])
    np.testing.assert_allclose(found.position_gap(), [0, 0, 1, 1, 0.5, 0, 0.1, NAN], atol=1e-12)
    assert found.missing == 1 and len(found.complete.as_given) == 7


def test_wins_ties_and_losses_are_counted_and_missing_ones_left_out():
    found = win_rate(orders(*BY_HAND).hard())
    assert (found.wins, found.ties, found.losses, found.missing) == (2, 4, 1, 1)
    assert found.rate.mean == 4 / 7 and found.rate.count == 7


def test_exchanging_the_systems_turns_the_win_rate_round():
    draw = np.random.default_rng(0)
    given, swapped = draw.random((2, 50))
    one, other = TwoOrders(given, swapped), TwoOrders(swapped, given)
    np.testing.assert_allclose(one.hard() + other.hard(), 1)
    np.testing.assert_allclose(one.soft() + other.soft(), 1)
    assert one.kappa() == pytest.approx(other.kappa())


def test_a_verdict_outside_of_0_and_1_is_refused_by_its_place():
    with pytest.raises(UserError, match=r"verdict 1 \(swapped\) is 1.5; a verdict lies in"):
        orders((1, 0), (1, 1.5))
    with pytest.raises(ValueError, match="1 verdicts as given, 2 swapped"):
        TwoOrders(np.zeros(1), np.zeros(2))


PAIRS = 200
DRAW = np.random.default_rng(7)
LENGTHS = DRAW.integers(20, 400, size=(2, PAIRS)).astype(float)
LONGER_BY = LENGTHS[0] - LENGTHS[1]
TRUTH = (DRAW.random(PAIRS) < 0.5).astype(float)
COIN = np.random.default_rng(8)


def sure(verdicts):
    """A judge that says the same in both orders."""
    return TwoOrders(verdicts, 1 - verdicts)


KNOWN = {
    "slot 1 always": (TwoOrders(np.ones(PAIRS), np.ones(PAIRS)), ("first_slot",)),
    "slot 2 always": (TwoOrders(np.zeros(PAIRS), np.zeros(PAIRS)), ("second_slot",)),
    "the longer one": (sure((LONGER_BY > 0).astype(float)), ("length",)),
    "the shorter one": (sure((LONGER_BY < 0).astype(float)), ("brevity",)),
    "a coin for each order": (TwoOrders(*(COIN.random((2, PAIRS)) < 0.5).astype(float)), ("chance",)),
    "always a tie": (TwoOrders(np.full(PAIRS, 0.5), np.full(PAIRS, 0.5)), ("undecided",)),
    "right": (sure(TRUTH), ()),
    "right in 9 of 10": (sure(np.where(COIN.random(PAIRS) < 0.9, TRUTH, 1 - TRUTH)), ()),
}


@pytest.mark.parametrize("judge", KNOWN)
def test_the_habit_of_a_known_judge_is_said(judge):
    verdicts, faults = KNOWN[judge]
    found = diagnose(verdicts, LONGER_BY)
    assert found.faults == faults
    assert len(found.words) == max(len(faults), 1) and (found.words[0].startswith("no fault") == (not faults))


def test_what_the_words_rest_on():
    slot = diagnose(KNOWN["slot 1 always"][0])
    assert (slot.first_slot.value, slot.inconsistent.value, slot.decided.value) == (1, 1, 0)
    assert win_rate(KNOWN["slot 1 always"][0].hard()).rate.mean == 0.5
    assert "it gets 1.00 [1.00, 1.00] of verdicts" in slot.words[0]
    coin = diagnose(KNOWN["a coin for each order"][0])
    assert coin.kappa.low < 0 < coin.kappa.high and coin.inconsistent.value == pytest.approx(0.5, abs=0.08)
    longer = diagnose(KNOWN["the longer one"][0], LONGER_BY)
    assert (longer.takes_longer.value, longer.takes_longer.count) == (1.0, (LONGER_BY != 0).sum())
    assert longer.kappa.value == 1.0
    tie = diagnose(KNOWN["always a tie"][0])
    assert tie.kappa is None and tie.decided.value == 0


def test_a_steady_coin_is_seen_only_where_people_are_asked():
    steady = sure((np.random.default_rng(1).random(400) < 0.5).astype(float))
    people = (np.random.default_rng(2).random(400) < 0.5).astype(float)
    assert diagnose(steady).faults == ()
    found = diagnose(steady, truth=people)
    assert found.faults == ("chance",) and found.right.count == 400
    assert diagnose(sure(people), truth=people).right.value == 1.0


def test_a_system_that_is_better_and_longer_does_not_make_its_judge_fond_of_length():
    draw = np.random.default_rng(4)
    longer_by = np.where(draw.random(400) < 0.9, 100.0, -100.0)
    fair = sure((draw.random(400) < 0.85).astype(float))
    plain = np.mean((fair.hard() == 1) == (longer_by > 0))
    found = diagnose(fair, longer_by)
    assert plain > 0.75 and found.takes_longer.value == pytest.approx(0.5, abs=0.1) and found.faults == ()


def test_length_cannot_be_told_from_quality_if_one_system_is_always_longer():
    found = diagnose(sure(np.ones(100)), np.full(100, 30.0))
    assert found.takes_longer is None and found.faults == ()
    assert "cannot part length from quality: the first reply is longer in 100 pairs, the second in 0" in found.words[-1]


def test_peoples_own_liking_for_length_is_no_fault_of_the_judge():
    draw = np.random.default_rng(5)
    people = np.where(draw.random(PAIRS) < 0.8, LONGER_BY > 0, LONGER_BY < 0).astype(float)
    judge = sure(np.where(draw.random(PAIRS) < 0.95, people, 1 - people))
    assert diagnose(judge, LONGER_BY, truth=people).faults == ()
    assert diagnose(sure((LONGER_BY > 0).astype(float)), LONGER_BY, truth=people).faults == ("length",)


def test_judge_and_people_are_held_against_each_other_on_the_same_pairs():
    # People spoke of the first half only, where the longer reply is the better one; the judge is right there.
    gap = np.tile([50.0, -50.0], 100)
    longer, fair = (gap > 0).astype(float), (np.random.default_rng(6).random(200) < 0.5).astype(float)
    half = np.arange(200) < 100
    judge, people = sure(np.where(half, longer, fair)), np.where(half, longer, NAN)
    assert diagnose(judge, gap, truth=people).faults == ()
    assert diagnose(sure(longer), gap, truth=np.where(half, fair, NAN)).faults[0] == "length"


def test_few_pairs_are_not_judged_and_missing_ones_are_counted():
    found = diagnose(orders(*[(1, 1)] * (ENOUGH_PAIRS - 1), (NAN, 1)))
    assert (
        found.faults == ()
        and found.missing == 1
        and f"too few pairs to judge the judge: {ENOUGH_PAIRS - 1}" in (found.words[0])
    )
    assert diagnose(orders(*[(1, 1)] * ENOUGH_PAIRS)).faults == ("first_slot",)
    assert diagnose(orders((NAN, 1))) is None


@pytest.mark.parametrize(("share", "faults"), [(0.548, ()), (0.552, ("first_slot",))])
def test_a_slot_is_preferred_from_the_border_on(share, faults):
    pairs = 5000
    biased = round((share - 0.5) * 2 * pairs)
    fair = (pairs - biased) // 2
    verdicts = orders(*[(1, 1)] * biased, *[(1, 0)] * fair, *[(0, 1)] * (pairs - biased - fair))
    assert diagnose(verdicts, draws=200).faults == faults


def test_resampling_prompts_widens_what_is_said_of_a_judge():
    few = orders(*([(1, 1)] * 30 + [(1, 0)] * 30))
    single, clustered = diagnose(few), diagnose(few, prompts=[i // 15 for i in range(60)])
    assert clustered.first_slot.high - clustered.first_slot.low > 2 * (single.first_slot.high - single.first_slot.low)
