"""Real sets become exactly the records, and the refusals, that were counted in them by hand. Rows are 0-based."""

import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from align.config.schema import Ties
from align.data.canonical import canonical
from align.data.formats import as_records, find_format, named_format
from align.data.quality import check_record
from align.data.records import (
    Demonstration,
    PreferencePair,
    PromptRow,
    Ranking,
    RowRefused,
    TextDocument,
    Unpaired,
)

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL_DATA = Path(os.environ.get("ALIGN_REAL_DATA", DEFAULT))
pytestmark = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"no real data at {REAL_DATA}; name its folder with ALIGN_REAL_DATA"
)

HH = "hh_rlhf_harmless_test/test.jsonl.gz"
DEMO = "llamafactory_demo/"
RASBT = "rasbt_instruction/instruction-data-with-preference.json"
PANDALM = "pandalm_testset/testset-v1.json"
FINEGRAINED = "finegrained_rlhf_qa/dev_feedback.json"
TREES = "oasst_trees/en_100_tree.jsonl"
ALL_TIED = [181, 242, 283, 293, 308, 312, 322, 327, 340, 394, 425, 446]


def rows_of(path):
    path = REAL_DATA / path
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    text = gzip.open(path, "rt", encoding="utf-8").read() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    found = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [{"text": row} if isinstance(row, str) else row for row in found]


class Read:
    """A set as records: `good` and `bad` (reason -> rows), each with its row number."""

    def __init__(self, path, wanted, ties=Ties.keep, name=None):
        rows = rows_of(path)
        self.format = named_format(name, wanted, path) if name else find_format(rows[:100], wanted, path)
        self.good, self.bad = [], {}
        for number, row in enumerate(rows):
            for record in self.records(row, wanted, ties):
                try:
                    if isinstance(record, RowRefused):
                        raise record
                    check_record(record)
                    self.good.append((number, record))
                except RowRefused as error:
                    self.bad.setdefault(error.reason, []).append(number)

    def records(self, row, wanted, ties):
        try:
            return as_records(self.format, wanted, row, ties=ties)
        except RowRefused as error:
            return [error]


def test_hh_rows_that_cannot_be_pairs_are_the_known_ones():
    read = Read(HH, PreferencePair)
    assert read.format.name == "hh_rlhf"
    assert read.bad == {
        "empty_completion": [86, 516, 925, 1103],
        "prompts_differ": [1254, 1688, 1950, 1952, 2036],
        "roles_do_not_alternate": [667, 763, 1319, 1849],
    }
    assert len(read.good) == 2299


def test_hh_answers_are_what_follows_the_last_marker_of_an_assistant():
    rows = rows_of(HH)
    for number, pair in Read(HH, PreferencePair).good:
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            assert answer.content == rows[number][side].rsplit("\n\nAssistant:", 1)[1].strip()
        words = " ".join(message.content for message in (*pair.prompt, pair.chosen)).split()
        assert words == rows[number]["chosen"].replace("\n\nHuman:", " ").replace("\n\nAssistant:", " ").split()


def test_hh_prompts_have_the_counted_turns():
    prompts = [record.messages for _, record in Read(HH, PromptRow).good]
    turns = Counter(sum(message.role == "user" for message in messages) for messages in prompts)
    # Of the counted 661, 581, 590, 354 and 111 (5 to 8), and 15 longer ones, nine rows are refused.
    assert [turns[count] for count in range(1, 5)] == [661, 580, 589, 354]
    assert sum(turns[count] for count in range(5, 9)) == 110
    assert turns.total() == 2312 - 9


@pytest.mark.parametrize(("language", "with_system"), [("en", 80), ("zh", 64)])
def test_sharegpt_pairs_keep_their_system_turns(language, with_system):
    read = Read(f"{DEMO}dpo_{language}_demo.json", PreferencePair)
    assert (read.format.name, len(read.good), read.bad) == ("preference_sharegpt", 300, {})
    assert sum(pair.prompt[0].role == "system" for _, pair in read.good) == with_system
    if language == "en":
        longer = [number for number, pair in read.good if sum(m.role != "system" for m in pair.prompt) == 3]
        assert longer == [267]


def test_unpaired_answers_are_half_desirable():
    read = Read(f"{DEMO}kto_en_demo.json", None)
    assert (read.format.name, read.bad) == ("unpaired", {})
    assert Counter(record.desirable for _, record in read.good) == {True: 150, False: 150}
    one_word = [number for number, record in read.good if len(record.completion.content.split()) == 1]
    assert one_word == [97, 116, 119, 193, 209, 256, 283, 299]
    read = Read(f"{DEMO}kto_en_demo.json", Demonstration)
    assert (len(read.good), {reason: len(rows) for reason, rows in read.bad.items()}) == (150, {"undesirable": 150})


