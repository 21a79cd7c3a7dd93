"""The batch layouts of trees: one prompt, computed once, with K completions.

    forest     one row (1, N), trees one after another; each is its prompt, then its completions side by side:
                   prompt 0 | chosen 0 | rejected 0 | prompt 1 | chosen 1 | rejected 1 ...
               position ids of every completion go on from its prompt's, so each reads as if it stood alone
    sequences  rows (R, W) of whole prompt + completion sequences, told apart by position ids that restart at 0
    padded     one prompt + completion a row, right-padded, with the usual 2-D mask

Where tokens are predicted (`lay_out`), a completion's last token predicts nothing: it is a target but never an input.
Where completions are scored (`lay_out_scores`), it is an input, and the score is read at it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.config.schema import Layout


@dataclass(frozen=True)
class Tree:
    """One prompt and its completions, as token ids; only completion tokens are read, none of the prompt."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        assert self.prompt, "the first token of a completion is predicted by the prompt's last"
        assert all(self.completions), "an empty completion has no log-probability"

    @property
    def sequences(self) -> list[list[int]]:
        """Each prompt + completion without its last token: what a model reads."""
        return [[*self.prompt, *completion[:-1]] for completion in self.completions]


def pair_tree(row: Mapping[str, Any]) -> Tree:
    """The tree of a row of pairs: completion 0 is chosen, completion 1 is rejected."""
    return Tree(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"]))


def lay_out(trees: Sequence[Tree], layout: Layout, pad_token_id: int) -> dict[str, Tensor]:
    """The model's inputs and what to score.

    Returns: input_ids (R, W), and
        positions (S,)   index into the flattened R x W positions whose logits score a token
        targets (S,)     that token
        completion (S,)  which completion it belongs to: trees in order, their completions in order
        and `position_ids` + `forest_table`, or `position_ids`, or `attention_mask`, by layout.
    `forest_table` (1, 1, trees, 1 + K) holds the input lengths of the prompt and of each completion.
    """
    inputs, starts = _LAYOUTS[layout](trees, pad_token_id)
    completions = [completion for tree in trees for completion in tree.completions]
    return {
        **inputs,
        "positions": torch.tensor([position for start in starts for position in start]),
        "targets": torch.tensor([token for completion in completions for token in completion]),
        "completion": torch.arange(len(completions)).repeat_interleave(torch.tensor([len(c) for c in completions])),
    }


def lay_out_scores(
    trees: Sequence[Tree], layout: Layout, pad_token_id: int, *, every_token: bool = False
) -> dict[str, Tensor]:
    """The model's inputs and where to read the score of each completion: at its last token.

    Returns: input_ids (R, W), and
        positions (C,)   index into the flattened R x W positions of the last token of each completion, in order;
                         with `every_token`, of each of its tokens (S,)
        tree (C,)        which tree a completion belongs to
        and `position_ids` + `forest_table`, or `position_ids`, or `attention_mask`, by layout, as `lay_out` does.
    """
    # A last token is never an input, so one more token a completion makes an input of the real last one.
    longer = [Tree(tree.prompt, [[*completion, pad_token_id] for completion in tree.completions]) for tree in trees]
    inputs, positions = _LAYOUTS[layout](longer, pad_token_id)
    first = 1 if every_token else -1
    return {
        **inputs,
        "positions": torch.tensor([position for places in positions for position in places[first:]]),
        "tree": torch.arange(len(trees)).repeat_interleave(torch.tensor([len(tree.completions) for tree in trees])),
    }


# Each returns the inputs, and the positions before the tokens of every completion.
_Laid = tuple[dict[str, Tensor], list[list[int]]]


def _forest(trees: Sequence[Tree], pad_token_id: int) -> _Laid:
    input_ids: list[int] = []
    position_ids: list[int] = []
    positions: list[list[int]] = []
    most = max(len(tree.completions) for tree in trees)
    table = torch.zeros(1, 1, len(trees), 1 + most, dtype=torch.long)
    for i, tree in enumerate(trees):
        last_of_prompt = len(input_ids) + len(tree.prompt) - 1
        input_ids += tree.prompt
        position_ids += range(len(tree.prompt))
        table[0, 0, i, 0] = len(tree.prompt)
        for k, completion in enumerate(tree.completions):
            start, length = len(input_ids), len(completion) - 1
            input_ids += completion[:-1]
            position_ids += range(len(tree.prompt), len(tree.prompt) + length)
            positions.append([last_of_prompt, *range(start, start + length)])
            table[0, 0, i, 1 + k] = length
    inputs = {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([position_ids]),
        "forest_table": table,
    }
    return inputs, positions


def _sequences(trees: Sequence[Tree], pad_token_id: int) -> _Laid:
    sequences = [sequence for tree in trees for sequence in tree.sequences]
    width = max(map(len, sequences))
    rows = best_fit_rows([len(sequence) for sequence in sequences], width)
    input_ids = torch.full((len(rows), width), pad_token_id)
    # Padding restarts at position 0 as well, so that it counts as a sequence of its own.
    position_ids = torch.arange(width).repeat(len(rows), 1)
    starts = [0] * len(sequences)
    for r, row in enumerate(rows):
        column = 0
        for s in row:
            end = column + len(sequences[s])
            input_ids[r, column:end] = torch.tensor(sequences[s])
            position_ids[r, column:] = torch.arange(width - column)
            starts[s] = r * width + column
            column = end
        position_ids[r, column:] = torch.arange(width - column)
    return {"input_ids": input_ids, "position_ids": position_ids}, _scoring_positions(trees, starts)


def _padded(trees: Sequence[Tree], pad_token_id: int) -> _Laid:
    sequences = [sequence for tree in trees for sequence in tree.sequences]
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_token_id)
    attention_mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for r, sequence in enumerate(sequences):
        input_ids[r, : len(sequence)] = torch.tensor(sequence)
        attention_mask[r, : len(sequence)] = 1
    starts = [r * width for r in range(len(sequences))]
    return {"input_ids": input_ids, "attention_mask": attention_mask}, _scoring_positions(trees, starts)


