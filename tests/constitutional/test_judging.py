"""The judge: exact p from known log-probabilities, and nothing in place of a verdict that failed."""

import math

import pytest

from align.constitutional.judging import Pair
from tests.constitutional.making import LOST, Desk, by_kind, constitution, principle, row, seen, speaker, stage

log = math.log


def share(p):
    """Log-probabilities of which the first has this share; the rest of a model's probability is elsewhere."""
    return (log(0.2 * p), log(0.2 * (1 - p)))


def weigh_by(shares):
    """(principle, reply in the first slot) -> the first slot's share."""
    return lambda choose, question: share(shares[question.request, question.first])


def pair(id="p1", first="one", second="two", principles=("kind",)):
    return Pair(row(id), first, second, "test", tuple(principle(name) for name in principles))


def decide(folder, model, pairs, *names, **settings):
    names = names or ("kind",)
    desk = Desk(folder, stage(), constitution(*names, **settings), model)
    desk.judge.decide("judge", pairs)
    return desk


def test_p_is_the_mean_of_both_orders_of_one_principle(tmp_path):
    model, one = speaker(weigh=weigh_by({("kind", "one"): 0.9, ("kind", "two"): 0.3})), pair()
    decide(tmp_path, model, [one])
    [order] = one.verdict.orders
    assert (order.principle, order.as_given, order.swapped) == ("kind", pytest.approx(0.9), pytest.approx(0.3))
    assert one.verdict.p == pytest.approx(0.8) and one.verdict.position_gap == pytest.approx(0.2)
    assert one.fault is None


def test_p_is_the_mean_of_all_principles_in_both_orders(tmp_path):
    shares = {
        ("kind", "one"): 0.9, ("kind", "two"): 0.3,  # p = 0.8, gap 0.2
        ("true", "one"): 0.2, ("true", "two"): 0.6,  # p = 0.3, gap -0.2
        ("brief", "one"): 0.7, ("brief", "two"): 0.9,  # p = 0.4, gap 0.6
    }  # fmt: skip
    one = pair(principles=("kind", "true", "brief"))
    decide(tmp_path, speaker(weigh=weigh_by(shares)), [one], "kind", "true", "brief")
    assert [order.p for order in one.verdict.orders] == pytest.approx([0.8, 0.3, 0.4])
    assert one.verdict.p == pytest.approx(0.5)
    assert one.verdict.position_gap == pytest.approx(0.2)
    assert one.verdict.disagreement == pytest.approx(math.sqrt((0.09 + 0.04 + 0.01) / 3))


def test_both_orders_of_each_principle_are_asked_with_the_whole_candidates(tmp_path):
    model = speaker()
    decide(tmp_path, model, [pair(principles=("kind", "true"))], "kind", "true")
    asked = {(question.request, question.first, question.second) for question in map(seen, model.weighed)}
    assert asked == {(name, *texts) for name in ("kind", "true") for texts in (("one", "two"), ("two", "one"))}
    assert {choose.candidates for choose in model.weighed} == {("A", "B")}
    assert len({choose.seed for choose in model.weighed}) == 4


def test_a_judge_that_always_takes_the_first_slot_decides_nothing(tmp_path):
    one = pair()
    decide(tmp_path, speaker(weigh=lambda *_: (0.0, -math.inf)), [one])
    assert one.verdict.p == 0.5 and one.verdict.position_gap == 1.0


@pytest.mark.parametrize("lost", [("true", "one"), ("true", "two"), ("kind", "two")])
def test_one_failed_order_of_one_principle_fails_the_pair_and_no_other(tmp_path, lost):
    def weigh(choose, question):
        return LOST if choose.key == "p1" and (question.request, question.first) == lost else share(0.75)

    names = ("kind", "true")
    broken, sound = pair("p1", principles=names), pair("p2", principles=names)
    decide(tmp_path, speaker(weigh=weigh), [broken, sound], *names)
    assert (broken.verdict, broken.fault) == (None, "verdict_timeout")
    assert len(broken.asked) == 3
    assert sound.fault is None and sound.verdict.p == pytest.approx(0.5)


def thinking(thought="both are fine", p=0.99):
    return speaker(by_kind(thought=thought), lambda choose, question: share(p if question.first == "one" else 0.45))


def test_after_a_chain_of_thought_each_order_is_clamped_before_the_mean(tmp_path):
    one = pair()
    decide(tmp_path, thinking(), [one], cot=True, clamp=(0.4, 0.6))
    [order] = one.verdict.orders
    assert (order.as_given, order.swapped) == pytest.approx((0.6, 0.45))
    assert one.verdict.p == pytest.approx(0.575)  # (0.6 + 0.55) / 2; clamped after the mean it were 0.6


def test_without_a_clamp_a_chain_of_thought_keeps_its_certainty(tmp_path):
    one = pair()
    decide(tmp_path, thinking(), [one], cot=True, clamp=None)
    assert one.verdict.p == pytest.approx((0.99 + 0.55) / 2)


def test_without_a_chain_of_thought_nothing_is_clamped(tmp_path):
    one = pair()
    decide(tmp_path, thinking(), [one], cot=False, clamp=(0.4, 0.6))
    assert one.verdict.p == pytest.approx((0.99 + 0.55) / 2)


def test_the_choice_is_asked_after_the_thought_that_was_said(tmp_path):
    model, one = thinking(lambda question: f"thought of {question.first}"), pair()
    decide(tmp_path, model, [one], cot=True)
    assert len(model.asked) == len(model.weighed) == 2
    for choose in model.weighed:
        question, thought, verdict = choose.messages
        assert thought == {"role": "assistant", "content": f"thought of {seen(choose).first}"}
        assert question["role"] == verdict["role"] == "user"
    assert [asked.step for asked in one.asked] == ["judge_thought", "judge_thought", "judge", "judge"]
    assert len({ask.seed for ask in model.asked}) == 2


@pytest.mark.parametrize(("answer", "fault"), [(LOST, "thought_timeout"), ("", "thought_empty")])
def test_a_failed_or_empty_thought_fails_the_pair_and_its_choice_is_not_asked(tmp_path, answer, fault):
    model = thinking(lambda question: answer if question.first == "two" else "fine")
    one = pair()
    decide(tmp_path, model, [one], cot=True)
    assert (one.verdict, one.fault) == (None, fault)
    assert [seen(choose).first for choose in model.weighed] == ["one"]


def test_pairs_of_one_prompt_are_judged_apart(tmp_path):
    shares = {("kind", "one"): 0.9, ("kind", "two"): 0.1, ("kind", "three"): 0.5}
    pairs = [pair(), pair(second="three"), pair(first="two", second="three")]
    decide(tmp_path, speaker(weigh=weigh_by(shares)), pairs)
    assert [one.verdict.p for one in pairs] == pytest.approx([0.9, 0.7, 0.3])


def test_the_same_pair_twice_is_asked_once(tmp_path):
    model, pairs = speaker(), [pair(), pair()]
    decide(tmp_path, model, pairs)
    assert len(model.weighed) == 2 and pairs[0].verdict == pairs[1].verdict
