"""Rows of a reward model: pairs as trees of two, rankings whole, every answer ending in its stop token."""

import json

import pytest

from align.config.schema import DataConfig, OnBadRows, Ties
from align.data.encoded import answer_lengths, largest_token
from align.data.prepare import answered_prompts, prepare_comparisons, prepare_preferences
from align.data.template import Template
from tests.data.chat_tokenizers import chatml


@pytest.fixture(scope="module")
def template():
    return Template(chatml())


def ranking(number, answers=3):
    words = ["Yes", "No", "Perhaps", "Never"][:answers]
    return {"prompt": f"Question {number}?", "completions": words, "ranks": list(range(answers))[::-1]}


def pair(number, **keys):
    return {"prompt": f"Question {number}?", "chosen": "Yes, it is.", "rejected": "No."} | keys


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(path, template, **keys):
    return prepare_comparisons(DataConfig(preferences=path, held_out_fraction=0.0, **keys), template, 64, None)


def test_a_ranking_stays_whole_with_its_ranks(tmp_path, template):
    path = write(tmp_path / "rows.jsonl", [ranking(0), ranking(1, answers=4)])
    rows = list(prepared(path, template).train)
    decode = template.tokenizer.decode
    assert [[decode(ids) for ids in row["completion_ids"]] for row in rows] == [
        ["Yes<|im_end|>", "No<|im_end|>", "Perhaps<|im_end|>"],
        ["Yes<|im_end|>", "No<|im_end|>", "Perhaps<|im_end|>", "Never<|im_end|>"],
    ]
    assert [row["ranks"] for row in rows] == [[2, 1, 0], [3, 2, 1, 0]]


def test_a_pair_is_a_tree_of_two_with_its_probability_and_margin(tmp_path, template):
    path = write(tmp_path / "rows.jsonl", [pair(0, p=0.75, margin=2.0), pair(1)])
    trees = list(prepared(path, template).train)
    assert [(row["ranks"], row["p"], row["margin"]) for row in trees] == [([0, 1], 0.75, 2.0), ([0, 1], 1.0, 0.0)]
    pairs = prepare_preferences(DataConfig(preferences=path, held_out_fraction=0.0), template, 64, None).train
    assert [row["completion_ids"] for row in trees] == [[row["chosen_ids"], row["rejected_ids"]] for row in pairs]
    assert [row["prompt_ids"] for row in trees] == pairs["prompt_ids"][:]


def test_ties_of_pairs_are_dropped_on_request_and_those_of_rankings_kept(tmp_path, template):
    rows = [{"prompt": "Which?", "completions": ["A one", "A two", "B"], "ranks": [0, 0, 1]}]
    path = write(tmp_path / "ranked.jsonl", rows)
    assert [row["ranks"] for row in prepared(path, template, ties=Ties.drop).train] == [[0, 0, 1]]
    path = write(tmp_path / "pairs.jsonl", [pair(0, tie=True, p=0.5), pair(1)])
    assert prepared(path, template, ties=Ties.drop).report.dropped == {"tie": 1}
    assert len(prepared(path, template).train) == 2


def test_a_tree_is_as_long_as_its_prompt_with_the_longest_answer(tmp_path, template):
    long = {"prompt": "Q?", "completions": ["Yes", "no " * 100], "ranks": [0, 1]}
    path = write(tmp_path / "rows.jsonl", [ranking(0), long])
    data = DataConfig(preferences=path, held_out_fraction=0.0, on_bad_rows=OnBadRows.drop)
    found = prepare_comparisons(data, template, 64, None)
    assert found.report.dropped == {"too_long": 1}
    every, longest = answer_lengths(found.train)
    [row] = found.train
    assert every.tolist() == [len(ids) for ids in row["completion_ids"]]
    assert longest.tolist() == [max(every)]
    assert largest_token(found.train) == max(max(ids) for ids in [row["prompt_ids"], *row["completion_ids"]])


def test_demonstrations_are_answered_prompts_up_to_a_number_and_a_length(tmp_path, template):
    rows = [{"prompt": f"Question {n}?", "completion": "long " * 100 if n == 1 else f"Answer {n}"} for n in range(10)]
    data = DataConfig(demonstrations=write(tmp_path / "rows.jsonl", rows))
    found = answered_prompts(data, template, 64, 3)
    assert [template.tokenizer.decode(answer) for _, answer in found] == [f"Answer {n}<|im_end|>" for n in (0, 2, 3)]
    assert template.tokenizer.decode(found[0][0]).endswith("Question 0?<|im_end|>\n<|im_start|>assistant\n")
