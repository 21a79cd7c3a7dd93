"""Preference training on transformers' Trainer: a forest of pairs in, one loss a pair out."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from align.config.schema import Layout, Order
from align.data.forest import PairCollator
from align.losses.logprobs import completion_lengths, completion_logps, token_logps
from align.losses.pairwise import PairLogps, PairObjective, nll_loss
from align.models.layout import scored_logits
from align.trainers.trees import TreeTrainer


def pair_logps(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and token counts of the completions of a batch of pairs.

    Returns: logps and counts, both (pairs, 2), chosen first.
    """
    token = token_logps(scored_logits(model, batch), batch["targets"])
    completions = 2 * len(batch["labels"])
    logps = completion_logps(token, batch["completion"], completions)
    return logps.view(-1, 2), completion_lengths(batch["completion"], completions).view(-1, 2)


class PairTrainer(TreeTrainer):
    """Trains on pairs with precomputed reference log-probabilities.

    Datasets have the pair columns and `reference_*_logps` (see `align.trainers.reference`).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: PairObjective,
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
            data_collator=PairCollator(layout, pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            order=order,
            processing_class=processing_class,
            callbacks=callbacks,
        )

    @property
    def metric_names(self) -> list[str]:
        """The columns of `tree_losses`' metrics."""
        names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]
        names += ["logps/chosen", "logps/rejected"]
        return [*names, "nll"] if self.objective.nll_weight else names

    def tree_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss of each pair (pairs,), with gradient, and its metrics (pairs, metric_names), without."""
        logps, tokens = pair_logps(model, batch)
        seen = PairLogps(
            chosen=logps[:, 0],
            rejected=logps[:, 1],
            reference_chosen=batch["reference_chosen_logps"],
            reference_rejected=batch["reference_rejected_logps"],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
            p=batch["p"],
        )
        losses = self.objective(seen)
        return losses, self._metrics_of(losses.detach(), seen)

    def _metrics_of(self, losses: Tensor, seen: PairLogps) -> Tensor:
        chosen, rejected = self.objective.rewards(seen)
        columns = [losses, chosen, rejected, 0.5 + 0.5 * torch.sign(chosen - rejected), chosen - rejected]
        columns += [seen.chosen.detach(), seen.rejected.detach()]
        if self.objective.nll_weight:
            columns.append(nll_loss(seen.chosen.detach(), seen.chosen_tokens))
        return torch.stack(columns, dim=1)

    def figures(self, means: list[float]) -> dict[str, float]:
        return dict(zip(self.metric_names, means, strict=True))
