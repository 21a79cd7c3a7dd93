"""Each format is found by its fields and read into the same records; what fits two, or none, is refused by name."""

import pytest

from align.config.errors import UserError
from align.data.formats import FORMATS, find_format, named_format, to_demonstration, to_prompt
from align.data.quality import check_demonstration, check_pair, check_prompt
from align.data.reading import split_transcript
from align.data.records import Demonstration, Message, PreferencePair, PromptRow, RowRefused, TextDocument

SYSTEM, ASK, REPLY, AGAIN = (
    Message("system", "Be kind."),
    Message("user", "Why?"),
    Message("assistant", "So."),
    Message("user", "Really?"),
)
YES, NO = Message("assistant", "Yes."), Message("assistant", "No.")


def openai(*messages):
    return [message.as_dict() for message in messages]


def sharegpt(*messages):
    words = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": words[message.role], "value": message.content} for message in messages]


def typed(*messages):
    return [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in messages]


TALK = (ASK, REPLY, AGAIN, YES)
PAIR = PreferencePair((ASK, REPLY, AGAIN), YES, NO)
EXAMPLES = [
    ("text", {"text": "Once."}, TextDocument("Once.")),
    ("alpaca", {"instruction": "Why?", "input": "", "output": "Yes."}, Demonstration((ASK, YES))),
    (
        "alpaca",
        {"instruction": "Add", "input": "1 1", "output": "2", "system": "Be kind.", "history": [["Why?", "So."]]},
        Demonstration((SYSTEM, ASK, REPLY, Message("user", "Add\n1 1"), Message("assistant", "2"))),
    ),
    ("sharegpt", {"id": 1, "conversations": sharegpt(SYSTEM, *TALK)}, Demonstration((SYSTEM, *TALK))),
    ("sharegpt", {"conversations": sharegpt(*TALK), "system": "Be kind."}, Demonstration((SYSTEM, *TALK))),
    ("messages", {"messages": openai(SYSTEM, *TALK)}, Demonstration((SYSTEM, *TALK))),
    ("messages", {"messages": typed(*TALK), "tools": "[]"}, Demonstration(TALK)),
    ("prompt_completion", {"prompt": "Why?", "completion": "Yes."}, Demonstration((ASK, YES))),
    ("prompt_completion", {"prompt": openai(*TALK[:3]), "completion": openai(YES)}, Demonstration(TALK)),
    ("question_answer", {"question": "Why?", "answer": "Yes."}, Demonstration((ASK, YES))),
    ("preference", {"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}, PreferencePair((ASK,), YES, NO)),
    ("preference", {"prompt": openai(*TALK[:3]), "chosen": openai(YES), "rejected": openai(NO)}, PAIR),
    (
        "preference_alpaca",
        {"instruction": "Why?", "input": "", "chosen": "Yes.", "rejected": "No."},
        PreferencePair((ASK,), YES, NO),
    ),
    (
        "preference_sharegpt",
        {"conversations": sharegpt(*TALK[:3]), "chosen": sharegpt(YES)[0], "rejected": sharegpt(NO)[0]},
        PAIR,
    ),
    ("preference_implicit", {"chosen": openai(*TALK), "rejected": openai(*TALK[:3], NO)}, PAIR),
    ("preference_implicit", {"prompt": "Why?", "chosen": openai(*TALK), "rejected": openai(*TALK[:3], NO)}, PAIR),
    ("preference_implicit", {"chosen_messages": typed(*TALK), "rejected_messages": typed(*TALK[:3], NO)}, PAIR),
    (
        "hh_rlhf",
        {
            "chosen": "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Really?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Really?\n\nAssistant: No.",
        },
        PAIR,
    ),
    ("prompts", {"prompt": "Why?", "kind": "helpful"}, (ASK,)),
    ("prompts", {"prompt": openai(*TALK[:3]), "kind": "helpful"}, TALK[:3]),
]
ids = [f"{name}-{index}" for index, (name, _, _) in enumerate(EXAMPLES)]


@pytest.mark.parametrize(("name", "row", "record"), EXAMPLES, ids=ids)
def test_a_format_is_found_and_read(name, row, record):
    row_format = find_format([row], FORMATS[name].record, "data.x")
    assert row_format.name == name
    if name == "prompts":
        record = PromptRow(record, row)
    assert row_format.read(row) == record


def test_every_format_has_an_example_here():
    assert {name for name, _, _ in EXAMPLES} == set(FORMATS)


def test_the_format_is_the_one_of_most_rows_when_some_lack_a_field():
    rows = [{"text": "a"}, {"txt": "b"}, {"text": "c"}]
    assert find_format(rows, TextDocument, "data.text").name == "text"


def test_two_formats_that_fit_are_both_named_with_the_way_out():
    row = {"instruction": "a", "input": "", "output": "b", "chosen": "b", "rejected": "c"}
    message = "data.demonstrations=x: the rows can be read as alpaca or preference_alpaca; say which with format=alpaca"
    with pytest.raises(UserError, match=message):
        find_format([row], Demonstration, "data.demonstrations=x")
    assert find_format([row], PreferencePair, "data.preferences=x").name == "preference_alpaca"


def test_rows_that_fit_no_format_show_their_fields():
    with pytest.raises(UserError, match=r"no format fits rows with the fields idx, response1; known here: preference"):
        find_format([{"idx": 1, "response1": "a"}], PreferencePair, "data.preferences=x")


def test_unpaired_rows_are_not_taken_for_demonstrations():
    with pytest.raises(UserError, match="no format fits"):
        find_format([{"messages": openai(*TALK), "label": False}], Demonstration, "data.demonstrations=x")


def test_a_format_is_refused_by_name_with_a_near_match_and_by_kind():
    with pytest.raises(UserError, match=r"there is no format sharegtp .*did you mean sharegpt"):
        named_format("sharegtp", Demonstration, "data.demonstrations")
    with pytest.raises(UserError, match="rows in format alpaca cannot be used here; formats that can: preference"):
        named_format("alpaca", PreferencePair, "data.preferences")


def test_pairs_become_demonstrations_and_everything_becomes_prompts():
    assert to_demonstration(PAIR) == Demonstration(TALK)
    row = {"id": 1}
    assert to_prompt(PAIR, row) == PromptRow(TALK[:3], row)
    assert to_prompt(Demonstration(TALK), row) == PromptRow(TALK[:3], row)
    assert to_prompt(Demonstration(TALK[:3]), row) == PromptRow(TALK[:3], row)


def reason(name, row):
    with pytest.raises(RowRefused) as refused:
        record = FORMATS[name].read(row)
        check = {Demonstration: check_demonstration, PreferencePair: check_pair, PromptRow: check_prompt}
        check[type(record)](record)
    return refused.value.reason


PREFERENCE = {"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("preference", {"prompt": "Why?", "chosen": "Yes."}, "missing_field"),
        ("preference", PREFERENCE | {"rejected": None}, "missing_field"),
        ("preference", PREFERENCE | {"rejected": True}, "wrong_type"),
        ("preference", PREFERENCE | {"rejected": 3.5}, "wrong_type"),
        ("preference", PREFERENCE | {"rejected": ""}, "empty_completion"),
        ("preference", PREFERENCE | {"chosen": " \n"}, "empty_completion"),
        ("preference", PREFERENCE | {"prompt": ""}, "empty_prompt"),
        ("preference", PREFERENCE | {"rejected": " Yes.\n"}, "chosen_equals_rejected"),
        ("preference", PREFERENCE | {"chosen": openai(YES, ASK)}, "wrong_type"),
        ("preference", PREFERENCE | {"chosen": openai(ASK)}, "roles_do_not_alternate"),
        ("preference", PREFERENCE | {"prompt": openai(ASK, REPLY)}, "roles_do_not_alternate"),
        ("preference", PREFERENCE | {"prompt": openai(ASK, AGAIN)}, "roles_do_not_alternate"),
        ("preference", PREFERENCE | {"prompt": openai(REPLY, ASK)}, "roles_do_not_alternate"),
        ("preference", PREFERENCE | {"prompt": openai(ASK, SYSTEM, ASK)}, "roles_do_not_alternate"),
        ("preference", PREFERENCE | {"prompt": openai(SYSTEM)}, "empty_prompt"),
        ("preference", PREFERENCE | {"prompt": []}, "empty_prompt"),
        ("preference", PREFERENCE | {"tools": '[{"name": "search"}]'}, "tools_not_supported"),
        ("preference_implicit", {"chosen": openai(*TALK), "rejected": openai(ASK, NO)}, "prompts_differ"),
        ("preference_implicit", {"chosen": [], "rejected": openai(ASK, NO)}, "empty_completion"),
        ("messages", {"messages": openai(ASK)}, "roles_do_not_alternate"),
        ("messages", {"messages": []}, "roles_do_not_alternate"),
        ("messages", {"messages": "Why?"}, "wrong_type"),
        ("messages", {"messages": ["Why?"]}, "wrong_type"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "wrong_type"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "unknown_role"),
        ("messages", {"messages": [{"content": "x"}]}, "missing_field"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "wrong_type"),
        ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "tools_not_supported"),
        ("messages", {"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "weight_not_supported"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["only one"]]}, "wrong_type"),
        ("hh_rlhf", {"chosen": "no turns", "rejected": "\n\nHuman: a"}, "not_a_transcript"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(name, row, expected):
    assert reason(name, row) == expected


def test_transcripts_are_split_at_turn_borders_only():
    text = "\n\nHuman: Is it Human: or\nAssistant: here?\n\nAssistant:  Human: no.\n\n\nHuman: ok\n\nAssistant:"
    assert split_transcript(text) == (
        Message("user", "Is it Human: or\nAssistant: here?"),
        Message("assistant", "Human: no."),
        Message("user", "ok"),
        Message("assistant", ""),
    )


def test_the_shared_opening_of_two_answers_is_no_prompt():
    opening = "\n\nHuman: Why?\n\nAssistant: I th"
    pair = FORMATS["hh_rlhf"].read({"chosen": opening + "ink so", "rejected": opening + "ank you"})
    assert pair == PreferencePair((ASK,), Message("assistant", "I think so"), Message("assistant", "I thank you"))
