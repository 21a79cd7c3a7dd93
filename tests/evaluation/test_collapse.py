"""Signs of collapse: figures by hand, and fixtures of boilerplate, loops and silence against a healthy base."""

import itertools
import json
import math

import numpy as np
import pytest

from align.evaluation.collapse import (
    ENOUGH_REPLIES,
    LOOP_RISE,
    OFTEN_SHARE,
    distinct,
    diversity,
    flags,
    self_similarity,
)
from tests.evaluation.published import folder_of, xstest

NOUNS = "mill bridge barn well oak pond gate field lane hill boat church forge inn market mine orchard quay".split()
VERBS = "opens burns leans waits turns sinks shines stands falls grows".split()


def healthy(count=40, seed=0):
    """Sentences of a few words that hardly ever come twice."""
    draw = np.random.default_rng(seed)
    one = lambda: f"{draw.choice(NOUNS)} {draw.choice(VERBS)} {draw.choice(NOUNS)} {draw.choice(NOUNS)}"  # noqa: E731
    return [f"{one()} {one()}. {one()} {one()} {one()}." for _ in range(count)]


def test_the_figures_by_hand():
    found = diversity(["a b a b", "A b, c!", ""], finished=[True, False, True])
    assert found.distinct == (3 / 7, 3 / 5, 3 / 3)  # ab ba ab | ab bc; aba bab | abc
    assert found.words == 7 / 3 and found.empty == 1 / 3 and found.at_cap == 1 / 3
    assert found.repeated_in_reply == 0.0  # one 4-gram, once
    # {ab, ba} and {ab, bc}: one shared of two each.
    assert found.self_similarity == pytest.approx(1 / 2)
    assert diversity([]) is None and diversity(["one"]).self_similarity is None
    assert diversity(["one"]).distinct == (1.0, None, None) and diversity(["one"]).at_cap is None


def test_a_loop_is_said_before_in_the_same_reply():
    assert diversity(["a b c d " * 5]).repeated_in_reply == 1 - 4 / 17
    assert diversity(["a b c d e f g h"]).repeated_in_reply == 0.0


def test_self_similarity_is_the_mean_over_all_pairs():
    texts = [text.split() for text in healthy(12)]
    sets = [set(itertools.pairwise(text)) for text in texts]
    pairs = list(itertools.combinations(sets, 2))
    by_pair = sum(len(a & b) / math.sqrt(len(a) * len(b)) for a, b in pairs) / len(pairs)
    assert self_similarity(texts) == pytest.approx(by_pair)
    assert self_similarity([texts[0]] * 5) == pytest.approx(1.0)


def test_openings_and_sentences_are_counted_once_a_reply():
    replies = ["I am glad you asked. That is a good question. That is a good question."] * 3 + [
        "Turn left at the mill."
    ]
    found = diversity(replies)
    assert [(one.text, one.replies, one.share) for one in found.openings] == [("i am glad you asked", 3, 0.75)]
    assert {one.text: one.replies for one in found.sentences} == {
        "that is a good question": 3,
        "i am glad you asked": 3,
    }


BASE = healthy()
BROKEN = {
    "same_opening": [f"As a helpful assistant, I say {reply}" if i % 4 == 0 else reply for i, reply in enumerate(BASE)],
    "same_sentence": [f"{reply} I hope this helps you." if i % 4 == 0 else reply for i, reply in enumerate(BASE)],
    "loops": [f"{reply} {' '.join(reply.split()[:4] * 3)}" if i % 2 else reply
              for i, reply in enumerate(BASE)],
    "empty": ["..." if i % 10 == 0 else reply for i, reply in enumerate(BASE)],
    "less_distinct": [BASE[i % 8] for i in range(len(BASE))],
}  # fmt: skip


@pytest.mark.parametrize("sign", BROKEN)
def test_a_broken_model_is_flagged_for_what_is_broken(sign):
    found = {flag.name: flag.sentence for flag in flags(BROKEN[sign], BASE)}
    assert sign in found
    if sign != "less_distinct":
        assert set(found) <= {sign, "self_similar"}


def test_a_whole_fall_shows_every_sign_of_it():
    found = {flag.name: flag.sentence for flag in flags(["I am happy to help you with that. "] * 40, BASE)}
    assert set(found) == {"less_distinct", "self_similar", "same_opening", "same_sentence"}
    assert found["same_opening"] == '100% of replies open with "i am happy to help", base 0% of its own'


def test_replies_at_the_limit_are_flagged_where_it_is_known():
    whole, cut = [True] * 40, [False] * 10 + [True] * 30
    assert [flag.name for flag in flags(BASE, BASE, cut, whole)] == ["at_cap"]
    assert flags(BASE, BASE, cut, None) == []


def test_another_sample_of_the_same_model_is_not_flagged():
    for seed in range(1, 20):
        assert flags(healthy(seed=seed), BASE) == []
        assert flags(healthy(count=ENOUGH_REPLIES, seed=seed), healthy(count=ENOUGH_REPLIES, seed=seed + 50)) == []


def test_longer_replies_alone_are_no_collapse():
    longer = [f"{reply} {other} {third}" for reply, other, third in
              zip(BASE, healthy(seed=2), healthy(seed=3), strict=True)]  # fmt: skip
    assert diversity(longer).distinct[1] < 0.8 * diversity(BASE).distinct[1]
    assert flags(longer, BASE) == []


@pytest.mark.parametrize(("count", "flagged"), [(1, False), (2, True)])
def test_boilerplate_is_flagged_from_one_reply_in_ten_on(count, flagged):
    base = healthy(20)
    replies = ["I hope this helps you. Yes"] * count + base[count:]
    assert (OFTEN_SHARE == 0.1) and ("same_sentence" in [flag.name for flag in flags(replies, base)]) == flagged


def test_a_rise_of_just_the_limit_is_none():
    assert distinct([["a"] * 100], 1) == 0.01
    looped = ["a b c d " * 5] + healthy(39)
    rise = diversity(looped).repeated_in_reply - diversity(healthy(40)).repeated_in_reply
    assert rise < LOOP_RISE and "loops" not in [flag.name for flag in flags(looped, healthy(40))]


def test_too_few_replies_or_of_other_prompts_are_refused():
    with pytest.raises(ValueError, match="3 replies against 40"):
        flags(BASE[:3], BASE)
    with pytest.raises(ValueError, match="20 each are needed"):
        flags(BASE[:19], BASE[:19])
    with pytest.raises(ValueError, match="1 marks of an end for 2"):
        diversity(["a", "b"], [True])


@pytest.mark.real_data
def test_a_published_model_that_refuses_too_much_is_flagged_against_one_that_does_not(real_data):
    rows = {model: xstest(real_data, model) for model in ("llama2orig", "gpt4")}
    llama, gpt4 = (
        [row["completion"] for row in rows[model] if not row["type"].startswith("contrast")] for model in rows
    )
    assert {flag.name: flag.sentence for flag in flags(llama, gpt4)} == {
        "less_distinct": "distinct-2 0.52, base 0.68 (at equally many words)",
        "self_similar": "replies resemble each other by 0.04, base 0.01",
    }
    assert flags(gpt4, llama) == []
    assert diversity(gpt4).openings[0].text == "sorry but i can't assist"


@pytest.mark.real_data
def test_people_and_published_models_are_not_flagged_against_each_other(real_data):
    rows = json.loads((folder_of(real_data, "pandalm_testset") / "testset-v1.json").read_text())
    texts = [[str(row[key]) for row in rows] for key in ("response1", "response2")]
    assert [flag.name for flag in flags(*texts)] == [flag.name for flag in flags(*texts[::-1])] == []
