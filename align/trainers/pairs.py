"""Preference training on transformers' Trainer: a forest of pairs in, one loss a pair out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from align.config.schema import Layout
from align.data.forest import PairCollator
from align.losses.logprobs import completion_lengths, completion_logps, token_logps
from align.losses.pairwise import PairLogps, PairObjective, nll_loss
from align.models.layout import attach, scored_logits


def pair_logps(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and token counts of the completions of a batch of pairs.

    Returns: logps and counts, both (pairs, 2), chosen first.
    """
    token = token_logps(scored_logits(model, batch), batch["targets"])
    completions = 2 * len(batch["labels"])
    logps = completion_logps(token, batch["completion"], completions)
    return logps.view(-1, 2), completion_lengths(batch["completion"], completions).view(-1, 2)


def turn_dropout_off(model: nn.Module) -> None:
    """Set every dropout to zero: the reference is computed once, so policy and reference must see the same network."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Most attention modules hold theirs as a number.
        if isinstance(module.__dict__.get("attention_dropout"), float):
            module.attention_dropout = 0.0


class PairTrainer(Trainer):
    """Trains on pairs with precomputed reference log-probabilities.

    The loss is the mean over the pairs of the optimizer step, whatever the split into micro-batches and ranks, a last
    partial batch included. Datasets have the pair columns and `reference_*_logps` (see `align.trainers.reference`).
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
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        assert not args.remove_unused_columns, "the collator needs columns that no model takes"
        turn_dropout_off(model)
        attach(model, layout)
        self.objective = objective
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(layout, pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            compute_metrics=self.mean_metrics,
        )
        # Both are the Trainer's documented switches: count labels over the whole step, and do not divide again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._sums: Tensor | None = None

    @property
    def metric_names(self) -> list[str]:
        """The columns of `pair_losses`' metrics."""
        names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]
        names += ["logps/chosen", "logps/rejected"]
        return [*names, "nll"] if self.objective.nll_weight else names

    def pair_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = self.pair_losses(model, inputs)
        if model.training:
            sums = torch.cat([metrics.sum(0), metrics.new_tensor([len(metrics)])])
            self._sums = sums if self._sums is None else self._sums + sums
        pairs = len(losses) if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / pairs
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over ranks, and `pairs` already counts those of all ranks.
            loss = loss * self.accelerator.num_processes
        loss = loss.float()
        return (loss, {"metrics": metrics}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The metrics of pairs take the place of logits: the Trainer gathers them and drops repeated rows."""
        inputs = {key: value.to(self.args.device) for key, value in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, metrics = self.pair_losses(model, inputs)
        return losses.mean().float(), metrics, inputs["labels"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last line, weighted by pairs over all ranks, to the training line."""
        if "loss" in logs and self._sums is not None:
            sums = self.accelerator.reduce(self._sums, reduction="sum")
            self._sums = None
            means = dict(zip(self.metric_names, (sums[:-1] / sums[-1]).tolist(), strict=True))
            # The Trainer's own `loss` is the same mean.
            logs |= {name: mean for name, mean in means.items() if name != "loss"}
        super().log(logs, start_time)

    def mean_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Means over the gathered pairs; `loss` replaces the Trainer's, which gives a short last batch full weight."""
        means = np.asarray(prediction.predictions, dtype=np.float64).mean(0)
        return dict(zip(self.metric_names, means.tolist(), strict=True))
