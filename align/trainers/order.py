"""The order in which rows are trained on, and how large micro-batches get in it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader

from align.config.schema import Order
from align.data.balance import stratified_order
from align.data.encoded import token_lengths

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer


@dataclass(frozen=True, eq=False)
class Lengths:
    """How long rows are, int64 (rows,) each."""

    row: np.ndarray
    """Tokens of a row: of a tree its prompt once and all its completions."""
    widest: np.ndarray
    """Tokens of its longest sequence, prompt and completion."""
    sequences: np.ndarray
    """How many sequences it has, one in each completion."""
    scored: np.ndarray
    """Tokens of its completions."""

    def __len__(self) -> int:
        return len(self.row)


def tree_tokens(rows: "Dataset") -> np.ndarray:
    """Tokens of each tree, its prompt once and all its completions, int64 (rows,)."""
    return tree_lengths(rows).row


def tree_lengths(rows: "Dataset") -> Lengths:
    """Lengths of rows of pairs or of rankings."""
    names = ["completion_ids"] if "completion_ids" in rows.column_names else ["chosen_ids", "rejected_ids"]
    columns = rows.select_columns(["prompt_ids", *names]).with_format("arrow")[:]
    prompt, *completions = ([_row_lengths(chunk) for chunk in column.chunks] for column in columns.itercolumns())
    tokens, longest, counts = (
        [np.concatenate([np.empty(0, np.int64), *(chunk[i] for chunk in column)]) for column in completions]
        for i in range(3)
    )
    prompts = np.concatenate([np.empty(0, np.int64), *(chunk[0] for chunk in prompt)])
    scored = sum(tokens)
    return Lengths(prompts + scored, prompts + np.maximum.reduce(longest), sum(counts), scored)


def sequence_lengths(rows: "Dataset") -> Lengths:
    """Lengths of rows of single sequences, all of them scored."""
    tokens = token_lengths(rows, "input_ids").astype(np.int64)
    return Lengths(tokens, tokens, np.ones_like(tokens), tokens)


def _row_lengths(column: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens in each row of a column of lists, or of lists of lists; its longest list; how many lists it has."""
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    if not pa.types.is_list(column.type.value_type):
        return lengths, lengths, np.ones_like(lengths)
    inner = pc.list_value_length(column.flatten()).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(lengths)
    sums = np.diff(np.concatenate([[0], np.cumsum(inner)])[ends], prepend=0)
    assert len(lengths) == 0 or lengths.min() > 0, "a tree has at least one completion"
    return sums, np.maximum.reduceat(inner, ends - lengths) if len(lengths) else lengths, lengths


# How large micro-batches get.


def loads(lengths: Lengths, order: np.ndarray, micro_batch_size: int, *, padded: bool) -> np.ndarray:
    """Positions that the model computes for each micro-batch of an order, int64 (micro-batches,).

    padded: every sequence of a micro-batch is filled up to its longest.
    """
    if not len(order):
        return np.empty(0, np.int64)
    starts = np.arange(0, len(order), micro_batch_size)
    if not padded:
        return np.add.reduceat(lengths.row[order], starts)
    return np.add.reduceat(lengths.sequences[order], starts) * np.maximum.reduceat(lengths.widest[order], starts)


