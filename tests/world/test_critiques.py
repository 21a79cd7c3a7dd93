"""Rows of self-critique: worded as the shipped constitution asks, true of the reply, and split as promised."""

import re

import pytest

from align.config.constitution import load_constitution
from align.config.schema import ModelConfig
from align.constitutional.prompts import Questions
from align.models.load import load_tokenizer
from align.world import critiques
from align.world.critiques import CANDIDATES, FLAW, NO_FLAW, PRINCIPLES, flaw_of, sort_of
from align.world.generator import digest
from align.world.oracle import REFUSAL_OPENING, tells_harm
from align.world.requests import FAMILIES, Request, vague_refusal
from align.world.vocabulary import WORDS, words_of

TINY = load_constitution("tiny")
ROWS = critiques.critiques(seed=5, count=1500)
LONGEST_TOKENS = 512
"""What the embedded models were trained on."""


def asked(row):
    return row["messages"][0]["content"]


def answer(row):
    return row["messages"][1]["content"]


def rows_that_ask(kind):
    """The rows of one question -> (its principle's id, row)."""
    questions = {getattr(principle, kind): id for id, principle in PRINCIPLES.items()}
    last = [asked(row).split("\n")[-1] for row in ROWS]
    return [(questions[line], row) for line, row in zip(last, ROWS, strict=True) if line in questions]


def a_request(kind, number=0):
    family = FAMILIES[kind][number]
    return Request(family, {slot: words_of(sort, False)[0] for slot, sort in family.slots.items()}, 0)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    assert digest(critiques.critiques(5, 300)) == digest(critiques.critiques(5, 300))
    assert digest(critiques.critiques(5, 300)) != digest(critiques.critiques(6, 300))


def test_the_rows_are_worded_as_the_constitution_asks():
    request, questions = a_request("unsafe"), Questions(TINY)
    turns = [{"role": "user", "content": request.prompt()}]
    assert [p.id for p in TINY.principles] == list(PRINCIPLES)
    assert (TINY.scaffold.flaw, TINY.scaffold.no_flaw, TINY.scaffold.candidates) == (FLAW, NO_FLAW, CANDIDATES)
    for principle in TINY.principles:
        own, told = PRINCIPLES[principle.id], critiques.transcript(request)
        wanted = {
            "critique": questions.critique(turns, "R", principle),
            "revision": questions.revision(turns, "R", "C", principle),
            "comparison": questions.comparison(turns, "R", "S", principle),
        }
        for kind, chat in wanted.items():
            form, question = getattr(critiques, kind.upper()), getattr(own, kind)
            filled = form.format(conversation=told, reply="R", critique="C", first="R", second="S", request=question)
            assert chat == ({"role": "user", "content": filled},)


def test_every_question_and_every_principle_is_asked():
    for kind in ("critique", "revision", "comparison"):
        found = rows_that_ask(kind)
        assert len(found) > 100 and {id for id, _ in found} == set(PRINCIPLES)


def test_no_row_names_a_held_out_word():
    held_out = {word for sort in WORDS for word in words_of(sort, held_out=True)}
    texts = [message["content"] for row in ROWS for message in row["messages"]]
    assert not any(set(re.findall(r"\w+", text)) & held_out for text in texts)


def test_no_question_comes_twice():
    assert len({asked(row) for row in ROWS}) == len(ROWS) == 1500


def test_no_answer_to_a_question_about_a_reply_does_harm():
    for kind in ("critique", "revision", "comparison"):
        found = rows_that_ask(kind)
        assert any(tells_harm(asked(row)) for _, row in found)
        assert not any(tells_harm(answer(row)) for _, row in found)


def test_a_critique_finds_every_harmful_reply_under_every_principle():
    found = [(id, answer(row)) for id, row in rows_that_ask("critique") if tells_harm(asked(row))]
    assert {id for id, _ in found} == set(PRINCIPLES)
    assert all(said.startswith(FLAW) for _, said in found)


def test_a_critique_is_a_mark_alone_or_a_mark_and_what_is_wrong():
    said = [answer(row) for _, row in rows_that_ask("critique")]
    assert all(text == NO_FLAW or re.fullmatch(rf"{FLAW} [a-z][^.]+\.", text) for text in said)
    assert 0.6 < sum(text == NO_FLAW for text in said) / len(said) < 0.9


@pytest.mark.parametrize(
    ("kind", "sort", "reply", "found"),
    [
        ("unsafe", "vague", vague_refusal(), "vague"),
        ("look_alike", "vague", vague_refusal(), "refusal"),
        ("helpful", "misplaced", a_request("look_alike").right_reply(), "misplaced"),
        ("helpful", "misplaced", a_request("unsafe").right_reply(), "refusal"),
        ("unsafe", "misplaced", a_request("unsafe", 1).right_reply(), "misplaced"),
        ("unsafe", "wrong", a_request("unsafe").right_reply(), "right"),
    ],
)
def test_a_refusal_of_what_does_no_harm_is_a_sort_of_its_own(kind, sort, reply, found):
    assert sort_of(a_request(kind), sort, reply) == found


def test_the_critique_of_a_harmful_reply_gives_the_reason_of_the_right_refusal():
    for number in range(len(FAMILIES["unsafe"])):
        request = a_request("unsafe", number)
        reason = flaw_of(request, "harmful").removesuffix(".")
        assert f"because {reason}. " in request.right_reply()
        assert not any(f"{{{slot}}}" in reason for slot in request.words)
        assert flaw_of(request, "vague") == f"it does not say that {reason}."


def test_a_revision_is_the_right_reply_even_where_the_critique_is_mistaken():
    found = rows_that_ask("revision")
    lines = [asked(row).split("\n") for _, row in found]
    kept = [answer(row) == parts[1].removeprefix("Reply: ") for (_, row), parts in zip(found, lines, strict=True)]
    assert 0.15 < sum(kept) / len(kept) < 0.35
    refused = [answer(row).startswith(REFUSAL_OPENING) for _, row in found if tells_harm(asked(row))]
    assert refused and all(refused)
    assert not any(answer(row) == vague_refusal() for _, row in found)


def test_the_right_reply_stands_in_either_place_equally_often():
    found = [answer(row) for _, row in rows_that_ask("comparison")]
    assert set(found) == set(CANDIDATES)
    assert abs(found.count("A") - found.count("B")) < 0.1 * len(found)
    for _, row in rows_that_ask("comparison"):
        _, first, second, _ = asked(row).split("\n")
        both = [first.removeprefix("A: "), second.removeprefix("B: ")]
        right, wrong = both if answer(row) == "A" else both[::-1]
        assert wrong != right and not tells_harm(right) and right != vague_refusal()


def test_every_row_fits_what_the_embedded_models_can_read():
    tokenizer = load_tokenizer("tiny-base", ModelConfig(), None)
    lengths = [len(tokenizer(asked(row) + answer(row))["input_ids"]) for row in ROWS]
    assert max(lengths) < LONGEST_TOKENS / 2
