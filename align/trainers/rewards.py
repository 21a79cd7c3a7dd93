"""Training of a reward model on transformers' Trainer: trees with ranks in, one loss a tree out."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from align.config.schema import Layout, Order
from align.data.forest import RewardCollator
from align.losses.reward import Objective, RewardObjective, TreeScores, pairs_in_trees
from align.models.cut_points import cut_parameter
from align.models.reward import score_and_cuts
from align.trainers.trees import TreeTrainer

METRICS = (
    "loss", "pairs", "ordered_pairs", "gaps", "completions", "scores", "squares", "untied", "chosen", "rejected",
    "rated", "rated_scores", "rated_squares", "ratings", "rating_squares", "products", "rating_errors",
)  # fmt: skip
"""The columns of a tree's metrics: sums over its completions, untied pairs or rated completions, and their numbers."""

CUT_LEARNING_RATE = 1e-2
"""Peak learning rate of cut points. They are a few numbers in logits, started near where they belong, whatever the
model's size; at the weights' rate of some 1e-5 an Adam step moves each by that much, which is not at all."""


class RewardTrainer(TreeTrainer):
    """Trains a scorer (`align.models.reward`) on trees.

    Datasets have the columns prompt_ids, completion_ids, ranks, p, margin, scores (see `RewardCollator`). For an
    ordinal objective the model has cut points (`align.models.cut_points`).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective,
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
        scores, above = score_and_cuts(model, batch)
        seen = TreeScores(
            scores=scores,
            ranks=batch["ranks"],
            tree=batch["tree"],
            p=batch["p"],
            margin=batch["margin"],
            ratings=batch["ratings"],
            above=above,
        )
        losses = self.objective(seen)
        with torch.no_grad():
            predicted = self.objective.predicted(seen)
        metrics = torch.cat([tree_metrics(losses.detach(), seen), rating_metrics(seen, predicted)], dim=1)
        return losses, metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's own, with cut points in a group of their own, which has its learning rate and no decay."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        cuts = cut_parameter(self.model)
        if made and cuts is not None:
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter is not cuts]
            optimizer.add_param_group({"params": [cuts], "lr": CUT_LEARNING_RATE, "weight_decay": 0.0})
        return optimizer

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
        return figures | self._rating_figures(mean)

    def _rating_figures(self, mean: Mapping[str, float]) -> dict[str, float]:
        """Correlation of scores with the data's, and the error of the ratings that scores stand for, where they do."""
        if not mean["rated"]:
            return {}
        of_one = {name: value / mean["rated"] for name, value in mean.items()}
        scores = of_one["rated_squares"] - of_one["rated_scores"] ** 2
        ratings = of_one["rating_squares"] - of_one["ratings"] ** 2
        figures = {}
        if scores > 0 and ratings > 0:
            product = of_one["products"] - of_one["rated_scores"] * of_one["ratings"]
            figures["rating/pearson"] = product / (scores * ratings) ** 0.5
        if not isinstance(self.objective, RewardObjective):
            figures["rating/rmse"] = of_one["rating_errors"] ** 0.5
        return figures


def tree_metrics(losses: Tensor, seen: TreeScores) -> Tensor:
    """What `figures` are made of but for ratings, float64 (trees, 10): the first METRICS.

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


def rating_metrics(seen: TreeScores, predicted: Tensor | None) -> Tensor:
    """The last seven METRICS, float64 (trees, 7): sums over the completions of which the data has a score."""
    trees, scores = len(seen.p), seen.scores.detach().double()
    there = ~torch.isnan(seen.ratings)
    ratings = seen.ratings.double().masked_fill(~there, 0.0)
    rated = there.double()
    errors = torch.zeros_like(scores) if predicted is None else rated * (predicted.double() - ratings) ** 2
    scores = scores * rated
    columns = (rated, scores, scores**2, ratings, ratings**2, scores * ratings, errors)
    return torch.stack([scores.new_zeros(trees).index_add(0, seen.tree, column) for column in columns], dim=1)


def _mean_at_rank(scores: Tensor, seen: TreeScores, trees: int, extreme: str) -> Tensor:
    """Mean score of the completions that share a tree's first (amin) or last (amax) rank, (trees,)."""
    ranks = seen.ranks.to(scores)
    chosen_rank = scores.new_zeros(trees).scatter_reduce(0, seen.tree, ranks, extreme, include_self=False)
    at_rank = (ranks == chosen_rank[seen.tree]).to(scores)
    zeros = scores.new_zeros(trees)
    return zeros.index_add(0, seen.tree, scores * at_rank) / zeros.index_add(0, seen.tree, at_rank)
