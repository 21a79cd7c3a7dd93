"""Every kind of instruction with a reply that keeps it and one that does not; accuracies; what is not known."""

import json
import math

import numpy as np
import pytest

from align.config.errors import UserError
from align.evaluation.instruction_kinds import KINDS, sentence_count
from align.evaluation.instructions import follow, is_kept, loosened, read_instructions
from align.evaluation.languages import MARKS, is_in_language
from align.evaluation.tasks import change
from tests.evaluation.published import folder_of

AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
CASES = [
    # kind, settings, kept by, not kept by
    ("keywords:existence", {"keywords": ["Mill", "pond"]}, "The mills by the Pond.", "The mill."),
    ("keywords:frequency", AT_LEAST | {"keyword": "mill", "frequency": 2}, "Mill, mills.", "A mill."),
    ("keywords:frequency", LESS | {"keyword": "mill", "frequency": 2}, "A mill.", "Mill, mills."),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "A rocket.", "A Rock."),
    ("keywords:letter_frequency", {"let_relation": "at least", "letter": "!", "let_frequency": 2}, "Oh! No!", "Oh!"),
    ("keywords:letter_frequency", {"let_relation": "less than", "letter": "T", "let_frequency": 2}, "a t", "t T"),
    ("language:response_language", {"language": "de"}, "Das ist nicht so gut, aber es geht.", "It is not so good."),
    ("length_constraints:number_sentences", AT_LEAST | {"num_sentences": 3}, "One. Two! Three?", "One. Mr. Two."),
    ("length_constraints:number_sentences", LESS | {"num_sentences": 2}, "It is 3.5 metres, e.g. here.", "One. Two."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}, "***\none\n***\ntwo\n***\n3", "one\n***\n***\ntwo"),
    ("length_constraints:number_words", AT_LEAST | {"num_words": 3}, "one two three", "one two"),
    ("length_constraints:number_words", LESS | {"num_words": 3}, "one two", "one two three"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "mill"},
     "One.\n\n\"Mill, two.", "Mill.\n\nTwo."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Write!", "Maps. So it is."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S: Write!", "Bye.\nP.S. Write!"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "Two:\n* one\n- **two**", "* one\n**two**\n---"),
    ("detectable_format:constrained_response", {}, "My answer is no. It rains.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", "*one* and two**"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na\nSection 2\nb"),
    ("detectable_format:json_format", {}, "```json\n{\"a\": [1]}\n```", "Here: {\"a\": 1}"),
    ("detectable_format:title", {}, "<<The mill>>\nIt turns.", "<The mill>, << >>"),
    ("combination:two_responses", {}, "one\n******\ntwo\n******", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say this. "}, "say THIS. And so.", "Well: say this."),
    ("startend:end_checker", {"end_phrase": "That is all."}, "\"So. That is ALL.\"", "That is all. Bye."),
    ("startend:quotation", {}, "\"All of it.\"", "\"Part\" of it."),
    ("change_case:capital_word_frequency", {"capital_relation": "less than", "capital_frequency": 2},
     "The BIG mill.", "The BIG OLD mill."),
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2},
     "The BIG WELL-KNOWN mill.", "The Big Mill, BIG."),
    ("change_case:english_capital", {}, "THE MILL IS BY THE POND.", "THE MILL is by the pond."),
    ("change_case:english_lowercase", {}, "the mill is by the pond.", "The mill is by the pond."),
    ("punctuation:no_comma", {}, "One and two.", "One, two."),
]  # fmt: skip


def row(*instructions):
    names, settings = zip(*instructions, strict=True)
    return {"instruction_id_list": list(names), "kwargs": list(settings)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2][:12]!r}")
def test_a_kind_is_kept_by_one_reply_and_not_by_another(case):
    kind, settings, good, bad = case
    [instruction] = read_instructions(row((kind, settings)))
    assert is_kept(instruction, good) and not is_kept(instruction, bad)
    assert not is_kept(instruction, "  \n")


def test_every_kind_has_its_case():
    assert {kind for kind, *_ in CASES} == set(KINDS)


