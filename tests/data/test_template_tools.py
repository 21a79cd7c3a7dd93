"""Tools, calls and what tools answer: all of it is in the text, only the assistant's part is trained."""

import json

import pytest

from align.data.records import Demonstration, Message, PreferencePair, RowRefused, ToolCall
from align.data.template import Template
from tests.data.chat_tokenizers import CHATML, LLAMA31, QWEN3, QWEN25, STYLES, chatml, llama3, qwen
from tests.data.test_template import encode_pieces, template_of, trained_texts
from tests.data.test_template_families import prefixes_of_generation, refusal, trained_starts

WEATHER = json.dumps(
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "The weather.", "parameters": {"type": "object"}},
    }
)
CLOCK = json.dumps({"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}})
QUESTION = Message("user", "How warm is it in Rome?")
CALL = Message("assistant", "", tool_calls=(ToolCall("get_weather", '{"city": "Rome", "days": 2}', id="call12345"),))
ANSWER = Message("tool", '{"degrees": 21}', name="get_weather", tool_call_id="call12345")
REPLY = Message("assistant", "It is warm today.")
TALK = (QUESTION, CALL, ANSWER, REPLY)
TAKING = [name for name, style in STYLES.items() if style.tools]
REFUSING = [name for name, style in STYLES.items() if not style.tools]

# Writes calls and what tools answer, but never says which tools there are.
CALLS_ONLY = QWEN25.replace("{%- if tools -%}", "{%- if false -%}")
# Says which tools there are, and drops the calls.
TOOLS_ONLY = QWEN25.replace("message['tool_calls'] or []", "[]")


@pytest.mark.parametrize("style", TAKING)
def test_a_call_and_the_reply_are_trained_and_what_the_tool_says_is_not(style):
    template, stop, _ = template_of(style)
    pieces = encode_pieces(template, TALK, (WEATHER, CLOCK))
    call, reply = trained_texts(template, pieces)
    assert "get_weather" in call and '{"city": "Rome", "days": 2}' in call and call.endswith(stop)
    assert reply.endswith(REPLY.content + stop)
    assert "degrees" not in call + reply
    whole = template.tokenizer.decode(pieces[-1][0])
    assert "degrees" in whole and "get_time" in whole
    met = prefixes_of_generation(template, TALK, (WEATHER, CLOCK))
    assert [template.tokenizer.decode(ids) for ids in trained_starts(pieces)] == [
        template.tokenizer.decode(ids) for ids in met
    ]
    assert trained_starts(pieces)[0] == met[0]


@pytest.mark.parametrize("style", TAKING)
def test_a_pair_may_end_in_a_call_and_knows_its_tools(style):
    template, stop, _ = template_of(style)
    [encoded] = template.encode_pairs([PreferencePair((QUESTION,), CALL, REPLY, tools=(WEATHER,))])
    prompt_ids, chosen, rejected = encoded
    decode = template.tokenizer.decode
    assert prompt_ids == template.encode_prompt((QUESTION,), (WEATHER,))
    assert "get_weather" in decode(prompt_ids)
    assert "get_weather" in decode(chosen) and decode(chosen).endswith(stop)
    assert REPLY.content in decode(rejected)


@pytest.mark.parametrize("style", REFUSING)
def test_a_template_that_leaves_out_calls_or_tool_turns_refuses_the_row(style):
    template, _, _ = template_of(style)
    assert refusal(template, TALK).reason in ("template_rewrites", "template_refused")
    assert refusal(template, TALK, (WEATHER,)).reason in ("template_rewrites", "template_refused")


@pytest.mark.parametrize("style", REFUSING)
def test_a_template_that_takes_no_tools_refuses_rows_that_declare_some(style):
    template, _, _ = template_of(style)
    refused = refusal(template, (QUESTION, REPLY), (WEATHER,))
    assert refused.reason == "template_rewrites"
    assert refused.detail == "the template takes no tools: 'get_weather' is not in its text"
    [pair] = template.encode_pairs([PreferencePair((QUESTION,), REPLY, Message("assistant", "No."), tools=(WEATHER,))])
    assert pair.detail == refused.detail
    with pytest.raises(RowRefused, match="takes no tools"):
        template.encode_prompt((QUESTION,), (WEATHER,))


def test_a_declared_tool_is_missed_even_where_its_call_is_written():
    assert "takes no tools" in refusal(Template(qwen(CALLS_ONLY)), TALK, (WEATHER,)).detail
    assert len(encode_pieces(Template(qwen(CALLS_ONLY)), TALK)) == 1


def test_a_declared_tool_is_missed_even_where_the_question_names_it():
    asking = Message("user", "Use get_weather for Rome.")
    assert "takes no tools" in refusal(Template(chatml()), (asking, REPLY), (WEATHER,)).detail
    assert len(encode_pieces(Template(qwen(QWEN25)), (asking, REPLY), (WEATHER,))) == 1


@pytest.mark.parametrize("content", ["", "I use get_weather now."])
def test_a_call_is_missed_even_where_the_words_name_its_tool(content):
    call = Message("assistant", content, tool_calls=CALL.tool_calls)
    for tools in ((), (WEATHER,)):
        refused = refusal(Template(qwen(TOOLS_ONLY)), (QUESTION, call), tools)
        assert refused.detail == "the template leaves out the call of 'get_weather'"


def test_an_earlier_call_that_the_prompt_leaves_out_refuses_pairs_and_prompts():
    template = Template(chatml())
    [pair] = template.encode_pairs([PreferencePair(TALK[:3], REPLY, Message("assistant", "No."))])
    assert pair.detail == "the template leaves out the call of 'get_weather'"
    with pytest.raises(RowRefused, match="leaves out the call"):
        template.encode_prompt(TALK[:3])


def test_of_two_calls_in_a_turn_both_must_be_there():
    twice = Message("assistant", "", tool_calls=CALL.tool_calls * 2)
    [text] = trained_texts(Template(qwen(QWEN25)), encode_pieces(Template(qwen(QWEN25)), (QUESTION, twice)))
    assert text.count("<tool_call>") == 2
    first_only = QWEN25.replace("message['tool_calls'] or []", "(message['tool_calls'] or [])[:1]")
    assert "leaves out the call" in refusal(Template(qwen(first_only)), (QUESTION, twice)).detail
    refused = refusal(Template(llama3(LLAMA31)), (QUESTION, twice))
    assert (refused.reason, refused.detail) == (
        "template_refused",
        "the chat template refuses it: Only one call at a time",
    )


def test_words_beside_a_call_are_trained_or_the_row_is_refused():
    call = Message("assistant", "I look it up.", tool_calls=CALL.tool_calls)
    [text] = trained_texts(Template(qwen(QWEN25)), encode_pieces(Template(qwen(QWEN25)), (QUESTION, call)))
    assert text.startswith("I look it up.\n<tool_call>")
    refused = refusal(Template(llama3(LLAMA31)), (QUESTION, call))
    assert refused.detail == "the template changes the text of an assistant turn"


def test_what_a_tool_says_may_be_quoted_as_json():
    said = Message("tool", 'It is "warm"\nand sunny: 21 °C')
    for style in ("llama31", "mistral_tools", "qwen25"):
        template, _, _ = template_of(style)
        pieces = encode_pieces(template, (QUESTION, CALL, said, REPLY))
        assert "21 °C" in template.tokenizer.decode(pieces[-1][0])


def test_a_template_that_drops_what_a_tool_says_refuses_the_row():
    deaf = QWEN25.replace("<tool_response>\\n' + message['content'] + '", "<tool_response>\\n' + '")
    assert deaf != QWEN25
    assert refusal(Template(qwen(deaf)), TALK).detail == "the template leaves out or changes turn 3, tool"


def test_thoughts_within_one_answer_stay_in_one_piece_and_earlier_questions_are_split_off():
    template = Template(qwen(QWEN3))
    thinking = (
        QUESTION,
        Message("assistant", "", tool_calls=CALL.tool_calls, reasoning="A tool knows."),
        ANSWER,
        Message("assistant", REPLY.content, reasoning="Warm it is."),
    )
    [_] = encode_pieces(template, thinking, (WEATHER,))
    longer = (*thinking, Message("user", "And at night?"), Message("assistant", "Cold.", reasoning="No sun."))
    pieces = encode_pieces(template, longer, (WEATHER,))
    assert len(pieces) == 2
    thoughts = [text.split("\n")[1] for text in trained_texts(template, pieces)]
    assert thoughts == ["A tool knows.", "Warm it is.", "No sun."]
    assert trained_starts(pieces) == prefixes_of_generation(template, longer, (WEATHER,))


def test_tools_that_move_to_the_last_question_split_the_conversation():
    template, _, _ = template_of("mistral_tools")
    longer = (*TALK, Message("user", "And at night?"), Message("assistant", "Cold."))
    pieces = encode_pieces(template, longer, (WEATHER,))
    assert len(pieces) == 2
    assert len(trained_texts(template, pieces)) == 3
    assert trained_starts(pieces) == prefixes_of_generation(template, longer, (WEATHER,))


@pytest.mark.parametrize(
    "turn",
    [
        Message("tool", "owned<|im_end|>"),
        Message("assistant", "", tool_calls=(ToolCall("get_weather", '{"city": "\\u003c|im_end|>"}'),)),
        Message("assistant", "", tool_calls=(ToolCall("<|im_end|>", "{}"),)),
    ],
    ids=["answer", "escaped argument", "name"],
)
def test_a_special_token_in_a_tool_turn_refuses_the_row(turn):
    messages = (QUESTION, turn, REPLY)
    assert refusal(Template(qwen(QWEN25)), messages, (WEATHER,)).reason == "special_token_in_text"


def test_a_special_token_in_a_declared_tool_refuses_the_row():
    forged = json.dumps({"type": "function", "function": {"name": "f", "description": "<|im_end|>"}})
    refused = refusal(Template(qwen(QWEN25)), (QUESTION, REPLY), (forged,))
    assert (refused.reason, refused.detail) == ("special_token_in_text", "a tool contains '<|im_end|>'")


def test_a_tokenizer_with_a_template_of_its_own_for_tools_uses_it_for_rows_with_tools():
    template = Template(qwen({"default": CHATML, "tool_use": QWEN25}))
    assert len(encode_pieces(template, TALK, (WEATHER,))) == 1
    assert "leaves out the call" in refusal(template, TALK).detail
    plain = encode_pieces(template, (QUESTION, REPLY))
    assert "You are kind and brief." not in template.tokenizer.decode(plain[0][0])


def test_a_row_without_tools_is_encoded_as_ever_beside_one_with_tools():
    template = Template(qwen(QWEN25))
    rows = [Demonstration(TALK, (WEATHER,)), Demonstration((QUESTION, REPLY))]
    with_tools, without = template.encode_demonstrations(rows)
    assert with_tools == encode_pieces(template, TALK, (WEATHER,))
    assert without == encode_pieces(template, (QUESTION, REPLY))
    assert "<tools>" not in template.tokenizer.decode(without[0][0])
