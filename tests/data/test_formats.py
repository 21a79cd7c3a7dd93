"""Each format is found by its fields and read into the same records; what fits two, or none, is refused by name."""

import json
import re

import pytest

from align.config.errors import UserError
from align.config.schema import Ties
from align.data.formats import FORMATS, as_records, find_format, named_format
from align.data.quality import check_record
from align.data.reading import split_transcript
from align.data.records import (
    Demonstration,
    Message,
    PreferencePair,
    PromptRow,
    RowRefused,
    TextDocument,
    Unpaired,
)
from tests.conftest import REPO
from tests.data import test_formats_ranked

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


def judged(instruction, answer):
    return (
        f"###Task Description:\nJudge.\n\n###The instruction to evaluate:\n{instruction}\n\n"
        f"###Response to evaluate:\n{answer}\n\n###Score Rubrics:\n[Is it good?]\n\n###Feedback: "
    )


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
    ("labelled", {"text": "Why?", "label": "Yes."}, Demonstration((ASK, YES))),
    ("labelled", {"text": "Why?", "label": 3, "id": 1}, Demonstration((ASK, Message("assistant", "3")))),
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
    (
        "judge_prompts",
        {"chosen_instruction": judged("Why?", "Yes."), "rejected_instruction": judged("Why?", "No.")},
        PreferencePair((ASK,), YES, NO),
    ),
    (
        "judge_prompts",
        {
            "chosen_instruction": judged("Why?\n\nAssistant: So.\n\nHuman: Really?", "Yes."),
            "rejected_instruction": judged("Why?\n\nAssistant: So.\n\nHuman: Really?", "No."),
        },
        PAIR,
    ),
    (
        "self_instruct",
        {"instruction": "Add", "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "0"}]},
        [
            Demonstration((Message("user", "Add\n1 1"), Message("assistant", "2"))),
            Demonstration((Message("user", "Add"), Message("assistant", "0"))),
        ],
    ),
    ("unpaired", {"prompt": "Why?", "completion": "Yes.", "label": True}, Unpaired((ASK,), YES, True)),
    ("unpaired", {"messages": openai(*TALK), "label": False}, Unpaired(TALK[:3], YES, False)),
    ("unpaired", {"conversations": sharegpt(*TALK), "label": False}, Unpaired(TALK[:3], YES, False)),
    ("prompts", {"prompt": "Why?", "kind": "helpful"}, PromptRow((ASK,))),
    ("prompts", {"prompt": openai(*TALK[:3]), "kind": "helpful"}, PromptRow(TALK[:3])),
    ("turns", {"turns": ["Why?", "Really?"]}, PromptRow((ASK,))),
    ("goal", {"Goal": "Why?", "Target": "Yes."}, PromptRow((ASK,))),
    ("goal", {"goal": "Why?"}, PromptRow((ASK,))),
]
ids = [f"{name}-{index}" for index, (name, _, _) in enumerate(EXAMPLES)]


@pytest.mark.parametrize(("name", "row", "expected"), EXAMPLES, ids=ids)
def test_a_format_is_found_and_read(name, row, expected):
    row_format = find_format([row], None, "data.x")
    assert row_format.name == name
    if isinstance(expected, PromptRow):
        expected = PromptRow(expected.messages, row)
    assert as_records(row_format, None, row, ties=Ties.keep) == (expected if isinstance(expected, list) else [expected])


def test_labelled_rows_are_documents_where_documents_are_wanted():
    rows = [{"text": "Why?", "label": "doubt"}]
    assert find_format(rows, TextDocument, "data.text").name == "text"
    assert find_format(rows, Demonstration, "data.demonstrations").name == "labelled"
    assert find_format([{"text": "Why?", "label": True}], None, "data.x").name == "text"


def test_every_format_has_an_example():
    assert {name for name, _, _ in [*EXAMPLES, *test_formats_ranked.EXAMPLES]} == set(FORMATS)


DOCUMENT = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^\| `(\w+)` \| `({.*?})` \| ", DOCUMENT, re.MULTILINE)


def test_the_document_shows_every_format_once():
    assert [name for name, _ in DOCUMENTED] == list(FORMATS)


