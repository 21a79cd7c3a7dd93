"""Training of a reward model on transformers' Trainer: trees with ranks in, one loss a tree out."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from align.config.schema import Layout, Order
from align.data.forest import RewardCollator
from align.losses.reward import RewardObjective, TreeScores, pairs_in_trees
from align.models.reward import score_batch
from align.trainers.trees import TreeTrainer

METRICS = (
    "loss", "pairs", "ordered_pairs", "gaps", "completions", "scores", "squares", "untied", "chosen", "rejected",
)  # fmt: skip
"""The columns of a tree's metrics: sums over its completions or untied pairs, and the numbers of those."""


class RewardTrainer(TreeTrainer):
    """Trains a scorer (`align.models.reward`) on trees.

    Datasets have the columns prompt_ids, completion_ids, ranks, p, margin (see `RewardCollator`).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: RewardObjective,
        *,
        layout: Layout,
        pad_token_id: int,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        order: Order = Order.shuffled,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.objective = objective
        super().__init__(
            model,
            args,
            layout=layout,
            data_collator=RewardCollator(layout, pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            order=order,
            processing_class=processing_class,
            callbacks=callbacks,
        )

    def tree_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss of each tree (trees,), with gradient, and its metrics (trees, METRICS), without."""
        seen = TreeScores(
            scores=score_batch(model, batch),
            ranks=batch["ranks"],
            tree=batch["tree"],
            p=batch["p"],
            margin=batch["margin"],
        )
        losses = self.objective(seen)
        return losses, tree_metrics(losses.detach(), seen)

    def figures(self, means: list[float]) -> dict[str, float]:
        """Accuracy and margin over untied pairs, scores over completions; without untied pairs only what is left."""
        mean = dict(zip(METRICS, means, strict=True))
        centre = mean["scores"] / mean["completions"]
        variance = mean["squares"] / mean["completions"] - centre**2
        figures = {"loss": mean["loss"], "score/mean": centre, "score/std": max(variance, 0.0) ** 0.5}
        if mean["pairs"]:
            figures |= {
                "accuracy": mean["ordered_pairs"] / mean["pairs"],
                "margin": mean["gaps"] / mean["pairs"],
                "score/chosen": mean["chosen"] / mean["untied"],
                "score/rejected": mean["rejected"] / mean["untied"],
            }
        return figures


def tree_metrics(losses: Tensor, seen: TreeScores) -> Tensor:
    """What `figures` are made of, float64 (trees, METRICS).

    A pair counts as tied if its ranks are equal or its p is 0.5. A gap is the better completion's score less the
    worse one's; a pair with equal scores is half in order. Chosen and rejected are the mean scores of the best and of
    the worst rank.
    """
    scores, trees = seen.scores.detach().double(), len(losses)
    better, worse = pairs_in_trees(seen.ranks, seen.tree)
    decided = seen.p[seen.tree[better]] != 0.5
    better, worse = better[decided], worse[decided]
    gaps = scores[better] - scores[worse]

    def sums(values: Tensor, tree: Tensor) -> Tensor:
        return scores.new_zeros(trees).index_add(0, tree, values)

    pairs = sums(torch.ones_like(gaps), seen.tree[better])
    untied = (pairs > 0).to(scores)
    columns = [losses.double(), pairs, sums(0.5 + 0.5 * torch.sign(gaps), seen.tree[better])]
    columns += [sums(gaps, seen.tree[better])]
    columns += [sums(values, seen.tree) for values in (torch.ones_like(scores), scores, scores**2)]
    columns += [untied] + [untied * _mean_at_rank(scores, seen, trees, extreme) for extreme in ("amin", "amax")]
    return torch.stack(columns, dim=1)


def _mean_at_rank(scores: Tensor, seen: TreeScores, trees: int, extreme: str) -> Tensor:
    """Mean score of the completions that share a tree's first (amin) or last (amax) rank, (trees,)."""
    ranks = seen.ranks.to(scores)
    chosen_rank = scores.new_zeros(trees).scatter_reduce(0, seen.tree, ranks, extreme, include_self=False)
    at_rank = (ranks == chosen_rank[seen.tree]).to(scores)
    zeros = scores.new_zeros(trees)
    return zeros.index_add(0, seen.tree, scores * at_rank) / zeros.index_add(0, seen.tree, at_rank)
