"""From log-probabilities to p: every number here is worked out by hand."""

import math

import pytest

from align.constitutional.verdicts import Order, Verdict, first_slot

log = math.log


@pytest.mark.parametrize(
    ("logps", "p"),
    [
        ((log(0.3), log(0.1)), 0.75),
        ((log(0.1), log(0.3)), 0.25),
        ((log(0.004), log(0.001)), 0.8),
        ((-2.0, -2.0), 0.5),
        ((-5000.0, -9000.0), 1.0),
        ((-9000.0, -5000.0), 0.0),
        ((0.0, -math.inf), 1.0),
        ((-math.inf, 0.0), 0.0),
    ],
)
def test_the_first_slots_probability_is_its_share_of_both(logps, p):
    assert first_slot(logps, None) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize(("share", "clamped"), [(0.75, 0.6), (0.6, 0.6), (0.55, 0.55), (0.5, 0.5), (0.1, 0.3)])
def test_a_probability_is_held_within_the_clamp(share, clamped):
    assert first_slot((log(share), log(1 - share)), (0.3, 0.6)) == pytest.approx(clamped, abs=1e-12)


def test_both_orders_are_averaged():
    order = Order("kind", as_given=0.9, swapped=0.3)
    assert order.p == pytest.approx(0.8)  # (0.9 + 0.7) / 2
    assert order.position_gap == pytest.approx(0.2)  # the first slot has 0.9 and 0.3, fair would be a sum of 1
    assert order.consistent


def test_a_judge_that_always_takes_the_first_slot_knows_nothing():
    order = Order("kind", 1.0, 1.0)
    assert (order.p, order.position_gap, order.consistent) == (0.5, 1.0, False)
    last = Order("kind", 0.0, 0.0)
    assert (last.p, last.position_gap, last.consistent) == (0.5, -1.0, False)


@pytest.mark.parametrize(
    ("as_given", "swapped", "same"),
    [
        (0.9, 0.1, True), (0.2, 0.7, True), (0.9, 0.6, False), (0.1, 0.4, False),
        (0.5, 0.9, True), (0.5, 0.1, True), (0.9, 0.5, True), (0.5, 0.5, True),
    ],
)  # fmt: skip
def test_orders_agree_unless_they_prefer_different_replies(as_given, swapped, same):
    assert Order("kind", as_given, swapped).consistent is same


def test_principles_are_averaged_and_their_spread_is_the_disagreement():
    verdict = Verdict((Order("a", 0.9, 0.3), Order("b", 0.6, 0.6), Order("c", 0.2, 0.8)))
    assert [order.p for order in verdict.orders] == pytest.approx([0.8, 0.5, 0.2])
    assert verdict.p == pytest.approx(0.5)
    assert verdict.position_gap == pytest.approx((0.2 + 0.2 + 0.0) / 3)
    assert verdict.disagreement == pytest.approx(math.sqrt((0.09 + 0 + 0.09) / 3))
    assert Verdict((Order("a", 0.9, 0.3),)).disagreement == 0


def test_swapping_the_replies_of_a_pair_gives_the_other_probability():
    one, other = Order("a", 0.9, 0.3), Order("a", as_given=0.3, swapped=0.9)
    assert one.p + other.p == pytest.approx(1)
    assert one.position_gap == pytest.approx(other.position_gap)
