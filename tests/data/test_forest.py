"""What each layout feeds a model, token by token."""

import pickle

import pytest
import torch

from align.config.schema import Layout
from align.data.forest import PairCollator, RewardCollator, Tree, best_fit_rows, lay_out, lay_out_scores

TREES = [Tree([1, 2, 3], ([4, 5, 6], [7, 8])), Tree([9], ([10], [11, 12]))]


def test_forest_holds_each_prompt_once_and_no_last_token():
    batch = lay_out(TREES, Layout.forest, 0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 7, 9, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert batch["forest_table"].tolist() == [[[[3, 2, 1], [1, 0, 1]]]]


@pytest.mark.parametrize("layout", [Layout.forest, Layout.sequences, Layout.padded])
def test_every_completion_token_is_scored_from_the_token_before_it(layout):
    batch = lay_out(TREES, layout, 0)
    before = batch["input_ids"].flatten()[batch["positions"]]
    assert list(zip(before.tolist(), batch["targets"].tolist(), batch["completion"].tolist(), strict=True)) == [
        (3, 4, 0),
        (4, 5, 0),
        (5, 6, 0),
        (3, 7, 1),
        (7, 8, 1),
        (9, 10, 2),
        (9, 11, 3),
        (11, 12, 3),
    ]


def test_sequences_restart_their_positions_and_so_does_padding():
    batch = lay_out(TREES, Layout.sequences, 0)
    starts = (batch["position_ids"] == 0).sum().item()
    padding = int((batch["input_ids"][:, -1] == 0).sum())
    assert starts == 4 + padding
    assert batch["input_ids"].shape[1] == 5


def test_padded_rows_are_masked_on_the_right():
    batch = lay_out(TREES, Layout.padded, 99)
    assert batch["input_ids"][3].tolist() == [9, 11, 99, 99, 99]
    assert batch["attention_mask"][3].tolist() == [1, 1, 0, 0, 0]


def test_rows_are_never_wider_than_asked_and_hold_everything_once():
    lengths = [7, 3, 5, 2, 2, 6, 1]
    rows = best_fit_rows(lengths, 8)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 8
    assert len(rows) == 4


def test_any_number_of_completions_shares_the_prompt():
    batch = lay_out([Tree([1, 2], ([3, 4], [5, 6], [7, 8]))], Layout.forest, 0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 5, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 2]]


def test_collator_carries_labels_of_pairs_and_survives_pickling():
    row = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "p": 0.9, "margin": 0.0}
    row |= {"reference_chosen_logps": -1.0, "reference_rejected_logps": -2.0}
    collator = pickle.loads(pickle.dumps(PairCollator(Layout.forest, 0)))
    batch = collator([row, row])
    assert batch["labels"].shape == batch["shift_labels"].shape == (2,)
    assert batch["p"].tolist() == [0.9, 0.9]
    assert batch["reference_rejected_logps"].tolist() == [-2.0, -2.0]
    assert batch["p"].dtype == torch.float64


def test_a_scored_forest_holds_every_completion_token():
    batch = lay_out_scores(TREES, Layout.forest, 0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 1, 2]]
    assert batch["forest_table"].tolist() == [[[[3, 3, 2], [1, 1, 2]]]]


@pytest.mark.parametrize("layout", [Layout.forest, Layout.sequences, Layout.padded])
def test_a_score_is_read_at_the_last_token_of_its_completion(layout):
    batch = lay_out_scores(TREES, layout, 0)
    assert batch["input_ids"].flatten()[batch["positions"]].tolist() == [6, 8, 10, 12]
    assert batch["tree"].tolist() == [0, 0, 1, 1]
    every = lay_out_scores(TREES, layout, 0, every_token=True)
    assert every["input_ids"].flatten()[every["positions"]].tolist() == [4, 5, 6, 7, 8, 10, 11, 12]


def test_a_stop_token_that_is_also_the_pad_token_is_where_the_score_is_read():
    batch = lay_out_scores([Tree([1, 2], ([3, 0], [4, 5, 0]))], Layout.padded, 0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [1, 2, 4, 5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["positions"].tolist() == [3, 9]


def test_reward_collator_takes_pairs_and_rankings_together():
    ranking = {
        "prompt_ids": [1],
        "completion_ids": [[2], [3, 4], [5]],
        "ranks": [0.0, 2.0, 0.0],
        "p": 1.0,
        "margin": 0.0,
    }
    pair = {"prompt_ids": [6, 7], "completion_ids": [[8], [9]], "ranks": [0.0, 1.0], "p": 0.7, "margin": 2.0}
    batch = pickle.loads(pickle.dumps(RewardCollator(Layout.forest, 0)))([ranking, pair])
    assert batch["ranks"].tolist() == [0, 2, 0, 0, 1]
    assert batch["tree"].tolist() == [0, 0, 0, 1, 1]
    assert batch["p"].tolist() == [1.0, 0.7]
    assert batch["margin"].tolist() == [0.0, 2.0]
    assert batch["labels"].shape == batch["shift_labels"].shape == (2,)
