"""Scores of the data: read where a row has them, kept through conversion, and columns of the rows to train on."""

import json
import math

import pytest

from align import cli
from align.config.schema import DataConfig, Layout, Ties
from align.data.forest import RewardCollator
from align.data.formats import as_records, find_format
from align.data.prepare import prepare_comparisons, prepare_ratings
from align.data.records import PreferencePair, Rated, RowRefused
from align.data.template import Template
from tests.data.chat_tokenizers import chatml

PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "score_chosen": 4.5, "score_rejected": 2}
ANSWERS = {"output_1": "No.", "output_2": "So.", "score_1": 2, "score_2": "4.5"}
LISTED = {"prompt": "Why?", "completions": ["So.", "No.", "Hm."], "scores": [4.5, 2, 2]}
INSIDE = [{"text": "So.", "score": 4.5}, {"text": "No.", "score": 2}]
ULTRA = [
    {"response": "So.", "overall_score": 9, "fine-grained_score": 4.5},
    {"response": "No.", "overall_score": 3, "fine-grained_score": 2.0},
]


@pytest.fixture(scope="module")
def template():
    return Template(chatml())


def rated(row):
    found = find_format([row], Rated, "data.x")
    [record] = as_records(found, Rated, row, ties=Ties.drop)
    return record


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, {"So.": 4.5, "No.": 2.0}),
        ({"prompt": "Why?", **ANSWERS}, {"So.": 4.5, "No.": 2.0}),
        (LISTED, {"So.": 4.5, "No.": 2.0, "Hm.": 2.0}),
        ({"prompt": "Why?", "completions": INSIDE}, {"So.": 4.5, "No.": 2.0}),
        ({"instruction": "Why?", "completions": ULTRA}, {"So.": 4.5, "No.": 2.0}),
        ({"prompt": "Why?", "completion": "So.", "score": 4.5}, {"So.": 4.5}),
        ({"instruction": "Why?", "output": "So.", "score": "4.5"}, {"So.": 4.5}),
        ({**PAIR, "score_rejected": 4.5}, {"So.": 4.5, "No.": 4.5}),
    ],
)
def test_every_answer_has_its_own_score_and_equal_ones_are_no_tie_to_drop(row, expected):
    record = rated(row)
    assert [message.content for message in record.prompt] == ["Why?"]
    assert {m.content: score for m, score in zip(record.completions, record.scores, strict=True)} == expected


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "score_rejected": None},
        {"prompt": "Why?", "completions": ["So.", "No."], "ranks": [0, 1]},
        {"prompt": "Why?", "completion": "So.", "score": "good"},
        {"prompt": "Why?", "completion": "So.", "score": True},
        {"prompt": "Why?", "output_1": "So.", "output_2": "No.", "label": 1},
    ],
)
def test_an_answer_without_a_number_is_refused_by_name(row):
    record = rated(row)
    assert isinstance(record, RowRefused) and record.reason == "no_score"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_without_scores_are_counted_and_stop_nothing(tmp_path, template):
    rows = [{**LISTED, "prompt": f"Why {n}?"} for n in range(3)]
    bare = [{"prompt": f"Who {n}?", "completions": ["I", "You"], "ranks": [0, 1]} for n in range(5)]
    data = DataConfig(preferences=[write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", bare)])
    data.held_out_fraction = 0.0
    found = prepare_ratings(data, template, 64, None)
    assert (found.report.kept, found.report.dropped) == (3, {"no_score": 5})
    assert found.train["scores"][:] == [[4.5, 2.0, 2.0]] * 3
    assert found.train["ranks"][:] == [[-4.5, -2.0, -2.0]] * 3


def test_one_rated_answer_is_a_tree_of_one_with_a_field_of_any_name_as_its_score(tmp_path, template):
    rows = [{"prompt": "Why?", "response": "So.", "rating": {"helpfulness": 3}}]
    source = {"path": write(tmp_path / "a.jsonl", rows)}
    source["columns"] = {"completion": "response", "score": "rating.helpfulness"}
    [row] = prepare_ratings(DataConfig(preferences=source, held_out_fraction=0.0), template, 64, None).train
    assert row["scores"] == [3.0] and len(row["completion_ids"]) == 1


def test_comparisons_keep_scores_where_there_are_any_and_share_no_cache_with_ratings(tmp_path, template):
    path = write(tmp_path / "a.jsonl", [PAIR, {**PAIR, "prompt": "Who?", "score_chosen": None}])
    data = DataConfig(preferences=path, held_out_fraction=0.0)
    scored, bare = prepare_comparisons(data, template, 64, tmp_path / "cache").train
    assert scored["scores"] == [4.5, 2.0] and all(map(math.isnan, bare["scores"]))
    assert scored["ranks"] == bare["ranks"] == [0.0, 1.0]
    assert len(prepare_ratings(data, template, 64, tmp_path / "cache").train) == 1
    assert len(prepare_comparisons(data, template, 64, tmp_path / "cache").train) == 2
    batch = RewardCollator(Layout.forest, 0)([scored, bare])
    assert batch["ratings"][:2].tolist() == [4.5, 2.0] and batch["ratings"][2:].isnan().all()


def test_converted_rows_teach_the_same_scores(tmp_path, template):
    rows = [PAIR, {**PAIR, "prompt": "Who?", "score_rejected": 4.5}]
    sources = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [LISTED])]
    sources += [write(tmp_path / "c.jsonl", [{"prompt": "When?", "completion": "Now.", "score": -1}])]
    for number, source in enumerate(sources):
        slot = "demonstrations" if number == 2 else "preferences"
        assert cli.main(["+recipe=convert", f"data.{slot}={source}", f"out={tmp_path}/made{number}.jsonl"]) == 0

    def columns(paths):
        data = DataConfig(preferences=[str(path) for path in paths], held_out_fraction=0.0)
        return prepare_ratings(data, template, 64, None).train.to_list()

    again = columns(tmp_path / f"made{number}.jsonl" for number in range(3))
    assert again == columns(sources) and len(again) == 4


def test_pairs_of_a_ranking_keep_the_scores_of_their_sides():
    row = {"prompt": "Why?", "completions": ["Low", "High", "Mid"], "scores": [1, 3, 2]}
    pairs = as_records(find_format([row], PreferencePair, "data.x"), PreferencePair, row, ties=Ties.keep)
    found = [(pair.chosen.content, pair.rejected.content, pair.scores) for pair in pairs]
    assert found == [("High", "Mid", (3, 2)), ("High", "Low", (3, 1)), ("Mid", "Low", (2, 1))]
