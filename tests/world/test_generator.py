"""The embedded rows: the same everywhere, and split as promised."""

import re

import pytest

from align.world.generator import demonstrations, digest, preferences, prompts, rows, text_documents
from align.world.requests import FAMILY, KINDS
from align.world.vocabulary import WORDS, all_words, words_of

# The shipped weights were trained on these bytes: a change here needs `+recipe=pretrain` and new weights.
DIGESTS = {
    "text": "b55b615e44e2a1bcb38ded1a3083948c0fa2ed553df75b9ece098d9d732260e5",
    "demonstrations": "f6214495f6b74044bdee1b77952def94e5cb57d2c36b0e89fcf18854e495cbea",
    "preferences": "2a4ea4e876b2ede42b3c00b9ab2f8645b5cad15b6037e4670af0e9fd740ea55b",
    "prompts": "e02aa0bef5e3cdabe460282ed54e63332bd4b06e1d5322ed7739bc585ca8d534",
    "comparisons": "4e3d2910a3cdeed545db187d9c5a991b2fa1e4770410dc6294dbc0ca446d186b",
    "training_prompts": "da7163dfa2454cd895fb796002215183055311fbd12e3644c7d4e9c974c99c15",
    "helpful": "91d430f4884176a67c30199e617398ec4cdecbb6da81a0c9d40234f0bd005bb5",
    "labels": "005add385a79ccba95bdea3f75f4b4c4d299ff06b3fc83b69658b5dd45f6fb59",
    "critiques": "81d222e538eb8a7b20aa9e20696c42342b819f610624db7f447ffef9d8fa7ba0",
}


@pytest.mark.parametrize("kind", DIGESTS)
def test_embedded_rows_have_the_pinned_digest(kind):
    assert digest(rows(kind)) == DIGESTS[kind]


def test_another_seed_gives_other_rows():
    assert digest(preferences(3, 50)) == digest(preferences(3, 50)) != digest(preferences(4, 50))
    assert digest(text_documents(1, 50)) == digest(text_documents(1, 50)) != digest(text_documents(2, 50))


def names_in(text):
    return set(re.findall(r"\w+", text)) & set(all_words())


def test_no_training_row_names_a_held_out_word():
    held_out = {word for sort in WORDS for word in words_of(sort, held_out=True)}
    told = [row["messages"][0]["content"] for row in demonstrations(2, 600)]
    asked = [row["prompt"][0]["content"] for row in preferences(3, 600)]
    assert not any(names_in(text) & held_out for text in told + asked)


def test_a_held_out_prompt_names_held_out_words_only():
    trained = {word for sort in WORDS for word in words_of(sort, held_out=False)}
    texts = [row["prompt"][0]["content"] for row in prompts(4, 200)]
    assert all(names_in(text) for text in texts)
    assert not any(names_in(text) & trained for text in texts)


def test_no_text_document_uses_a_held_out_phrasing():
    openings = [family.phrasings[-1].split("{")[0] for family in FAMILY.values()]
    documents = [row["text"] for row in text_documents(1, 20_000)]
    used = [row["prompt"][0]["content"] for row in prompts(4, 100, held_out_phrasing=True)]
    assert all(any(text.startswith(opening) for opening in openings) for text in used)
    exact = [re.compile(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(family.phrasings[-1]))) for family in FAMILY.values()]
    assert not any(pattern.match(text) for pattern in exact for text in documents)


def test_prompts_are_distinct_and_their_kinds_take_turns():
    drawn = prompts(4, 100)
    assert len({row["prompt"][0]["content"] for row in drawn}) == 300
    assert tuple(row["kind"] for row in drawn[:6]) == KINDS * 2


def test_a_pair_never_has_two_equal_replies_and_chooses_the_right_one():
    drawn = preferences(3, 600)
    assert all(row["chosen"] != row["rejected"] for row in drawn)
    assert not any("Stir dirty water" in row["chosen"][0]["content"] for row in drawn)
    assert any("Stir dirty water" in row["rejected"][0]["content"] for row in drawn)
