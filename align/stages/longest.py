"""The longest batch that the model of a stage meets: from the lengths of rows or, where none are known, from limits."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from align.config.schema import DPOStage, Layout, Order, PPOStage, PretrainStage, RewardStage, SFTStage, StageConfig
from align.data.prepare import Prepared
from align.distributed.memory import Batch
from align.trainers.order import Lengths, longest_micro_batch, sequence_lengths, tree_lengths


@dataclass(frozen=True)
class Rows:
    """How long the rows of a stage are, and how that is known."""

    lengths: Lengths
    count: int | None
    """Rows to train on; None if they are not known."""
    source: str

    @property
    def known(self) -> bool:
        return self.count is not None


def rows_of(stage: StageConfig, prepared: Prepared) -> Rows:
    """The lengths of tokenised rows."""
    train = prepared.train
    if not len(train):
        return longest_rows(stage, "no row is left")
    if isinstance(stage, DPOStage | RewardStage):
        lengths = tree_lengths(train)
    elif isinstance(stage, PPOStage):
        lengths = sequence_lengths(train.select_columns(["prompt_ids"]).rename_column("prompt_ids", "input_ids"))
    else:
        lengths = sequence_lengths(train)
    return Rows(lengths, len(train), f"{len(train):,} tokenised rows")


def longest_rows(stage: StageConfig, reason: str) -> Rows:
    """As long as rows may be, where they are not known: pairs that share no prompt, prompts with room for an answer."""
    sequences = 2 if isinstance(stage, DPOStage | RewardStage) else 1
    tokens = stage.max_tokens - (stage.max_new_tokens if isinstance(stage, PPOStage) else 0)
    one = np.full(stage.micro_batch_size, tokens, np.int64)
    return Rows(Lengths(one * sequences, one, np.full_like(one, sequences), one * sequences), None, reason)


def layout_of(stage: StageConfig) -> Layout:
    """The batch layout that memory is counted for: `auto` is taken for the forest, which most models take."""
    if not isinstance(stage, DPOStage | RewardStage | PPOStage):
        return Layout.padded
    return Layout.forest if stage.layout is Layout.auto else stage.layout


def longest_batch(stage: Any, rows: Rows, micro_batches: int = 1) -> Batch:
    """What the longest micro-batch of a stage is for its model, or so many of them at once."""
    lengths = rows.lengths
    size = stage.micro_batch_size * micro_batches
    if isinstance(stage, PPOStage):
        return _sampled_batch(stage, lengths, size)
    if isinstance(stage, SFTStage | PretrainStage) and stage.packing:
        # One row without padding, told apart by a mask of its whole square.
        tokens = min(size * stage.max_tokens, int(lengths.row.sum()) if rows.known else size * stage.max_tokens)
        return Batch(tokens, tokens**2, scored=tokens)
    chosen = _longest_rows(stage, rows, size, single=micro_batches == 1)
    if layout_of(stage) is Layout.padded:
        width, count = int(lengths.widest[chosen].max()), int(lengths.sequences[chosen].sum())
        return Batch(width * count, count * width**2, scored=int(lengths.scored[chosen].sum()), projected=width * count)
    if layout_of(stage) is Layout.sequences:
        tokens = int((lengths.widest * lengths.sequences)[chosen].sum())
        return Batch(tokens, tokens * int(lengths.widest[chosen].max()), scored=int(lengths.scored[chosen].sum()))
    trees = lengths.row[chosen]
    return Batch(int(trees.sum()), int((trees**2).sum()), forest=True, scored=int(lengths.scored[chosen].sum()))


def _longest_rows(stage: Any, rows: Rows, size: int, *, single: bool) -> np.ndarray:
    """Rows of the longest micro-batch of the order, or the longest of all where they are read longest first."""
    if not rows.known:
        return np.zeros(size, np.int64)
    if not single:
        return np.argsort(-rows.lengths.row, kind="stable")[:size]
    epochs = stage.epochs if stage.max_steps is None else stage.max_steps * stage.batch_size / len(rows.lengths)
    return _longest_of_order(
        rows.lengths,
        stage.order if isinstance(stage, DPOStage | RewardStage) else Order.shuffled,
        layout_of(stage) is Layout.padded,
        stage.micro_batch_size,
        stage.batch_size,
        stage.seed,
        epochs,
    )


@lru_cache(maxsize=16)
def _longest_of_order(
    lengths: Lengths, order: Order, padded: bool, micro_batch_size: int, batch_size: int, seed: int, epochs: float
) -> np.ndarray:
    return longest_micro_batch(
        lengths,
        order,
        padded=padded,
        micro_batch_size=micro_batch_size,
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
    )


def _sampled_batch(stage: PPOStage, lengths: Lengths, size: int) -> Batch:
    """The longest prompts, each with completions that go on to the end."""
    prompt, new = int(lengths.row.max()), stage.max_new_tokens
    each = min(stage.completions_per_prompt, size)
    trees = math.ceil(size / each)
    scored = size * new
    if layout_of(stage) is Layout.forest:
        tree = prompt + each * new
        found = Batch(trees * tree, trees * tree**2, forest=True, scored=scored)
    else:
        width = prompt + new
        padded = layout_of(stage) is Layout.padded
        found = Batch(size * width, size * width**2, scored=scored, projected=size * width if padded else 0)
    if stage.pretraining_weight:
        text = stage.max_tokens
        found = replace(
            found,
            tokens=found.tokens + size * text,
            squares=found.squares + size * text**2,
            scored=scored + size * text,
        )
    return found