@pytest.mark.parametrize("kind", ["change_case:english_capital", "change_case:english_lowercase"])
def test_text_in_the_right_case_but_not_in_english_does_not_keep_it(kind):
    text = "die mühle ist nicht an dem teich und das wasser steht in der wiese, aber es ist schön."
    [instruction] = read_instructions(row((kind, {})))
    assert not is_kept(instruction, text.upper() if "capital" in kind else text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Dr. Mill came at 5 p.m. to the U.S. mill. He left.", 2),
        ('"It is!" Yes!! No...', 3),
        ("a line\nand a line\n\n---\n1. a point", 3),
        ("It costs 3.50. (Really.) e.g. this", 3),
        ("My answer is no. It rains.", 2),
        ("", 0),
    ],
)
def test_sentences_are_counted_as_people_count_them(text, count):
    assert sentence_count(text) == count


SPOKEN = {
    "ar": "هذا الكتاب مفيد جدا و هو من أفضل الكتب في العالم", "bg": "Това е много добра книга и аз я чета всеки ден.",
    "bn": "এটি একটি ভালো বই", "de": "Das ist ein schönes Buch und ich lese es jeden Tag.",
    "en": "This is a good book and I read it every day.", "es": "Este es un libro muy bueno y lo leo todos los días.",
    "fa": "این کتاب برای شما است و آن را می‌خوانم", "fi": "Tämä on hyvä kirja ja minä luen sitä joka päivä.",
    "fr": "C'est un bon livre et je le lis tous les jours avec plaisir.", "gu": "આ એક સારું પુસ્તક છે",
    "hi": "यह एक बहुत ही सुंदर दिन है और हम सभी खुश हैं।", "it": "Questo è un bel libro e lo leggo ogni giorno con gioia.",
    "kn": "ಇದು ಒಳ್ಳೆಯ ಪುಸ್ತಕ", "ko": "이 책은 정말 좋은 책입니다", "mr": "हे एक सुंदर पुस्तक आहे आणि मी ते वाचत आहे.",
    "ne": "यो एउटा राम्रो किताब हो र म यसलाई पढ्दै छु।", "nl": "Dit is een mooi boek en ik lees het elke dag in de tuin.",
    "pa": "ਇਹ ਇੱਕ ਚੰਗੀ ਕਿਤਾਬ ਹੈ", "pl": "To jest dobra książka i czytam ją każdego dnia, ale nie w nocy.",
    "pt": "Este é um livro muito bom e eu leio todos os dias, mas não à noite.",
    "ru": "Это очень хорошая книга, и я читаю её каждый день, но не вечером.",
    "sv": "Det är en bra bok och jag läser den varje dag, men inte på kvällen.",
    "sw": "Hiki ni kitabu kizuri na mimi ninakisoma kila siku kwa furaha katika nyumba yangu.",
    "ta": "இது ஒரு நல்ல புத்தகம்", "te": "ఇది మంచి పుస్తకం", "th": "นี่คือหนังสือที่ดีมาก",
    "tr": "Bu çok güzel bir kitap ve ben onu her gün okuyorum ama gece değil.",
    "ur": "یہ کتاب بہت اچھی ہے اور میں اس کو پڑھ رہا ہوں", "vi": "Đây là một cuốn sách rất hay và tôi đọc nó mỗi ngày.",
}  # fmt: skip


@pytest.mark.parametrize("code", MARKS)
def test_a_sentence_is_in_its_language_and_in_no_other(code):
    assert [other for other in MARKS if is_in_language(SPOKEN[code], other)] == [code]


def test_two_english_words_are_no_answer_in_another_language():
    assert not any(is_in_language("A plain reply.", code) for code in MARKS if code != "en")
    assert not is_in_language("123 !", "ko")


NO_COMMA, TITLE = ("punctuation:no_comma", {}), ("detectable_format:title", {})
WORDS = ("length_constraints:number_words", AT_LEAST | {"num_words": 2})


