"""Scores of a reward model for every completion of a data set, without gradients."""

import math

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from align.data.forest import RewardCollator
from align.models.reward import score_batch
from align.tracking.progress import Progress
from align.trainers.order import tree_tokens


def completion_scores(
    model: nn.Module,
    rows: Dataset,
    *,
    collator: RewardCollator,
    accelerator: Accelerator,
    micro_batch_size: int,
    label: str,
) -> list[np.ndarray]:
    """Scores (K,) in float64 of the completions of each row, in order, on every rank.

    rows: with prompt_ids, completion_ids, ranks, p, margin. Ranks of the process group share the batches. Rows are
    taken longest first, so that batches are even and one too large fails at once.
    """
    order = np.argsort(-tree_tokens(rows), kind="stable").tolist()
    batches = [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    starts = np.concatenate([[0], np.cumsum([len(ranks) for ranks in rows["ranks"]])])
    scores = torch.zeros(int(starts[-1]), dtype=torch.float64, device=accelerator.device)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    progress = Progress(label, len(batches), active=rank == 0, passing=True)
    training = model.training
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        # Every rank runs the same number of forwards: ZeRO-3 gathers weights in each.
        for turn in range(math.ceil(len(batches) / ranks)):
            index = turn * ranks + rank
            taken = batches[min(index, len(batches) - 1)]
            batch = collator([rows[row] for row in taken])
            found = score_batch(model, {key: value.to(accelerator.device) for key, value in batch.items()})
            if index < len(batches):
                places = [place for row in taken for place in range(starts[row], starts[row + 1])]
                scores[places] = found.to(scores)
            progress.show(min((turn + 1) * ranks, len(batches)))
    model.train(training)
    whole = accelerator.reduce(scores, reduction="sum").cpu().numpy()
    return np.split(whole, starts[1:-1]) if len(rows) else []
