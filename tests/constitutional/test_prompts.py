"""The questions: whole conversations, worked examples first, and answers that are read as they were asked for."""

import pytest

from align.config import listing
from align.config.constitution import GROUP, Constitution, CritiqueExample, JudgeExample, Turn, load_constitution
from align.constitutional.prompts import Questions, chat
from tests.constitutional.making import BAR, SCAFFOLD, principle

TALK = chat(
    ("system", "Be brief."), ("user", "Who are you?"), ("assistant", "A helper."), ("user", "Help {me} with {reply}!")
)
TRANSCRIPT = "Be brief.\n\nUser: Who are you?\n\nAssistant: A helper.\n\nUser: Help {me} with {reply}!"
ASKED = (Turn("user", "Hi"), Turn("assistant", "Ho"), Turn("user", "How?"))
EXAMPLES = Constitution(
    "test", "1", "none", "", (principle("kind"), principle("true")),
    critique_examples=(
        CritiqueExample(ASKED, "So.", "kind", "it is curt", "Gladly: so."),
        CritiqueExample(ASKED, "Kindly so.", "true"),
    ),
    judge_examples=(
        JudgeExample(ASKED, "left", "right", "kind", "second"), JudgeExample(ASKED, "up", "down", "true", "first"),
    ),
    scaffold=SCAFFOLD,
)  # fmt: skip
HOW = "User: Hi\n\nAssistant: Ho\n\nUser: How?"


@pytest.fixture
def questions():
    return Questions(EXAMPLES)


def test_a_transcript_has_every_turn_and_whose_it_is(questions):
    assert questions.transcript(TALK) == TRANSCRIPT


def test_a_critique_question_follows_its_worked_examples_one_of_them_without_a_flaw(questions):
    asked = questions.critique(TALK, "No {way}.", EXAMPLES.principle("kind"))
    assert asked == chat(
        ("user", BAR.join(["critique", "kind", HOW, "So."])),
        ("assistant", "Flaw: it is curt"),
        ("user", BAR.join(["critique", "true", HOW, "Kindly so."])),
        ("assistant", "No flaw"),
        ("user", BAR.join(["critique", "kind", TRANSCRIPT, "No {way}."])),
    )


def test_a_revision_question_follows_the_examples_that_have_a_revision(questions):
    asked = questions.revision(TALK, "No.", "it {is} curt", EXAMPLES.principle("true"))
    assert asked == chat(
        ("user", BAR.join(["revision", "kind", HOW, "So.", "it is curt"])),
        ("assistant", "Gladly: so."),
        ("user", BAR.join(["revision", "true", TRANSCRIPT, "No.", "it {is} curt"])),
    )


def test_a_comparison_follows_examples_whose_answer_is_the_better_ones_letter(questions):
    asked = questions.comparison(TALK, "one", "two", EXAMPLES.principle("true"))
    assert asked == chat(
        ("user", BAR.join(["comparison", "kind", HOW, "left", "right"])),
        ("assistant", "B"),
        ("user", BAR.join(["comparison", "true", HOW, "up", "down"])),
        ("assistant", "A"),
        ("user", BAR.join(["comparison", "true", TRANSCRIPT, "one", "two"])),
    )


def test_a_thought_has_no_examples_and_the_choice_follows_it(questions):
    thought = questions.thought(TALK, "one", "two", EXAMPLES.principle("kind"))
    assert thought == chat(("user", BAR.join(["thought", "kind", TRANSCRIPT, "one", "two"])))
    assert questions.verdict(thought, "hm") == thought + chat(("assistant", "hm"), ("user", SCAFFOLD.verdict))


@pytest.mark.parametrize(
    ("said", "text", "flaw", "marked"),
    [
        ("No flaw", "", False, True),
        ("  no FLAW. It is fine", ". It is fine", False, True),
        ("Flaw: it is curt", "it is curt", True, True),
        ("\nflaw:it is curt\n", "it is curt", True, True),
        ("It is curt. No flaw", "It is curt. No flaw", True, False),
        ("A flaw: it is curt", "A flaw: it is curt", True, False),
        ("", "", True, False),
    ],
)
def test_a_critique_is_read_by_how_it_begins_and_one_without_a_mark_is_a_flaw(questions, said, text, flaw, marked):
    found = questions.read_critique(said)
    assert (found.text, found.flaw, found.marked) == (text, flaw, marked)


@pytest.mark.parametrize("name", sorted(listing.options(GROUP)))
def test_every_question_of_a_shipped_constitution_holds_all_that_it_is_about(name):
    questions = Questions(load_constitution(name))
    for one in questions.constitution.principles:
        for asked, texts in (
            (questions.critique(TALK, "<reply>", one), ("<reply>", one.critique)),
            (questions.revision(TALK, "<reply>", "<fault>", one), ("<reply>", "<fault>", one.revision)),
            (questions.comparison(TALK, "<one>", "<two>", one), ("<one>", "<two>", one.comparison)),
            (questions.thought(TALK, "<one>", "<two>", one), ("<one>", "<two>", one.comparison)),
        ):
            last = asked[-1]["content"]
            assert all(last.count(text) == 1 for text in texts), (one.id, last)
            assert all(turn["content"] in last for turn in TALK)
            assert [turn["role"] for turn in asked] == ["user", "assistant"] * (len(asked) // 2) + ["user"]


@pytest.mark.parametrize("name", sorted(listing.options(GROUP)))
def test_the_examples_of_a_shipped_constitution_are_read_as_they_are_meant(name):
    questions = Questions(load_constitution(name))
    one = questions.constitution.principles[0]
    answers = [turn["content"] for turn in questions.critique(TALK, "x", one) if turn["role"] == "assistant"]
    found = [questions.read_critique(answer) for answer in answers]
    assert all(critique.marked for critique in found)
    assert [critique.flaw for critique in found] == [
        bool(example.critique) for example in questions.constitution.critique_examples
    ]