def test_sharegpt_calls_are_all_read():
    read = Read(f"{DEMO}glaive_toolcall_en_demo.json", Demonstration)
    assert (read.format.name, len(read.good), read.bad) == ("sharegpt", 300, {})
    messages = [message for _, record in read.good for message in record.messages]
    assert sum(len(message.tool_calls) for message in messages) == 211
    assert sum(message.role == "tool" for message in messages) == 211
    assert sum(not record.tools for _, record in read.good) == 109
    assert all(isinstance(json.loads(call.arguments), dict) for message in messages for call in message.tool_calls)


def test_typed_parts_with_reasoning_and_calls_are_all_read():
    path = f"{DEMO}reason_tool_use_demo_50.jsonl"
    read = Read(path, Demonstration)
    assert (read.format.name, len(read.good), read.bad) == ("messages", 50, {})
    parts = Counter(p["type"] for row in rows_of(path) for message in row["messages"] for p in message["content"])
    messages = [message for _, record in read.good for message in record.messages]
    assert sum(len(message.tool_calls) for message in messages) == parts["tool_call"] > 50
    assert sum(bool(message.reasoning) for message in messages) == parts["reasoning"] > 50
    assert sum(bool(record.tools) for _, record in read.good) == sum(row["tools"] != "[]" for row in rows_of(path))


@pytest.mark.parametrize(
    ("path", "row_format", "wanted", "rows"),
    [
        (f"{DEMO}v1_sft_demo.jsonl", "messages", Demonstration, 500),
        (f"{DEMO}v1_dpo_demo.jsonl", "preference_implicit", PreferencePair, 10),
        (f"{DEMO}identity.json", "alpaca", Demonstration, 91),
        (f"{DEMO}c4_demo.jsonl", "text", TextDocument, 300),
        ("rasbt_instruction/instruction-data.json", "alpaca", Demonstration, 1100),
        ("rasbt_instruction/instruction-examples.json", "alpaca", Demonstration, 200),
        ("hhh_alignment/hhh_alignment_eval.json", "judge_prompts", PreferencePair, 221),
        ("self_instruct/seed_tasks.jsonl", "self_instruct", Demonstration, 175),
        ("self_instruct/user_oriented_instructions.jsonl", "self_instruct", Demonstration, 252),
        ("gsm8k/test.jsonl", "question_answer", Demonstration, 1319),
        ("gsm8k/train.jsonl", "question_answer", Demonstration, 2000),
        ("mt_bench/dummy_conversation.json", "sharegpt", Demonstration, 500),
        ("mt_bench/fastchat__llm_judge__data__mt_bench__question.jsonl", "turns", PromptRow, 80),
        ("mt_bench/fastchat__llm_judge__data__vicuna_bench__question.jsonl", "turns", PromptRow, 80),
        ("oasst_trees/prompt_lottery_en_250_text.jsonl", "text", PromptRow, 250),
        ("ifeval/en_input_data.jsonl", "prompts", PromptRow, 541),
        ("xstest/xstest_prompts.csv", "prompts", PromptRow, 450),
        ("xstest/xstest_v2_completions_gpt4.csv", "prompt_completion", Demonstration, 450),
        ("advbench/harmful_behaviors.csv", "goal", PromptRow, 520),
        ("advbench/harmbench.csv", "goal", PromptRow, 100),
        ("advbench/jailbreakbench.csv", "goal", PromptRow, 100),
    ],
)
def test_a_clean_set_loses_no_row(path, row_format, wanted, rows):
    read = Read(path, wanted)
    assert (read.format.name, len(read.good), read.bad) == (row_format, rows, {})
    assert all(type(record) is wanted for _, record in read.good)


def test_prompts_with_turns_inside_a_judge_prompt_are_conversations():
    turns = Counter(len(pair.prompt) for _, pair in Read("hhh_alignment/hhh_alignment_eval.json", PreferencePair).good)
    assert turns[1] == 221 - 41
    assert all(count % 2 for count in turns)


def test_pandalm_votes_are_counted():
    read = Read(PANDALM, PreferencePair)
    assert read.format.name == "votes"
    assert read.bad["wrong_type"] == [157, 158, 159, 161, 162, 164]
    assert read.bad["empty_completion"][:9] == [18, 19, 25, 301, 303, 305, 364, 365, 508]
    assert len(read.bad["empty_completion"]) == 54
    assert len(read.good) == 999 - 6 - 54


