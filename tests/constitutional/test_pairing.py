"""Which replies are compared, and what is done with the verdicts."""

from collections import Counter

import pytest

from align.config.schema import PairSource
from align.constitutional.drawing import seed_of
from tests.constitutional.making import (
    LOST,
    Desk,
    constitution,
    principle,
    revised,
    row,
    rows,
    seen,
    speaker,
    stage,
)


class Samples:
    """A generator whose samples of a prompt are these texts, in the order of their numbers."""

    def __init__(self, texts):
        self.texts = texts

    def __call__(self, ask, question):
        listed = self.texts[question.conversation] if isinstance(self.texts, dict) else self.texts
        number = next(n for n in range(len(listed)) if seed_of_sample(question.conversation, n) == ask.seed)
        return listed[number]


def seed_of_sample(id, number):
    return seed_of(7, "sample", id, number)


def desk(folder, say=None, weigh=None, names=("kind", "true", "brief"), **changes):
    return Desk(folder, stage(**changes), constitution(*names), speaker(say, weigh))


def better(order):
    """A judge that likes earlier letters of `order` better, each a little."""

    def weigh(choose, question):
        first, second = (order.index(text[0]) for text in (question.first, question.second))
        return (0.1 * second, 0.1 * first)

    return weigh


def texts(pairs):
    return [(pair.first, pair.second) for pair in pairs]


def test_all_pairs_of_all_different_samples_are_judged(tmp_path):
    one = desk(tmp_path, Samples(["a", "b", "c"]), pairs=PairSource.all, samples=3, judge_principles=2)
    pairs = one.pairing.pairs(rows(2))
    assert texts(pairs) == [("a", "b"), ("a", "c"), ("b", "c")] * 2
    assert [pair.row.id for pair in pairs] == ["p0"] * 3 + ["p1"] * 3
    assert all(len(pair.verdict.orders) == 2 for pair in pairs) and len(one.generator.weighed) == 2 * 3 * 2 * 2


def test_repeated_samples_are_counted_and_compared_with_nothing(tmp_path):
    one = desk(tmp_path, Samples(["a", "b", "a", "a"]), pairs=PairSource.all, samples=4)
    [work] = rows(1)
    assert texts(one.pairing.pairs([work])) == [("a", "b")]
    assert one.pairing.left_out == {"sample_repeated": 2}
    assert [(which, why) for _, why, which in one.pairing.faults] == [
        ("sample 3", "sample_repeated"), ("sample 4", "sample_repeated"),
    ]  # fmt: skip


def test_failed_and_filtered_samples_are_counted(tmp_path):
    say = Samples({"p0": ["a", LOST, "", "d"], "p1": ["a", "", "", ""]})
    one = desk(tmp_path, say, pairs=PairSource.all, samples=4, filters=["empty"])
    assert texts(one.pairing.pairs(rows(2))) == [("a", "d")]
    assert one.pairing.left_out == {"reply_empty": 4, "reply_timeout": 1}


def test_temperatures_are_taken_in_turn(tmp_path):
    one = desk(tmp_path, pairs=PairSource.all, samples=5, temperatures=[0.5, 1.5], max_new_tokens=44)
    one.pairing.pairs([row("p")])
    asks = {ask.seed: ask for ask in one.generator.asked}
    assert [asks[seed_of_sample("p", n)].temperature for n in range(5)] == [0.5, 1.5, 0.5, 1.5, 0.5]
    assert {ask.max_new_tokens for ask in asks.values()} == {44}


def test_a_random_pair_is_any_of_them(tmp_path):
    one = desk(tmp_path, Samples(["a", "b", "c"]), pairs=PairSource.random, samples=3, judge_principles=1)
    pairs = one.pairing.pairs(rows(120))
    assert [pair.row.id for pair in pairs] == [f"p{n}" for n in range(120)]
    counts = Counter(texts(pairs))
    assert counts.keys() == {("a", "b"), ("a", "c"), ("b", "c")}
    assert all(24 <= count <= 56 for count in counts.values()), "three standard deviations around 40"