@pytest.mark.parametrize(("name", "text"), DOCUMENTED)
def test_a_row_of_the_document_is_found_and_sound(name, text):
    row = json.loads(text)
    assert find_format([row], None, "docs").name == name
    for record in as_records(FORMATS[name], None, row, ties=Ties.keep):
        check_record(record)


def test_the_document_explains_every_reason_that_a_reader_gives():
    readers = [*(REPO / "align" / "data").glob("reading*.py")]
    readers += [REPO / "align" / "data" / f"{name}.py" for name in ("fields", "quality", "converting")]
    code = "".join(file.read_text(encoding="utf-8") for file in readers)
    given = set(re.findall(r'RowRefused\(\s*"(\w+)"', code)) | {"bad_tools", "bad_tool_call"}
    explained = re.findall(r"^\| `(\w+)` \|", DOCUMENT.split("### Why a row is refused")[1], re.MULTILINE)
    assert given <= set(explained)


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


def test_unpaired_rows_are_no_demonstrations_of_the_undesirable_and_no_pairs():
    row = {"messages": openai(*TALK), "label": False}
    row_format = find_format([row], Demonstration, "data.demonstrations=x")
    (refused,) = as_records(row_format, Demonstration, row, ties=Ties.keep)
    assert refused.reason == "undesirable"
    assert as_records(row_format, Demonstration, row | {"label": True}, ties=Ties.keep) == [Demonstration(TALK)]
    for find in (
        lambda: find_format([row], PreferencePair, "p"),
        lambda: named_format("unpaired", PreferencePair, "p"),
    ):
        with pytest.raises(UserError, match=r"p: the rows are unpaired: .* They teach KTO, not pairs"):
            find()


def test_a_format_is_refused_by_name_with_a_near_match_and_by_kind():
    with pytest.raises(UserError, match=r"there is no format sharegtp .*did you mean sharegpt"):
        named_format("sharegtp", Demonstration, "data.demonstrations")
    with pytest.raises(UserError, match="rows in format alpaca cannot be used here; formats that can: preference"):
        named_format("alpaca", PreferencePair, "data.preferences")
    with pytest.raises(UserError, match="rows in format messages cannot be used here; formats that can: preference"):
        find_format([{"messages": openai(*TALK)}], PreferencePair, "data.preferences")


def converted(name, row, wanted):
    return as_records(named_format(name, wanted, "data.x"), wanted, row, ties=Ties.keep)


def test_pairs_become_demonstrations_and_everything_becomes_prompts():
    pair = {"prompt": openai(*TALK[:3]), "chosen": "Yes.", "rejected": "No."}
    assert converted("preference", pair, Demonstration) == [Demonstration(TALK)]
    assert converted("preference", pair, PromptRow) == [PromptRow(TALK[:3], pair)]
    for messages in (TALK, TALK[:3]):
        row = {"messages": openai(*messages)}
        assert converted("messages", row, PromptRow) == [PromptRow(TALK[:3], row)]
    assert converted("text", {"text": "Why?"}, PromptRow) == [PromptRow((ASK,), {"text": "Why?"})]
    unpaired = {"prompt": "Why?", "completion": "No.", "label": False}
    assert converted("unpaired", unpaired, PromptRow) == [PromptRow((ASK,), unpaired)]


def test_instances_with_one_prompt_are_one_prompt():
    row = {"instruction": "Why?", "instances": [{"output": "Yes."}, {"output": "No."}]}
    assert converted("self_instruct", row, PromptRow) == [PromptRow((ASK,), row)]


def test_what_a_pair_says_besides_is_kept():
    row = PREFERENCE | {"margin": 2, "p": 0.75, "tools": [TOOL]}
    expected = PreferencePair((ASK,), YES, NO, p=0.75, margin=2.0, tools=(WRAPPED,))
    assert converted("preference", row, PreferencePair) == [expected]


