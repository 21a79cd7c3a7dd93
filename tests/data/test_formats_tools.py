"""Tools, their calls and what they answered become turns of one shape, in an order that is checked."""

import json

import pytest

from align.data.quality import check_record
from align.data.records import Demonstration, Message, PreferencePair, RowRefused, ToolCall
from tests.data.test_formats import AGAIN, ASK, REPLY, TALK, TOOL, WRAPPED, YES, converted, openai

CALL = '{"name": "find", "arguments": {"what": "é"}}'
ARGUMENTS = '{"what": "é"}'
FLOW = (
    ASK,
    Message("assistant", "", (ToolCall("find", ARGUMENTS),)),
    Message("tool", "[1]"),
    Message("assistant", "So."),
)


def test_sharegpt_calls_and_observations_are_turns():
    row = {
        "conversations": [
            {"from": "human", "value": "Why?"},
            {"from": "function_call", "value": CALL},
            {"from": "observation", "value": "[1]"},
            {"from": "gpt", "value": "So."},
        ],
        "tools": json.dumps([TOOL]),
    }
    assert converted("sharegpt", row, Demonstration) == [Demonstration(FLOW, (WRAPPED,))]
    row["conversations"][1]["value"] = f"[{CALL}, {CALL}]"
    (several,) = converted("sharegpt", row, Demonstration)
    assert several.messages[1].tool_calls == (ToolCall("find", ARGUMENTS),) * 2
    check_record(several)


@pytest.mark.parametrize("arguments", [ARGUMENTS, {"what": "é"}])
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("tools", [[TOOL], [{"type": "function", "function": TOOL}], [json.dumps(TOOL)]])
def test_openai_calls_are_read_with_their_ids(arguments, content, tools):
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": arguments}}
    row = {
        "messages": [
            {"role": "user", "content": "Why?", "tool_calls": None},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "content": "[1]", "tool_call_id": "c1", "name": "find"},
            {"role": "assistant", "content": "So.", "tool_calls": []},
        ],
        "tools": tools,
    }
    calls = Message("assistant", "", (ToolCall("find", ARGUMENTS, "c1"),))
    answer = Message("tool", "[1]", name="find", tool_call_id="c1")
    (found,) = converted("messages", row, Demonstration)
    assert found == Demonstration((ASK, calls, answer, FLOW[3]), (WRAPPED,))
    check_record(found)


def test_reasoning_and_calls_in_typed_parts_are_told_from_the_text():
    parts = [{"type": "reasoning", "value": "Hm."}, {"type": "text", "text": "Look."}]
    row = {
        "messages": [
            *openai(ASK),
            {"role": "assistant", "content": [*parts, {"type": "tool_call", "value": CALL}]},
            {"role": "tool", "content": [{"type": "text", "value": "[1]"}]},
            {"role": "assistant", "content": "So.", "reasoning_content": "Aha."},
        ]
    }
    calls = Message("assistant", "Look.", (ToolCall("find", ARGUMENTS),), "Hm.")
    (found,) = converted("messages", row, Demonstration)
    assert found.messages == (ASK, calls, FLOW[2], Message("assistant", "So.", reasoning="Aha."))
    check_record(found)
    thinking = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "So."}]
    (found,) = converted("messages", {"messages": [*openai(ASK), {"role": "assistant", "content": thinking}]}, None)
    assert found.messages[1] == Message("assistant", "So.", reasoning="Hm.")


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_are_written_in_many_ways(tools):
    assert converted("messages", {"messages": openai(*TALK), "tools": tools}, None) == [Demonstration(TALK)]


@pytest.mark.parametrize(
    "messages",
    [
        FLOW,
        FLOW[:2],
        (*FLOW[:3], FLOW[2], FLOW[3]),
        (*FLOW[:3], *FLOW[1:]),
        (*FLOW, AGAIN, YES),
    ],
    ids=["flow", "ends_on_a_call", "two_answers_of_tools", "two_calls", "goes_on"],
)
def test_turns_with_tools_are_in_order(messages):
    assert check_record(Demonstration(messages)) is None


@pytest.mark.parametrize(
    ("messages", "detail"),
    [
        ((ASK, FLOW[2], YES), "turn 2 is the tool's, not the assistant's"),
        ((ASK, YES, FLOW[2], YES), "turn 3 is the tool's, not the user's"),
        ((ASK, FLOW[1], YES), "the call of a tool before the answer is not answered"),
        ((ASK, FLOW[1], AGAIN, YES), "turn 3 is the user's, not the tool's, after a call of a tool"),
        ((*FLOW[:3], AGAIN, YES), "turn 4 is the user's, not the tool's or the assistant's"),
        ((FLOW[2], YES), "turn 1 is the tool's, not the user's"),
        (FLOW[:3], "the last turn is not the assistant's"),
        ((ASK, REPLY, YES), "the last turn before the answer is not the user's"),
    ],
)
def test_turns_with_tools_out_of_order_are_refused(messages, detail):
    with pytest.raises(RowRefused, match="roles_do_not_alternate") as refused:
        check_record(Demonstration(messages))
    assert refused.value.detail == detail


def test_answers_that_differ_in_their_calls_or_reasoning_differ():
    for other in (Message("assistant", "", (ToolCall("find", "{}"),)), FLOW[1]):
        check_record(PreferencePair((ASK,), Message("assistant", "", (ToolCall("get", "{}"),)), other))
    check_record(PreferencePair((ASK,), YES, Message("assistant", "Yes.", reasoning="Hm.")))
    with pytest.raises(RowRefused, match="chosen_equals_rejected"):
        check_record(PreferencePair((ASK,), FLOW[1], FLOW[1]))