def test_a_prompt_with_one_sample_has_no_pair(tmp_path):
    for source in (PairSource.all, PairSource.random, PairSource.best_worst):
        one = desk(tmp_path / source.value, Samples(["a", "a"]), pairs=source, samples=2)
        assert one.pairing.pairs([row("p")]) == []


@pytest.mark.parametrize(("order", "pair"), [("badc", ("b", "c")), ("dcba", ("a", "d")), ("cabd", ("c", "d"))])
def test_the_best_is_compared_with_the_worst(tmp_path, order, pair):
    one = desk(tmp_path, Samples(list("abcd")), better(order), pairs=PairSource.best_worst, samples=4)
    [work] = rows(1)
    [found] = one.pairing.pairs([work])
    assert (found.first, found.second) == pair
    assert (found.verdict.p > 0.5) == (order.index(found.first) < order.index(found.second))
    assert len(found.asked) == 6 and len(work.asked) == 4 + 5 * 6, "the trace has the other five pairs too"


def test_undecided_samples_give_the_first_pair(tmp_path):
    one = desk(tmp_path, Samples(list("abc")), lambda *_: (0.0, 0.0), pairs=PairSource.best_worst, samples=3)
    [found] = one.pairing.pairs([row("p")])
    assert (found.first, found.second, found.verdict.p) == ("a", "b", 0.5)


def test_best_and_worst_are_not_known_where_a_verdict_failed(tmp_path):
    def weigh(choose, question):
        lost = choose.key == "p0" and {question.first, question.second} == {"b", "c"}
        return LOST if lost else better("abc")(choose, question)

    one = desk(tmp_path, Samples(list("abc")), weigh, pairs=PairSource.best_worst, samples=3)
    failed, sound = one.pairing.pairs(rows(2))
    assert (failed.first, failed.second, failed.verdict, failed.fault) == ("b", "c", None, "verdict_timeout")
    assert (sound.first, sound.second, sound.fault) == ("a", "c", None)


def test_the_newest_revision_is_compared_with_the_first_reply(tmp_path):
    one = desk(tmp_path, pairs=PairSource.revision_vs_initial)
    pairs = one.pairing.pairs([revised("p0", "a", "b", "c"), revised("p1", "a")])
    assert texts(pairs) == [("c", "a")] and one.generator.asked == []


def test_a_reply_that_was_revised_back_is_compared_with_nothing(tmp_path):
    one = desk(tmp_path, pairs=PairSource.revision_vs_initial)
    assert one.pairing.pairs([revised("p0", "a", "b", "a")]) == []
    assert one.pairing.left_out == {"revised_back": 1}


def test_no_pairs_ask_nothing(tmp_path):
    one = desk(tmp_path, pairs=PairSource.none)
    assert one.pairing.pairs([revised("p0", "a", "b")]) == []
    assert one.generator.asked == one.generator.weighed == []


CONTRAST = principle("kind", positive="Be kind.", negative="Be rude.")


def sides(ask, question):
    system = ask.messages[0]["content"]
    return f"{system.splitlines()[0]} {question.conversation}"


def test_contrast_compares_replies_under_opposite_system_prompts(tmp_path):
    one = desk(tmp_path, sides, names=(CONTRAST, "plain"), pairs=PairSource.contrast, temperature=0.3)
    [pair] = one.pairing.pairs([row("p")])
    assert (pair.first, pair.second) == ("Be kind. p", "Be rude. p")
    assert pair.source == "contrast kind" and [order.principle for order in pair.verdict.orders] == ["kind"]
    assert {ask.temperature for ask in one.generator.asked} == {0.3}
    for ask in one.generator.asked:
        assert [turn["role"] for turn in ask.messages] == ["system", "user"]
    assert all("Be kind." not in seen(choose).conversation for choose in one.generator.weighed)