def _scoring_positions(trees: Sequence[Tree], starts: Sequence[int]) -> list[list[int]]:
    """The scoring positions of each completion whose whole sequence starts at `starts` of the flattened rows."""
    pairs = [(len(tree.prompt), len(completion)) for tree in trees for completion in tree.completions]
    return [
        list(range(start + prompt - 1, start + prompt - 1 + length))
        for start, (prompt, length) in zip(starts, pairs, strict=True)
    ]


_LAYOUTS = {Layout.forest: _forest, Layout.sequences: _sequences, Layout.padded: _padded}


def best_fit_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `width`, longest first, each into the fullest row that takes it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[index]]
        if fits:
            row = min(fits, key=lambda r: room[r])
        else:
            row = len(rows)
            rows.append([])
            room.append(width)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


@dataclass(frozen=True)
class PairCollator:
    """Rows of pairs -> the tensors of `lay_out`, plus p, margin and reference log-probabilities a pair."""

    layout: Layout
    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = lay_out([pair_tree(row) for row in rows], self.layout, self.pad_token_id)
        per_pair = ("p", "margin", "reference_chosen_logps", "reference_rejected_logps")
        batch |= {
            key: torch.tensor([float(row[key]) for row in rows], dtype=torch.float64)
            for key in per_pair
            if key in rows[0]
        }
        return batch | one_label_a_row(len(rows))


@dataclass(frozen=True)
class RewardCollator:
    """Rows of completions with ranks -> the tensors of `lay_out_scores`, with ranks (C,), p and margin (trees,).

    `ratings` (C,) are the rows' `scores`, NaN where there is none; `scores` are the model's, here and everywhere.
    """

    layout: Layout
    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        trees = [Tree(row["prompt_ids"], row["completion_ids"]) for row in rows]
        batch = lay_out_scores(trees, self.layout, self.pad_token_id)
        batch["ranks"] = torch.tensor([rank for row in rows for rank in row["ranks"]], dtype=torch.float64)
        for key in ("p", "margin"):
            batch[key] = torch.tensor([float(row[key]) for row in rows], dtype=torch.float64)
        ratings = [row.get("scores") or [math.nan] * len(row["ranks"]) for row in rows]
        batch["ratings"] = torch.tensor([rating for one in ratings for rating in one], dtype=torch.float64)
        assert len(batch["ratings"]) == len(batch["ranks"]), "one score of the data a completion, if any"
        assert len(batch["ranks"]) == len(batch["tree"]), "one rank a completion"
        return batch | one_label_a_row(len(rows))


def one_label_a_row(rows: int) -> dict[str, Tensor]:
    """Labels (rows,) for the Trainer, whose num_items_in_batch then counts rows.

    `shift_labels` is what it counts for models whose own loss shifts labels (transformers 5.23, contract test).
    """
    labels = torch.ones(rows, dtype=torch.long)
    return {"labels": labels, "shift_labels": labels}
