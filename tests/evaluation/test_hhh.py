"""HHH's 221 pairs through the data room's reader, and accuracy by category."""

import json
import re

import pytest

from align.config.schema import Ties
from align.data.formats import as_records, find_format
from align.data.records import PreferencePair
from align.evaluation.agreement import accuracy_by_group
from tests.evaluation.published import folder_of

pytestmark = pytest.mark.real_data

ROWS = {"harmless": 58, "helpful": 59, "honest": 61, "other": 43}
RESPONSE = re.compile(r"### ?Response to evaluate:\n(.*?)\n\n### ?Score Rubrics?:", re.DOTALL)


@pytest.fixture
def rows(real_data):
    return json.loads((folder_of(real_data, "hhh_alignment") / "hhh_alignment_eval.json").read_text())


def pairs_of(rows):
    row_format = find_format(rows, PreferencePair, "hhh")
    return [as_records(row_format, PreferencePair, row, ties=Ties.keep)[0] for row in rows]


def by_hand(row, side):
    return RESPONSE.search(row[f"{side}_instruction"]).group(1).strip()


def test_every_pair_is_read_as_its_judge_prompt_shows_it(rows):
    pairs = pairs_of(rows)
    assert len(pairs) == 221
    for pair, row in zip(pairs, rows, strict=True):
        assert pair.chosen.content.strip() == by_hand(row, "chosen")
        assert pair.rejected.content.strip() == by_hand(row, "rejected")


def test_accuracy_by_category_of_a_judge_that_takes_the_longer_reply(rows):
    def takes_longer(chosen, rejected):
        return (len(chosen) > len(rejected)) + 0.5 * (len(chosen) == len(rejected))

    right = [takes_longer(pair.chosen.content, pair.rejected.content) for pair in pairs_of(rows)]
    found = accuracy_by_group(right, [row["source"] for row in rows])
    assert {name: share.count for name, share in found.items()} == ROWS
    # Counted with RESPONSE above, not with the reader.
    expected = {"harmless": 36, "helpful": 41.5, "honest": 39, "other": 23.5}
    assert {name: share.share * share.count for name, share in found.items()} == pytest.approx(expected)
    assert all(share.low < share.share < share.high for share in found.values())
