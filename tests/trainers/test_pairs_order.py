"""The order in the pair trainer: the longest early, dealt out whole to ranks, new in each epoch, resumed exactly."""

import itertools
import math

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from align.config.schema import Layout, Order
from align.data.balance import wasted_share
from align.losses.pairwise import PairObjective
from align.trainers.order import (
    Lengths,
    OrderedRows,
    epoch_order,
    loads,
    longest_early,
    longest_micro_batch,
    shuffled_order,
    tree_lengths,
    tree_tokens,
)
from align.trainers.pairs import PairTrainer
from tests.models.families import tiny
from tests.trainers.test_pairs import pairs, referenced, trainer

ROWS, MICRO_BATCH, ACCUMULATION = 23, 2, 2
STEPS_AN_EPOCH = 6


class Watched(PairTrainer):
    """Notes which rows (their `margin`) every forward of training takes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.taken: list[list[int]] = []

    def tree_losses(self, model, batch):
        self.taken.append([int(number) for number in batch["margin"]])
        return super().tree_losses(model, batch)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Dataset:
    numbered = pairs(ROWS).remove_columns("margin").add_column("margin", [float(n) for n in range(ROWS)])
    return referenced(trainer(tiny("llama"), numbered, tmp_path_factory.mktemp("o"), reference=False), numbered)


def watched(rows, folder, *, order=Order.stratified, **settings) -> Watched:
    defaults = {"per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": ACCUMULATION}
    defaults |= {"num_train_epochs": 2, "logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=7,
        **(defaults | settings),
    )
    return Watched(
        tiny("llama"),
        args,
        PairObjective(),
        layout=Layout.forest,
        pad_token_id=0,
        train_dataset=rows,
        order=order,
    )


def expected_order(rows, epoch: int, order: Order = Order.stratified, ranks: int = 1) -> list[int]:
    size = ranks * MICRO_BATCH * ACCUMULATION
    how = {"micro_batch_size": MICRO_BATCH, "batch_size": size, "seed": 7}
    return epoch_order(tree_lengths(rows), order, epoch=epoch, **how).tolist()


def view_of(rows, *, micro_batch_size: int, batch_size: int) -> OrderedRows:
    how = {"micro_batch_size": micro_batch_size, "batch_size": batch_size, "seed": 7}
    return OrderedRows(rows, tree_lengths(rows), Order.stratified, **how)


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_tokens_of_a_tree_count_its_prompt_once(rows):
    counted = [sum(len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for row in rows]
    assert tree_tokens(rows).tolist() == counted
    assert tree_tokens(rows.select([5, 3])).tolist() == [counted[5], counted[3]]


@pytest.mark.parametrize("order", Order)
def test_training_takes_the_order_of_each_epoch(rows, tmp_path, order):
    built = watched(rows, tmp_path, order=order)
    built.train()
    assert built.state.global_step == 2 * STEPS_AN_EPOCH
    assert flat(built.taken) == expected_order(rows, 0, order) + expected_order(rows, 1, order)
    assert {len(batch) for batch in built.taken} == {1, 2}


def test_rows_given_after_the_trainer_was_built_are_the_ones_taken(rows, tmp_path):
    built = watched(rows, tmp_path, num_train_epochs=1)
    built.train_dataset = rows.select(range(8))
    built.train()
    assert sorted(flat(built.taken)) == list(range(8))


@pytest.mark.parametrize("order", Order)
def test_the_first_loss_is_ln2_in_any_order(rows, tmp_path, order):
    built = watched(rows, tmp_path, order=order, max_steps=1)
    built.train()
    assert built.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_mean_loss_over_rows_does_not_depend_on_the_order(rows, tmp_path):
    means = []
    for order in Order:
        built = watched(rows, tmp_path, order=order, num_train_epochs=1, learning_rate=0.0)
        built.train()
        lines = [line for line in built.state.log_history if "logps/chosen" in line]
        pairs_of_step = [4] * 5 + [3]
        means.append(np.average([line["logps/chosen"] for line in lines], weights=pairs_of_step))
    assert means[0] == pytest.approx(means[1], rel=1e-6)


@pytest.mark.parametrize("stopped_at", [4, STEPS_AN_EPOCH, 9])
def test_a_resumed_run_takes_the_rows_and_has_the_losses_of_an_uninterrupted_one(rows, tmp_path, stopped_at):
    saving = {"save_strategy": "steps", "save_steps": stopped_at, "lr_scheduler_type": "linear"}
    whole = watched(rows, tmp_path / "whole", **saving)
    whole.train()
    rest = watched(rows, tmp_path / "rest", **saving)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stopped_at}"))
    assert len(rest.taken) == 2 * (2 * STEPS_AN_EPOCH - stopped_at)
    assert rest.taken == whole.taken[-len(rest.taken) :]
    losses = [[line["loss"] for line in built.state.log_history if "loss" in line] for built in (whole, rest)]
    assert losses[1] == losses[0]


def dealt_out(rows, ranks: int, rank: int) -> DataLoader:
    """What a rank of several gets, numbers of rows instead of tensors."""
    view = view_of(rows, micro_batch_size=MICRO_BATCH, batch_size=ranks * MICRO_BATCH * ACCUMULATION)
    loader = DataLoader(view, batch_size=MICRO_BATCH, collate_fn=lambda batch: [int(row["margin"]) for row in batch])
    return prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_of_a_step_get_consecutive_micro_batches(rows, ranks):
    size = ranks * MICRO_BATCH * ACCUMULATION
    loaders = [dealt_out(rows, ranks, rank) for rank in range(ranks)]
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        taken = [list(loader) for loader in loaders]
        order = expected_order(rows, epoch, ranks=ranks)
        for step in range(ROWS // size):
            turns = slice(step * ACCUMULATION, (step + 1) * ACCUMULATION)
            step_rows = flat([batch for batches in zip(*(t[turns] for t in taken), strict=True) for batch in batches])
            assert step_rows == order[step * size : (step + 1) * size]
        assert {row for batches in taken for row in flat(batches)} == set(range(ROWS))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_on_any_number_of_ranks_a_resume_within_the_second_epoch_goes_on_in_that_epoch(rows, ranks):
    for rank in range(ranks):
        loader = dealt_out(rows, ranks, rank)
        loader.set_epoch(1)
        whole = list(loader)
        # What the Trainer of a new process does: it skips first, then says which epoch it is.
        resumed = skip_first_batches(dealt_out(rows, ranks, rank), ACCUMULATION)
        resumed.set_epoch(1)
        assert list(resumed) == whole[ACCUMULATION:]


def test_the_order_wastes_less_than_a_shuffled_one(tmp_path):
    rows = pairs(400)
    tokens = tree_tokens(rows)
    view = view_of(rows, micro_batch_size=4, batch_size=16)
    by_chance = np.random.default_rng(0).permutation(400)
    assert wasted_share(tokens, view.order, 4, 16) < 0.03 < 0.1 < wasted_share(tokens, by_chance, 4, 16)


def test_the_shuffled_order_is_the_one_that_transformers_would_take(rows, tmp_path):
    built = watched(rows, tmp_path, order=Order.shuffled)
    theirs = Trainer.get_train_dataloader(built)
    for epoch in range(2):
        theirs.set_epoch(epoch)
        taken = [int(number) for batch in theirs for number in batch["margin"]]
        assert shuffled_order(len(rows), seed=7, epoch=epoch).tolist() == taken


@pytest.mark.parametrize("order", Order)
def test_the_longest_micro_batch_of_any_size_and_layout_comes_early_but_not_first(order):
    rows, batch_size = pairs(700), 12
    lengths = tree_lengths(rows)
    for seed in range(10):
        found = epoch_order(lengths, order, micro_batch_size=4, batch_size=batch_size, seed=seed, epoch=0)
        assert sorted(found.tolist()) == list(range(700))
        for size, padded in itertools.product((1, 2, 3, 4, 6, 12), (False, True)):
            sums = loads(lengths, found, size, padded=padded)
            in_step = batch_size // size
            # As many steps as there are sizes and layouts, behind an ordinary one and one that took in the last rows.
            assert sums[in_step : 14 * in_step].max() == sums.max()


@pytest.mark.parametrize("padded", [False, True])
def test_the_longest_of_all_epochs_is_found(rows, padded):
    lengths, how = tree_lengths(rows), {"micro_batch_size": MICRO_BATCH, "batch_size": MICRO_BATCH * ACCUMULATION}
    for seed in range(10):
        longest = longest_micro_batch(lengths, Order.shuffled, seed=seed, epochs=1.5, padded=padded, **how)
        both = [epoch_order(lengths, Order.shuffled, seed=seed, epoch=epoch, **how) for epoch in range(2)]
        every = np.concatenate([loads(lengths, one, MICRO_BATCH, padded=padded) for one in both])
        assert loads(lengths, longest, MICRO_BATCH, padded=padded).tolist() == [every.max()]


def of_lengths(tokens) -> Lengths:
    tokens = np.asarray(tokens)
    return Lengths(tokens, tokens, np.ones_like(tokens), tokens)


def test_whole_steps_move_and_the_first_is_an_ordinary_one():
    # Steps of two: the longest row is in step 1, the longest pair (and the longest padded pair) in step 3.
    tokens = of_lengths([1, 1, 9, 1, 2, 2, 8, 8, 3, 3])
    found = longest_early(np.arange(10), tokens, batch_size=2)
    assert found.tolist() == [0, 1, 2, 3, 6, 7, 4, 5, 8, 9]


def test_a_last_short_step_that_is_the_longest_changes_places_with_rows_of_an_ordinary_one():
    tokens = of_lengths([1, 1, 5, 1, 2, 2, 4, 4, 3, 3, 9])
    found = longest_early(np.arange(11), tokens, batch_size=2)
    assert found.tolist() == [0, 1, 10, 5, 2, 3, 6, 7, 8, 9, 4]


def test_a_padded_micro_batch_counts_its_longest_sequence_for_each():
    rows = Dataset.from_dict(
        {
            "prompt_ids": [[1] * 3, [1] * 2],
            "completion_ids": [[[1], [1] * 5], [[1] * 4, [1], [1]]],
        }
    )
    lengths = tree_lengths(rows)
    assert lengths.row.tolist() == [9, 8]
    assert lengths.widest.tolist() == [8, 6]
    assert lengths.sequences.tolist() == [2, 3]
    assert loads(lengths, np.array([0, 1]), 2, padded=True).tolist() == [5 * 8]
    assert loads(lengths, np.array([0, 1]), 2, padded=False).tolist() == [17]