def test_contrast_keeps_a_system_prompt_of_the_conversation_behind_its_own(tmp_path):
    one = desk(tmp_path, sides, names=(CONTRAST,), pairs=PairSource.contrast)
    work = row("p", "Hi", "Ho", "How?")
    work.conversation = ({"role": "system", "content": "You are Bob."}, *work.conversation)
    one.pairing.pairs([work])
    chats = {tuple(turn["content"] for turn in ask.messages) for ask in one.generator.asked}
    assert chats == {(f"{side}\n\nYou are Bob.", "Hi", "Ho", "How?") for side in ("Be kind.", "Be rude.")}


def test_contrast_draws_among_the_principles_that_have_both_sides(tmp_path):
    names = (CONTRAST, "plain", principle("true", positive="Be true.", negative="Lie."))
    one = desk(tmp_path, sides, names=names, pairs=PairSource.contrast)
    found = Counter(pair.source for pair in one.pairing.pairs(rows(40)))
    assert found.keys() == {"contrast kind", "contrast true"} and min(found.values()) > 8


def test_contrasts_that_are_equal_failed_or_filtered_are_counted(tmp_path):
    def say(ask, question):
        kind = ask.messages[0]["content"] == "Be kind."
        return {"p0": "same", "p1": LOST if kind else "a", "p2": "a" if kind else "", "p3": f"{kind}"}[
            question.conversation
        ]

    one = desk(tmp_path, say, names=(CONTRAST,), pairs=PairSource.contrast, filters=["empty"])
    assert [pair.row.id for pair in one.pairing.pairs(rows(4))] == ["p3"]
    assert [(work.id, why, which) for work, why, which in one.pairing.faults] == [
        ("p0", "contrast_equal", "both replies"),
        ("p1", "reply_timeout", "positive reply"),
        ("p2", "reply_empty", "negative reply"),
    ]


def test_one_draw_of_principles_judges_all_pairs_of_a_prompt(tmp_path):
    names = tuple(f"c{n}" for n in range(9))
    one = desk(tmp_path, Samples(list("abc")), names=names, pairs=PairSource.all, samples=3, judge_principles=4)
    pairs = one.pairing.pairs(rows(6))
    drawn = {}
    for pair in pairs:
        drawn.setdefault(pair.row.id, set()).add(tuple(order.principle for order in pair.verdict.orders))
    assert all(len(sets) == 1 for sets in drawn.values())
    first = [next(iter(sets)) for sets in drawn.values()]
    assert all(len(set(ids)) == 4 for ids in first) and len(set(first)) > 3


def test_more_judges_than_principles_are_all_principles(tmp_path):
    one = desk(tmp_path, Samples(["a", "b"]), pairs=PairSource.all, samples=2, judge_principles=50)
    [pair] = one.pairing.pairs([row("p")])
    assert {order.principle for order in pair.verdict.orders} == {"kind", "true", "brief"}


@pytest.mark.parametrize("source", [PairSource.random, PairSource.best_worst, PairSource.contrast])
def test_what_a_prompt_is_compared_by_depends_on_no_other_prompt(tmp_path, source):
    names = (CONTRAST, principle("true", positive="Be true.", negative="Lie."), "plain", "brief")

    def say(ask, question):
        return f"{ask.messages[0]['content']} {ask.seed}"

    def found(folder, works):
        one = desk(tmp_path / folder, say, names=names, pairs=source, samples=3, judge_principles=2)
        return {
            pair.row.id: (pair.first, pair.second, [order.principle for order in pair.verdict.orders])
            for pair in one.pairing.pairs(works)
        }

    every = found("all", rows(12))
    assert found("reversed", rows(12)[::-1]) == every
    assert found("some", rows(12)[4:7]) == {id: every[id] for id in ("p4", "p5", "p6")}
