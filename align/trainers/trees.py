"""Training on trees with transformers' Trainer: one loss a tree, and its mean over the trees of an optimizer step."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from align.config.schema import Layout, Order
from align.models.layout import attach
from align.trainers.nonfinite import poisoned
from align.trainers.order import ordered_loader, tree_lengths
from align.trainers.surviving import SurvivingTrainer


def turn_dropout_off(model: nn.Module) -> None:
    """Set every dropout to zero: what is compared (policy and reference, two scores) must come from one network."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Most attention modules hold theirs as a number.
        if isinstance(module.__dict__.get("attention_dropout"), float):
            module.attention_dropout = 0.0


class TreeTrainer(SurvivingTrainer):
    """One loss a tree; a subclass says what the losses and metrics of a batch are, and what they are called.

    The loss is the mean over the trees of the optimizer step, whatever the split into micro-batches and ranks, a last
    partial batch included. So are the figures of training and evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        layout: Layout,
        data_collator: Callable[[Any], dict[str, Tensor]],
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        order: Order = Order.shuffled,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        assert not args.remove_unused_columns, "the collator needs columns that no model takes"
        turn_dropout_off(model)
        attach(model, layout)
        self.order = order
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
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

    def tree_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss of each tree (trees,), with gradient, and its metrics (trees, M), without."""
        raise NotImplementedError

    def figures(self, means: list[float]) -> dict[str, float]:
        """The figures to log, `loss` among them, from the means (M,) of the metrics over trees."""
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches in the order asked for, the longest early; consecutive ones are dealt out to the ranks.

        Arguments that ask for the rows one after the other are obeyed: so a comparison sees the same rows.
        """
        if self.args.train_sampling_strategy == "sequential":
            return super().get_train_dataloader()
        return ordered_loader(self, tree_lengths(self.train_dataset), self.order)

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch on its device, in its own precision.

        With DeepSpeed the Trainer casts every float of a batch to the model's type. Ours are no inputs of the model: in
        bf16 a log-probability of -100 would be rounded to 1/2 (transformers 5.23).
        """
        return {key: value.to(self.args.device) for key, value in inputs.items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = self.tree_losses(model, inputs)
        if model.training:
            sums = torch.cat([metrics.sum(0), metrics.new_tensor([len(metrics)])])
            self._sums = sums if self._sums is None else self._sums + sums
        trees = len(losses) if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / trees
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over ranks, and `trees` already counts those of all ranks.
            loss = loss * self.accelerator.num_processes
        loss = poisoned(loss.float())
        return (loss, {"metrics": metrics}) if return_outputs else loss

    def figures_so_far(self) -> Tensor | None:
        return self._sums

    def forget_figures(self, before: Tensor | None) -> None:
        self._sums = before

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The metrics of trees take the place of logits: the Trainer gathers them and drops repeated rows."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, metrics = self.tree_losses(model, inputs)
        return losses.mean().float(), metrics, inputs["labels"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures since the last line, weighted by trees over all ranks, to the training line."""
        if "loss" in logs and self._sums is not None:
            sums = self.accelerator.reduce(self._sums, reduction="sum")
            self._sums = None
            figures = self.figures((sums[:-1] / sums[-1]).tolist())
            # The Trainer's own `loss` is the same mean.
            logs |= {name: figure for name, figure in figures.items() if name != "loss"}
        super().log(logs, start_time)

    def mean_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Figures of the gathered trees; `loss` replaces the Trainer's, which gives a short last batch full weight."""
        return self.figures(np.asarray(prediction.predictions, dtype=np.float64).mean(0).tolist())