def test_pandalm_majorities_are_the_counted_ones_before_any_row_is_refused():
    rows = [row | {"response1": "a", "response2": "b"} for row in rows_of(PANDALM)]
    row_format = find_format(rows, PreferencePair, PANDALM)
    pairs = [as_records(row_format, PreferencePair, row, ties=Ties.keep)[0] for row in rows]
    assert Counter("tie" if pair.tie else pair.chosen.content for pair in pairs) == {"a": 422, "b": 472, "tie": 105}
    unanimous = [pair for pair in pairs if pair.p == 1.0 or (pair.tie and pair.p == 0.5)]
    assert len(unanimous) == 879
    dropped = [as_records(row_format, PreferencePair, row, ties=Ties.drop)[0] for row in rows]
    assert sum(isinstance(record, RowRefused) and record.reason == "tie" for record in dropped) == 105


def test_rasbt_identical_pairs_are_the_known_ones():
    read = Read(RASBT, PreferencePair)
    assert (read.format.name, len(read.good)) == ("preference_alpaca", 1094)
    assert read.bad == {"chosen_equals_rejected": [122, 226, 400, 566, 628, 676]}
    assert len(Read(RASBT, Demonstration, name="alpaca").good) == 1100


def test_finegrained_labels_are_six_pairs_a_row():
    rows, read = rows_of(FINEGRAINED), Read(FINEGRAINED, PreferencePair)
    assert (read.format.name, len(read.good), read.bad) == ("pairwise_labels", 3000, {})
    ties = Counter(number for number, pair in read.good if pair.tie)
    assert ties.total() == 384
    assert [number for number, count in ties.items() if count == 6] == ALL_TIED
    predictions = [[row[f"prediction {index}"] for index in range(1, 5)] for row in rows]
    won = Counter(
        predictions[number].index(pair.chosen.content) < predictions[number].index(pair.rejected.content)
        for number, pair in read.good
        if not pair.tie
    )
    assert won == {True: 1577, False: 1039}
    assert all(pair.prompt[0].content.endswith(rows[number]["question"]) for number, pair in read.good)
    assert len(Read(FINEGRAINED, PromptRow).good) == 500


def test_finegrained_rows_without_one_best_prediction_are_no_demonstrations():
    read = Read(FINEGRAINED, Demonstration)
    assert len(read.good) + len(read.bad["tie"]) == 500
    assert set(ALL_TIED) < set(read.bad["tie"])


@pytest.mark.parametrize("path", [TREES, "oasst_trees/en_100_message.jsonl"])
def test_oasst_branches_are_rankings_and_rankings_are_pairs(path):
    rankings, pairs = Read(path, None), Read(path, PreferencePair)
    assert (rankings.format.name, len(rankings.good), len(pairs.good)) == ("oasst_tree", 211, 751)
    assert all(type(record) is Ranking for _, record in rankings.good)
    assert rankings.bad == pairs.bad == {"unranked": [58, 69, 69]}
    assert not any(pair.tie for _, pair in pairs.good)
    assert len(Read(path, PromptRow).good) == 100


def test_an_oasst_tree_is_one_conversation():
    read = Read(TREES, Demonstration)
    assert read.bad == {"unranked": [69]}
    rows = rows_of(TREES)
    for number, record in read.good:
        replies = rows[number]["prompt"]["replies"]
        best = min(replies, key=lambda reply: reply.get("rank") or 0)
        assert record.messages[1].content == best["text"]


def test_llmbar_labels_count_answers_from_one():
    rows, read = rows_of("llmbar/Dataset__LLMBar__Natural__dataset.json"), None
    read = Read("llmbar/Dataset__LLMBar__Natural__dataset.json", PreferencePair)
    assert (read.format.name, len(read.good), read.bad) == ("comparison_label", 100, {})
    assert Counter(pair.chosen.content == rows[number]["output_1"] for number, pair in read.good) == {
        True: 42,
        False: 58,
    }


def test_records_of_unpaired_rows_are_unpaired():
    assert all(type(record) is Unpaired for _, record in Read(f"{DEMO}kto_en_demo.json", None).good)


@pytest.mark.parametrize(
    ("path", "row_format"),
    [
        (HH, "preference"),
        (f"{DEMO}glaive_toolcall_en_demo.json", "messages"),
        (f"{DEMO}reason_tool_use_demo_50.jsonl", "messages"),
        (f"{DEMO}kto_en_demo.json", "unpaired"),
        (f"{DEMO}c4_demo.jsonl", "text"),
        (PANDALM, "preference"),
        (FINEGRAINED, "preference"),
        (TREES, "ranking"),
        ("advbench/harmbench.csv", "prompts"),
    ],
)
def test_converted_records_are_read_back_as_they_were(path, row_format):
    rows = [canonical(record) for _, record in Read(path, None).good]
    found = find_format(rows[:100], None, path)
    assert found.name == row_format
    again = [as_records(found, None, json.loads(json.dumps(row)), ties=Ties.keep) for row in rows]
    assert [[canonical(record) for record in records] for records in again] == [[row] for row in rows]
