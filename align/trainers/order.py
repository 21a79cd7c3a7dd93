"""Rows of trees in an order in which micro-batches are equally long."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from align.data.balance import stratified_order


def tree_tokens(rows: Dataset) -> np.ndarray:
    """Tokens of each tree, its prompt once and all its completions, int64 (rows,)."""
    names = ["completion_ids"] if "completion_ids" in rows.column_names else ["chosen_ids", "rejected_ids"]
    columns = rows.select_columns(["prompt_ids", *names]).with_format("arrow")[:]
    return sum(np.concatenate([_row_tokens(chunk) for chunk in column.chunks]) for column in columns.itercolumns())


def _row_tokens(column: pa.Array) -> np.ndarray:
    """Tokens in each row of a column of lists, or of lists of lists."""
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    if not pa.types.is_list(column.type.value_type):
        return lengths
    inner = pc.list_value_length(column.flatten()).to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.cumsum(inner, dtype=np.int64)])[np.cumsum(lengths)]
    return np.diff(ends, prepend=0)


class StratifiedRows:
    """Trees in the stratified order of an epoch, to be read from first to last.

    A data set and no sampler, because `set_epoch` must reach it: where a run on several ranks is resumed within an
    epoch, accelerate 1.15.0 tells no sampler but its own which epoch that is.
    """

    def __init__(self, rows: Dataset, *, micro_batch_size: int, batch_size: int, seed: int):
        self.rows, self.tokens = rows, tree_tokens(rows)
        self.micro_batch_size, self.batch_size, self.seed = micro_batch_size, batch_size, seed
        self.epoch = -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.epoch = epoch
        self.order = stratified_order(
            self.tokens,
            micro_batch_size=self.micro_batch_size,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=epoch,
        )

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[int(self.order[index])]