def shuffled_order(rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """Every row index once, int64 (rows,): the order that accelerate's seedable sampler gives an epoch."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(rows, generator=generator).numpy()


def epoch_order(
    lengths: Lengths, order: Order, *, micro_batch_size: int, batch_size: int, seed: int, epoch: int
) -> np.ndarray:
    """Every row index once, int64 (rows,): what is trained on in an epoch, optimizer step by optimizer step.

    The first epoch has its longest micro-batches early, see `longest_early`. What a step holds depends on
    micro_batch_size only where rows are stratified, and never on the layout.
    """
    if order is Order.shuffled:
        found = shuffled_order(len(lengths), seed=seed, epoch=epoch)
    else:
        found = stratified_order(
            lengths.row, micro_batch_size=micro_batch_size, batch_size=batch_size, seed=seed, epoch=epoch
        )
    return found if epoch else longest_early(found, lengths, batch_size=batch_size)


def longest_early(order: np.ndarray, lengths: Lengths, *, batch_size: int) -> np.ndarray:
    """The order with an ordinary step first, then the steps that hold a longest micro-batch, then the others.

    So what is too large for the machine fails at once. Not in the very first step: the optimizer makes its moments at
    the end of that one, and memory peaks after it. There is a longest micro-batch for each micro_batch_size that
    divides batch_size, padded and not; all their steps come early, for neither may change what is trained. Whole steps
    move, so the rows that share one stay together; but if the last, shorter step is the one, its rows change places
    with the first of an ordinary step.
    """
    steps = len(order) // batch_size
    if not steps:
        return order
    whole, last = order[: steps * batch_size].reshape(steps, -1), order[steps * batch_size :]
    early, last_is_longest = set(), False
    for size, padded in product((n for n in range(1, batch_size + 1) if batch_size % n == 0), (False, True)):
        peaks = loads(lengths, whole.ravel(), size, padded=padded).reshape(steps, -1).max(1)
        early.add(int(peaks.argmax()))
        last_is_longest |= loads(lengths, last, size, padded=padded).max(initial=0) > peaks.max()
    ordinary = [step for step in range(steps) if step not in early]
    first, behind = ordinary[:1], ordinary[1:]
    found = np.concatenate([whole[[*first, *behind[:1], *sorted(early), *behind[1:]]].ravel(), last])
    if not last_is_longest or not behind:
        return np.concatenate([whole[[*first, *sorted(early), *behind]].ravel(), last])
    here, there = batch_size + np.arange(len(last)), steps * batch_size + np.arange(len(last))
    found[here], found[there] = found[there], found[here]
    return found


EPOCHS_SEARCHED = 8
"""Epochs whose orders are looked through for the longest micro-batch."""


def longest_micro_batch(
    lengths: Lengths,
    order: Order,
    *,
    padded: bool,
    micro_batch_size: int,
    batch_size: int,
    seed: int,
    epochs: float,
) -> np.ndarray:
    """Row indices of the longest micro-batch that a training will meet."""

    def candidates() -> Iterator[tuple[int, np.ndarray]]:
        for epoch in range(min(max(1, math.ceil(epochs)), EPOCHS_SEARCHED)):
            how = {"micro_batch_size": micro_batch_size, "batch_size": batch_size, "seed": seed}
            found = epoch_order(lengths, order, **how, epoch=epoch)
            sums = loads(lengths, found, micro_batch_size, padded=padded)
            start = int(sums.argmax()) * micro_batch_size
            yield int(sums.max()), found[start : start + micro_batch_size]

    return max(candidates(), key=lambda one: one[0])[1]


class OrderedRows:
    """Rows in the order of an epoch, to be read from first to last.

    A data set and no sampler, because `set_epoch` must reach it: where a run on several ranks is resumed within an
    epoch, accelerate 1.15.0 tells no sampler but its own which epoch that is.
    """

    def __init__(
        self,
        rows: "Dataset",
        lengths: Lengths,
        order: Order,
        *,
        micro_batch_size: int,
        batch_size: int,
        seed: int,
    ):
        self.rows, self.lengths = rows, lengths
        self.how: dict[str, Any] = {"order": order, "seed": seed}
        self.how |= {"micro_batch_size": micro_batch_size, "batch_size": batch_size}
        self.epoch = -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.epoch = epoch
        self.order = epoch_order(self.lengths, **self.how, epoch=epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[int(self.order[index])]


def ordered_loader(trainer: "Trainer", lengths: Lengths, order: Order) -> DataLoader:
    """What a trainer's `get_train_dataloader` returns: its rows in `epoch_order`, dealt out to the ranks."""
    args = trainer.args
    rows = OrderedRows(
        trainer.train_dataset,
        lengths,
        order,
        micro_batch_size=args.train_batch_size,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    loader = DataLoader(
        rows,
        batch_size=args.train_batch_size,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        drop_last=args.dataloader_drop_last,
    )
    return trainer.accelerator.prepare(loader)
