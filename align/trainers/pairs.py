"""Preference training on transformers' Trainer: a forest of pairs in, one loss a pair out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from align.config.schema import Layout, Order
from align.data.balance import stratified_order
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


def tree_tokens(rows: Dataset) -> np.ndarray:
    """Prompt, chosen and rejected tokens of each pair together, int64 (rows,)."""
    columns = rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format("arrow")[:]
    return sum(pc.list_value_length(column).to_numpy().astype(np.int64) for column in columns.itercolumns())


class StratifiedRows:
    """Pairs in the stratified order of an epoch, to be read from first to last.

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
        order: Order = Order.shuffled,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        assert not args.remove_unused_columns, "the collator needs columns that no model takes"
        turn_dropout_off(model)
        attach(model, layout)
        self.objective, self.order = objective, order
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

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches in the order asked for; accelerate deals consecutive ones out to the ranks."""
        if self.order is Order.shuffled:
            return super().get_train_dataloader()
        args = self.args
        in_step = args.gradient_accumulation_steps * self.accelerator.num_processes
        rows = StratifiedRows(
            self.train_dataset,
            micro_batch_size=args.train_batch_size,
            batch_size=args.train_batch_size * in_step,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        loader = DataLoader(
            rows,
            batch_size=args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            drop_last=args.dataloader_drop_last,
        )
        return self.accelerator.prepare(loader)

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
