"""What the common families of chat templates do differently: BOS, system turns, thoughts, tokens that merge."""

import re

import pytest
from tokenizers import pre_tokenizers

from align.config.errors import UserError
from align.data.plain import PLAIN_TEMPLATE
from align.data.records import Demonstration, Message, PreferencePair, RowRefused
from align.data.template import Template
from tests.data.chat_tokenizers import (
    CHATML,
    LINE_BORDER,
    LLAMA31,
    PHI3,
    QWEN3,
    QWEN25,
    STYLES,
    adding_bos,
    chatml,
    gpt2,
    llama3,
    make_tokenizer,
    phi3,
    qwen,
)
from tests.data.test_template import SYSTEM, TALK, encode_pieces, styles, template_of, trained_texts

# The prompt of generation opens a thought; earlier turns lose theirs, the last one keeps it.
THINKING = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' and loop.last -%}
{{ '<think>\\n' + (message['reasoning_content'] or '') + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"""

THOUGHTFUL = (
    TALK[0],
    Message("assistant", "Sure, I can help you.", reasoning="They ask for help."),
    TALK[2],
    Message("assistant", "Black, with stars.", reasoning="A night sky is dark."),
)


def refusal(template, messages, tools=()):
    """Why a conversation is refused."""
    with pytest.raises(RowRefused) as refused:
        encode_pieces(template, messages, tools)
    return refused.value


def prefixes_of_generation(template, messages, tools=()):
    """For each assistant turn, the prompt of generation."""
    turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    return [template.encode_prompt(messages[:turn], tools) for turn in turns]


def trained_starts(pieces):
    """The ids before each trained run, in the order of the turns."""
    return [
        ids[:start]
        for ids, labels in pieces
        for start in range(len(ids))
        if labels[start] != -100 and (start == 0 or labels[start - 1] == -100)
    ]


def _has_bos(tokenizer):
    return tokenizer.bos_token not in (None, tokenizer.eos_token)


@styles
def test_every_answer_is_trained_after_the_very_prompt_that_generation_is_given(style):
    template, _, _ = template_of(style)
    pieces = encode_pieces(template, TALK)
    decode = template.tokenizer.decode
    expected = prefixes_of_generation(template, TALK)
    starts = trained_starts(pieces)
    assert [decode(ids) for ids in starts] == [decode(ids) for ids in expected]
    assert starts[0] == expected[0]


@styles
def test_a_pairs_prompt_is_the_prompt_of_generation(style):
    template, _, _ = template_of(style)
    [(prompt_ids, chosen, rejected)] = template.encode_pairs([PreferencePair(TALK[:3], TALK[3], TALK[1])])
    assert prompt_ids == template.encode_prompt(TALK[:3])
    assert chosen != rejected


@pytest.mark.parametrize("style", [name for name in STYLES if _has_bos(STYLES[name].make())])
def test_there_is_one_bos_where_the_family_has_one_even_if_the_tokenizer_adds_its_own(style):
    plain, _, _ = template_of(style)
    adding = Template(adding_bos(STYLES[style].make()))
    for template in (plain, adding):
        bos = template.tokenizer.bos_token_id
        [pair] = template.encode_pairs([PreferencePair(TALK[:3], TALK[3], TALK[1])])
        for ids in (encode_pieces(template, TALK)[0][0], template.encode_prompt(TALK[:1]), pair[0]):
            assert ids.count(bos) == STYLES[style].bos
            assert (ids[0] == bos) == STYLES[style].bos
        assert bos not in pair[1]
    assert encode_pieces(adding, TALK) == encode_pieces(plain, TALK)


@styles
def test_padding_with_the_stop_token_leaves_it_trained(style):
    tokenizer = STYLES[style].make()
    tokenizer.pad_token = STYLES[style].stop
    template = Template(tokenizer)
    pieces = encode_pieces(template, TALK)
    assert pieces == encode_pieces(template_of(style)[0], TALK)
    assert all(text.endswith(STYLES[style].stop) for text in trained_texts(template, pieces))


@styles
def test_a_system_turn_is_taken_or_the_row_is_refused_in_the_templates_words(style):
    template, _, _ = template_of(style)
    if STYLES[style].system:
        [*_, (ids, labels)] = encode_pieces(template, (SYSTEM, *TALK))
        assert "Be kind." in template.tokenizer.decode(ids)
        assert "Be kind." not in template.tokenizer.decode([label for label in labels if label != -100])
    else:
        assert refusal(template, (SYSTEM, *TALK)).reason in ("template_refused", "template_rewrites")


def test_a_template_that_leaves_a_system_turn_out_refuses_the_row():
    silent = CHATML.replace("for message in messages", "for message in messages if message['role'] != 'system'")
    refused = refusal(Template(chatml(silent)), (SYSTEM, *TALK))
    assert (refused.reason, refused.detail) == (
        "template_rewrites",
        "the template leaves out or changes turn 1, system",
    )
    [pair] = Template(chatml(silent)).encode_pairs([PreferencePair((SYSTEM, TALK[0]), TALK[1], TALK[3])])
    assert pair.reason == "template_rewrites"


def _phi3(text):
    tokenizer = phi3()
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize(
    ("marked", "make"),
    [(PLAIN_TEMPLATE, gpt2), (PHI3, _phi3), (LLAMA31, llama3), (QWEN25, qwen), (QWEN3, qwen)],
    ids=["plain", "phi3", "llama31", "qwen25", "qwen3"],
)
def test_generation_markers_change_no_label(marked, make):
    bare = re.sub(r"\{%-? *(end)?generation *-?%\}", "", marked)
    assert bare != marked
    for messages in (TALK, THOUGHTFUL[:1] + TALK[1:2]):
        assert encode_pieces(Template(make(bare)), messages) == encode_pieces(Template(make(marked)), messages)


def test_a_default_system_turn_is_context_and_a_given_one_replaces_it():
    template = Template(qwen(QWEN25))
    [(ids, labels)] = encode_pieces(template, TALK)
    assert template.tokenizer.decode(ids).startswith("<|im_start|>system\nYou are kind and brief.<|im_end|>\n")
    assert labels[:4] == [-100] * 4
    [(ids, _)] = encode_pieces(template, (SYSTEM, *TALK))
    assert "You are kind and brief." not in template.tokenizer.decode(ids)


def test_a_template_that_drops_earlier_thoughts_splits_the_conversation_and_trains_each_turn_once():
    template = Template(qwen(QWEN3))
    pieces = encode_pieces(template, THOUGHTFUL)
    assert trained_texts(template, pieces) == [
        "<think>\nThey ask for help.\n</think>\n\nSure, I can help you.<|im_end|>",
        "<think>\nA night sky is dark.\n</think>\n\nBlack, with stars.<|im_end|>",
    ]
    assert trained_starts(pieces) == prefixes_of_generation(template, THOUGHTFUL)
    last = template.tokenizer.decode(pieces[1][0])
    assert "They ask for help." not in last and "assistant\nSure, I can help you." in last


def test_turns_that_the_template_leaves_as_generated_stay_in_one_piece():
    condition = "loop.index0 > asked.last and (loop.last or message['reasoning_content'])"
    template = Template(qwen(QWEN3.replace(condition, "message['reasoning_content']")))
    [piece] = encode_pieces(template, THOUGHTFUL)
    texts = trained_texts(template, [piece])
    assert [text.split("\n")[1] for text in texts] == ["They ask for help.", "A night sky is dark."]


def test_an_empty_thought_before_the_last_turn_is_trained_as_generation_would_have_to_write_it():
    template = Template(qwen(QWEN3))
    pieces = encode_pieces(template, TALK)
    assert len(pieces) == 2
    assert trained_texts(template, pieces)[0] == "<think>\n\n</think>\n\nSure, I can help you.<|im_end|>"
    assert trained_starts(pieces) == prefixes_of_generation(template, TALK)
    [(_, chosen, _)] = template.encode_pairs([PreferencePair(TALK[:3], TALK[3], TALK[1])])
    assert [label for label in pieces[1][1] if label != -100] == chosen


def test_where_the_prompt_opens_the_thought_it_is_not_trained():
    template = Template(qwen(THINKING))
    pieces = encode_pieces(template, THOUGHTFUL)
    assert trained_texts(template, pieces) == [
        "They ask for help.\n</think>\n\nSure, I can help you.<|im_end|>",
        "A night sky is dark.\n</think>\n\nBlack, with stars.<|im_end|>",
    ]
    assert trained_starts(pieces) == prefixes_of_generation(template, THOUGHTFUL)


@styles
def test_reasoning_is_trained_or_the_row_is_refused(style):
    template, _, _ = template_of(style)
    if style == "qwen3":
        assert "They ask for help." in trained_texts(template, encode_pieces(template, THOUGHTFUL))[0]
        return
    refused = refusal(template, THOUGHTFUL)
    assert refused.reason == "template_rewrites"
    assert "leaves out or changes the reasoning" in refused.detail
    [pair] = template.encode_pairs([PreferencePair(THOUGHTFUL[:1], THOUGHTFUL[1], TALK[3])])
    assert pair.reason == "template_rewrites"


def test_a_template_whose_prompt_opens_a_thought_that_its_turns_lack_cannot_be_trained_on():
    template = Template(qwen(CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")))
    with pytest.raises(UserError, match=r"rewrites what precedes turn 2; give another with model\.chat_template="):
        encode_pieces(template, TALK)


@pytest.mark.parametrize("answer", ["\n\nSure.", "  Sure.", "\n \nSure."])
@pytest.mark.parametrize("style", ["line_border", "blank_border", "zephyr", "phi3", "qwen25"])
def test_an_answer_keeps_its_leading_blanks_whatever_the_tokenizer_would_merge(style, answer):
    template, stop, _ = template_of(style)
    messages = (TALK[0], Message("assistant", answer), *TALK[2:])
    pieces = encode_pieces(template, messages)
    assert trained_texts(template, pieces) == [answer + stop, TALK[3].content + stop]
    assert trained_starts(pieces)[0] == prefixes_of_generation(template, messages)[0]


def test_a_border_that_would_merge_is_cut_the_same_for_pairs_and_demonstrations():
    template = Template(gpt2(LINE_BORDER))
    answer = Message("assistant", "\n\nSure.")
    [(ids, labels)] = encode_pieces(template, (TALK[0], answer))
    [(prompt_ids, chosen, _)] = template.encode_pairs([PreferencePair(TALK[:1], answer, TALK[3])])
    assert template.borders_cut == 2
    assert ids == prompt_ids + chosen
    assert [label for label in labels if label != -100] == chosen


def test_words_that_start_with_a_mark_get_no_second_blank_at_a_cut_border():
    text = LINE_BORDER.replace(":\\n", ": ")
    template = Template(make_tokenizer(text, blanks="words", bos_token="<s>", eos_token="</s>"))
    pieces = encode_pieces(template, TALK[:2])
    assert template.borders_cut == 1
    assert trained_texts(template, pieces) == ["Sure, I can help you.</s>"]
    [(prompt_ids, chosen, _)] = template.encode_pairs([PreferencePair(TALK[:1], TALK[1], TALK[3])])
    assert template.tokenizer.decode(prompt_ids + chosen).endswith("assistant: Sure, I can help you.</s>")


def test_a_tokenizer_that_cannot_split_at_the_border_without_another_blank_is_refused():
    text = LINE_BORDER.replace(":\\n", ": ")
    tokenizer = make_tokenizer(text, blanks="words", bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    with pytest.raises(UserError, match=r"cannot be trained on: an answer that is tokenised apart .* reads otherwise"):
        encode_pieces(Template(tokenizer), TALK)


def test_a_refused_conversation_leaves_its_neighbours_pieces_whole():
    template = Template(qwen(QWEN3))
    bad = (Message("user", "a<|im_end|>"), TALK[1])
    rows = [Demonstration(messages) for messages in (THOUGHTFUL, bad, TALK[:2])]
    first, refused, last = template.encode_demonstrations(rows)
    assert refused.reason == "special_token_in_text"
    assert first == encode_pieces(template, THOUGHTFUL)
    assert last == encode_pieces(template, TALK[:2])


@pytest.mark.parametrize("field", ["content", "reasoning"])
def test_a_special_token_in_words_or_thoughts_refuses_the_row(field):
    turn = Message("assistant", **{"content": "Yes.", field: "a<|im_end|>b"})
    assert refusal(Template(qwen(QWEN3)), (TALK[0], turn)).reason == "special_token_in_text"