def test_prompts_and_instructions_are_counted_strict_and_loose():
    rows = [row(NO_COMMA, TITLE), row(NO_COMMA), row(WORDS), row(TITLE, WORDS)]
    replies = [
        "Sure, here it is:\n<<One>> and so on",  # strictly a comma; without the first line none
        "one, two",
        "one two",
        "three words here",
    ]
    found = follow(rows, replies)
    assert found.strict.tolist() == [0, 0, 1, 0] and found.loose.tolist() == [1, 0, 1, 0]
    assert (found.prompts_strict.share, found.prompts_loose.share) == (0.25, 0.5)
    assert (found.instructions_strict.share, found.instructions_strict.count) == (3 / 6, 6)
    assert found.instructions_loose.share == 4 / 6
    assert {kind: (share.share, share.count) for kind, share in found.by_kind.items()} == {
        "punctuation:no_comma": (0, 2), "detectable_format:title": (0.5, 2), "length_constraints:number_words": (1, 2),
    }  # fmt: skip
    assert (found.unknown, found.prompts_left_out) == ({}, 0)


def test_the_loose_texts_are_the_eight_of_the_paper():
    assert loosened("*a*\nb\n*c*") == ["*a*\nb\n*c*", "b\n*c*", "*a*\nb", "b", "a\nb\nc", "b\nc", "a\nb", "b"]


def test_what_is_not_known_is_counted_and_named_and_its_prompt_left_out():
    rows = [
        row(("keywords:rhyme", {"with": "mill"}), NO_COMMA),
        row(("length_constraints:number_words", {"num_words": 3})),
        row(("language:response_language", {"language": "xx"})),
        row(("length_constraints:number_words", {"relation": "about", "num_words": 3})),
        row(NO_COMMA),
    ]
    found = follow(rows, ["one"] * 5)
    assert found.unknown == {
        "keywords:rhyme: unknown kind": 1,
        "length_constraints:number_words: no relation": 1,
        "language:response_language: unknown language xx": 1,
        "length_constraints:number_words: relation 'about' is neither 'at least' nor 'less than'": 1,
    }
    assert found.prompts_left_out == 4 and found.prompts_strict.count == 1
    # What is known in a prompt with something unknown still counts among instructions.
    assert found.instructions_strict.count == 2 and math.isnan(found.strict[0])
    assert follow([row(("a:b", {}))], ["one"]).prompts_strict is None


def test_names_may_carry_a_language_and_settings_be_null():
    with_nulls = {"num_words": 1, "relation": "at least", "keywords": None}
    [one] = read_instructions(row(("en:length_constraints:number_words", with_nulls)))
    assert one.fault is None and is_kept(one, "a word")
    with pytest.raises(UserError, match=r"ifeval.jsonl:3: needs instruction_id_list and kwargs"):
        read_instructions({"prompt": "x"}, "ifeval.jsonl:3")
    with pytest.raises(UserError, match="row 2: needs"):
        follow([row(NO_COMMA), {"instruction_id_list": ["a"], "kwargs": []}], ["", ""])


def test_what_a_training_did_is_a_paired_change_without_the_prompts_left_out():
    rows = [row(NO_COMMA)] * 3 + [row(("a:b", {}))]
    before, after = follow(rows, ["a, b", "a", "a, b", "a"]), follow(rows, ["a", "a", "a, b", "a"])
    found = change(before.strict, after.strict)
    assert (found.before, found.after, found.gained, found.lost) == (1 / 3, 2 / 3, 1, 0)
    assert found.difference.count == 3 and found.difference.missing == 1


@pytest.mark.real_data
def test_all_834_instructions_of_the_file_are_known(real_data):
    with open(folder_of(real_data, "ifeval") / "en_input_data.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = follow(rows, ["A reply."] * len(rows))
    assert (len(rows), found.unknown, found.prompts_left_out) == (541, {}, 0)
    assert set(found.by_kind) == set(KINDS) and found.instructions_strict.count == 834
    assert np.isfinite(found.strict).all() and found.by_kind["punctuation:no_comma"].count == 66
    repeated = [" ".join(one.get("prompt_to_repeat") or "" for one in row["kwargs"]).strip() or "a" for row in rows]
    assert follow(rows, repeated).by_kind["combination:repeat_prompt"].share == 1.0