@pytest.mark.parametrize(
    ("says_so", "scores"), [({"score_chosen": 3, "score_rejected": 3.0}, (3.0, 3.0)), ({"tie": True}, None)]
)
def test_a_tie_is_kept_as_a_half_or_left_out_and_never_a_demonstration(says_so, scores):
    row = PREFERENCE | says_so
    tie = PreferencePair((ASK,), YES, NO, p=0.5, tie=True, scores=scores)
    assert as_records(FORMATS["preference"], PreferencePair, row, ties=Ties.keep) == [tie]
    for wanted, ties in ((PreferencePair, Ties.drop), (Demonstration, Ties.keep)):
        (refused,) = as_records(FORMATS["preference"], wanted, row, ties=ties)
        assert refused.reason == "tie"


TOOL = {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}
WRAPPED = (
    '{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}}'
)


def reason(name, row):
    with pytest.raises(RowRefused) as refused:
        for record in as_records(FORMATS[name], None, row, ties=Ties.keep):
            check_record(record)
    return refused.value.reason


def calling(value):
    return {"messages": [*openai(ASK), {"role": "assistant", "content": "", "tool_calls": value}]}


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
        ("preference", PREFERENCE | {"tools": "search"}, "bad_tools"),
        ("preference", PREFERENCE | {"tools": [{"description": "no name"}]}, "bad_tools"),
        ("preference", PREFERENCE | {"tools": {"name": "search"}}, "bad_tools"),
        ("preference", PREFERENCE | {"margin": "wide"}, "wrong_type"),
        ("preference", PREFERENCE | {"p": 0.2}, "bad_probability"),
        ("preference", PREFERENCE | {"tie": "no"}, "wrong_type"),
        ("preference", PREFERENCE | {"score_chosen": 1, "score_rejected": 2}, "scores_contradict"),
        ("preference", PREFERENCE | {"chosen": "half \ud800"}, "not_unicode"),
        ("preference_implicit", {"chosen": openai(*TALK), "rejected": openai(ASK, NO)}, "prompts_differ"),
        ("preference_implicit", {"chosen": [], "rejected": openai(ASK, NO)}, "empty_completion"),
        ("messages", {"messages": openai(ASK)}, "roles_do_not_alternate"),
        ("messages", {"messages": []}, "roles_do_not_alternate"),
        ("messages", {"messages": "Why?"}, "wrong_type"),
        ("messages", {"messages": ["Why?"]}, "wrong_type"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "wrong_type"),
        ("messages", {"messages": [{"role": "critic", "content": "x"}]}, "unknown_role"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "roles_do_not_alternate"),
        ("messages", {"messages": [{"content": "x"}]}, "missing_field"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "wrong_type"),
        ("messages", calling([1]), "bad_tool_call"),
        ("messages", calling([{"name": "find"}]), "bad_tool_call"),
        ("messages", calling([{"name": "find", "arguments": "[1]"}]), "bad_tool_call"),
        ("messages", calling([{"name": "find", "arguments": "{what"}]), "bad_tool_call"),
        ("messages", calling([{"name": "find", "arguments": {"what": float("nan")}}]), "bad_tool_call"),
        ("messages", calling([{"name": "", "arguments": {}}]), "bad_tool_call"),
        ("messages", {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "bad_tool_call"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "thinking", "value": "x"}]}]}, "wrong_type"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "find"}]}, "bad_tool_call"),
        ("unpaired", {"prompt": "Why?", "completion": "Yes.", "label": 1}, "wrong_type"),
        ("unpaired", {"prompt": "Why?", "completion": "", "label": True}, "empty_completion"),
        ("unpaired", {"messages": [], "label": True}, "empty_completion"),
        ("self_instruct", {"instruction": "a", "instances": []}, "missing_field"),
        ("self_instruct", {"instruction": "a", "instances": ["b"]}, "wrong_type"),
        ("turns", {"turns": []}, "empty_prompt"),
        ("turns", {"turns": [1]}, "wrong_type"),
        ("goal", {"Goal": ""}, "empty_prompt"),
        ("text", {"text": " "}, "empty_text"),
        (
            "judge_prompts",
            {"chosen_instruction": judged("a", "b"), "rejected_instruction": judged("c", "b")},
            "prompts_differ",
        ),
        ("judge_prompts", {"chosen_instruction": "a", "rejected_instruction": judged("c", "b")}, "not_a_judge_prompt"),
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
