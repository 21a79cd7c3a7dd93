"""Rows left out are written down one by one, and come back as they were."""

import json

import pytest

from align.config.schema import DataConfig, OnBadRows
from align.data.bad_rows import BadRows, TooManyBadRows, enforce_policy
from align.data.records import BadRow, Origin


def bad(number, reason="empty_completion", path="rows.jsonl", has_lines=True):
    return BadRow(Origin(path, number, has_lines), reason, "'rejected' is empty", {"n": number, "text": "ü\ud800"})


@pytest.mark.parametrize(
    "origin",
    [Origin("a b/rows.jsonl", 7), Origin("a.json", 3, has_lines=False), Origin("a row 2:1.jsonl", 9), Origin("x:1", 2)],
)
def test_an_origin_comes_back_from_its_text(origin):
    assert Origin.parse(str(origin)) == origin


def test_rows_come_back_from_the_file_in_order_with_their_reason(tmp_path):
    rows = BadRows(tmp_path / "bad.jsonl")
    added = [bad(1), bad(2, "too_long"), bad(3, has_lines=False)]
    for row in added:
        rows.add(row)
    assert [(row.origin, row.reason, row.detail, row.row["n"]) for row in rows] == [
        (row.origin, row.reason, row.detail, row.row["n"]) for row in added
    ]
    assert rows.by_reason == {"empty_completion": 2, "too_long": 1}
    again = BadRows.from_json(json.loads(json.dumps(rows.as_json())), rows.path)
    assert again == rows
    assert len(list(again)) == 3


def test_no_bad_row_leaves_no_file_and_takes_an_old_one_away(tmp_path):
    (tmp_path / "old.jsonl").write_text("from an earlier run\n")
    rows = BadRows(tmp_path / "bad.jsonl")
    rows.write(tmp_path / "old.jsonl")
    assert list(tmp_path.iterdir()) == []
    assert list(rows) == []


def test_many_bad_rows_keep_a_few_examples_in_memory_and_all_on_disk(tmp_path):
    rows = BadRows(tmp_path / "bad.jsonl")
    for number in range(1, 1001):
        rows.add(bad(number))
    assert len(rows.first) == 3
    assert rows.origins == {"empty_completion": [f"rows.jsonl:{number}" for number in range(1, 21)]}
    assert sum(1 for _ in rows) == len(rows) == 1000


def test_reasons_that_a_user_chose_do_not_count_against_the_data(tmp_path):
    rows = BadRows(tmp_path / "bad.jsonl")
    for number in range(50):
        rows.add(bad(number, "too_long"))
    enforce_policy(rows, 100, DataConfig(), allowed=("too_long",))
    rows.add(bad(60))
    rows.add(bad(61))
    with pytest.raises(TooManyBadRows) as refused:
        enforce_policy(rows, 100, DataConfig(), allowed=("too_long",))
    message = str(refused.value)
    assert message.startswith("2 of 100 rows cannot be used (empty_completion 2): rows.jsonl:60: empty_completion")
    assert "too_long" not in message
    enforce_policy(rows, 100, DataConfig(on_bad_rows=OnBadRows.drop), allowed=())
