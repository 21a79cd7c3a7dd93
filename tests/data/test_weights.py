"""A source's weight is how often an epoch passes over its rows; nothing else about it changes."""

import json
from collections import Counter

import pytest

from align.config.schema import DataConfig
from align.data.prepare import prepare_text
from align.data.template import Template
from tests.data.chat_tokenizers import gpt2

ROWS = 400


@pytest.fixture(scope="module")
def template():
    return Template(gpt2(None))


def prepared(tmp_path, template, **keys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(ROWS)))
    data = DataConfig(text=[{"path": str(path), **keys}], held_out_fraction=0.1)
    return prepare_text(data, template, 64, None)


def times_seen(rows):
    return Counter(tuple(row["input_ids"]) for row in rows.train)


def test_a_weight_of_two_trains_on_every_row_twice_and_holds_out_once(tmp_path, template):
    once, twice = prepared(tmp_path, template), prepared(tmp_path, template, weight=2)
    assert times_seen(twice) == {row: 2 for row in times_seen(once)}
    assert twice.held_out["input_ids"][:] == once.held_out["input_ids"][:]
    assert twice.report.copies == twice.report.kept == once.report.kept
    assert sum(twice.report.tokens.values()) == 2 * sum(once.report.tokens.values())


def test_a_weight_of_a_half_leaves_half_of_the_rows_out_and_counts_them(tmp_path, template):
    once, half = prepared(tmp_path, template), prepared(tmp_path, template, weight=0.5)
    assert set(times_seen(half)) < set(times_seen(once))
    assert set(times_seen(half).values()) == {1}
    assert 0.4 < half.report.kept / once.report.kept < 0.6
    counts = half.report
    assert counts.kept + counts.held_out + counts.sampled_out == counts.read == ROWS
    assert any(line.startswith(f"by weight: {counts.sampled_out} left out") for line in counts.lines())


def test_the_same_rows_are_chosen_every_time(tmp_path, template):
    first, second = (prepared(tmp_path, template, weight=1.3) for _ in range(2))
    assert first.report.digest == second.report.digest
    assert set(times_seen(first).values()) == {1, 2}
