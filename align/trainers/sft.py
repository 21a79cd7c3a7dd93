"""SFT and continued pretraining: TRL's SFTTrainer on rows that are tokenised and masked already."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from align.config.errors import UserError
from align.config.schema import Order, PretrainStage, SFTStage
from align.models.adapters.quantised import is_quantised
from align.models.layout import FLOOR, ROUNDING_SHARE, plain_model
from align.models.peft import train_in_fp32
from align.trainers.next_token import FIGURES, FUSED_OUTPUTS, row_sums, token_figures, trained_figures
from align.trainers.nonfinite import poisoned
from align.trainers.order import ordered_loader, sequence_lengths
from align.trainers.surviving import SurvivingTrainer

EVALUATION_FORWARD = 4
"""Evaluation keeps no gradients, so it takes this many micro-batches at once; its rows are never packed."""
ROWS_SEARCHED = 256
"""Packed rows among which the one for the proof is chosen."""


def sft_arguments(stage: SFTStage | PretrainStage, values: dict[str, Any]) -> SFTConfig:
    """TRL's arguments. Make them before the model is loaded: ZeRO-3 shards while loading only if it is known by then.

    Packing puts whole rows into rows of max_tokens, best fit decreasing; none is cut, because none is longer.
    """
    without_gradients = {"per_device_eval_batch_size": EVALUATION_FORWARD * stage.micro_batch_size}
    # TRL 1.14 leaves a model's scale of the logits (Granite) out of its chunked loss.
    loss = {} if FUSED_OUTPUTS else {"loss_type": "nll"}
    return SFTConfig(
        **(values | without_gradients | loss),
        max_length=stage.max_tokens if stage.packing else None,
        packing=stage.packing,
        packing_strategy="bfd",
        eval_packing=False,
        shuffle_dataset=stage.packing,
    )


def build_sft_trainer(
    model: PreTrainedModel,
    arguments: SFTConfig,
    train: Dataset,
    held_out: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
    *,
    stage_name: str,
) -> SFTTrainer:
    """A trainer over rows of `input_ids` and `labels` (-100: not trained), each at most max_length long.

    Raises: UserError, when training begins, if the model does not compute packed rows exactly.
    """
    trainer = TokenWeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if is_quantised(plain_model(model)):
        train_in_fp32(model)  # TRL has cast what is trained on 4 bits to bf16, in which small steps are lost
    if arguments.packing:
        trainer.add_callback(ProvePacking(trainer, stage_name))
    return trainer


class TokenWeightedTrainer(SurvivingTrainer, SFTTrainer):
    """TRL's trainer, whose figures on held-out rows are means over their trained tokens, however they are batched."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, compute_metrics=token_means)
        self._sums: Tensor | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Rows that are not packed in an order of ours, the longest early; packed ones are all nearly as long."""
        if self.args.packing or self.args.train_sampling_strategy == "sequential":
            return super().get_train_dataloader()
        return ordered_loader(self, sequence_lengths(self.train_dataset), Order.shuffled)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """TRL's, whose figures cost four collectives a micro-batch; ours are added up here and meet in `log`."""
        if return_outputs or not FUSED_OUTPUTS or self.aux_loss_enabled or not model.training:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return (poisoned(found[0]), found[1]) if return_outputs else poisoned(found)
        logps, entropy, hits, tokens = trained_figures(model, inputs)
        found = torch.stack([entropy, hits, tokens])
        self._sums = found if self._sums is None else self._sums + found
        counted = tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -logps / counted.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over ranks, and `counted` is of all ranks.
            loss = loss * self.accelerator.num_processes
        return poisoned(loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means over the tokens since the last line, of all ranks."""
        if "loss" in logs and self._sums is not None:
            sums = self.accelerator.reduce(self._sums.double(), reduction="sum").tolist()
            self._sums = None
            logs |= {name: total / max(sums[-1], 1) for name, total in zip(FIGURES[1:], sums[:-1], strict=True)}
        super().log(logs, start_time)

    def figures_so_far(self) -> tuple[Tensor | None, dict[str, int]]:
        return self._sums, {name: len(values) for name, values in self._metrics["train"].items()}

    def forget_figures(self, before: tuple[Tensor | None, dict[str, int]]) -> None:
        self._sums, of_trl = before
        figures = self._metrics["train"]
        for name in list(figures):
            del figures[name][of_trl.get(name, 0) :]
            # TRL divides by the number of values.
            if not figures[name]:
                del figures[name]

    def create_model_card(self, **kwargs: Any) -> None:
        """None: checkpoints are private, and the manifest says how a policy was made."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of each row take the place of logits: the Trainer gathers them and drops repeated rows."""
        inputs = {k: v.to(self.args.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = row_sums(model, inputs)
        return sums[:, 0].sum() / sums[:, -1].sum().clamp(min=1), sums, sums[:, -1]


def token_means(prediction: EvalPrediction) -> dict[str, float]:
    """Means over the gathered rows' tokens; `loss` replaces the Trainer's, which is a mean over batches."""
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    return dict(zip(FIGURES, (sums[:-1] / max(sums[-1], 1)).tolist(), strict=True))


class ProvePacking(TrainerCallback):
    """Before the first step: a real packed row must have the log-probabilities that its sequences have alone."""

    def __init__(self, trainer: SFTTrainer, stage_name: str):
        self.trainer, self.stage_name = trainer, stage_name

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.model
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                problem = packing_problem(model, self.trainer.train_dataset, self.trainer.data_collator, args)
        finally:
            model.train(training)
        if problem is not None:
            raise UserError(
                f"{type(plain_model(model)).__name__} cannot tell apart what is packed into one row ({problem}); "
                f"set stages.{self.stage_name}.packing=false"
            )


def packing_problem(
    model: nn.Module, rows: Dataset, collator: DataCollatorForLanguageModeling, args: SFTConfig
) -> str | None:
    """Why `model` computes a packed row wrongly, or None if it is exact, or no row holds two sequences.

    What may differ is rounding: what right padding, exact for every causal model, differs by, and in bf16 a small share
    of what a forward that takes the whole row for one sequence differs by.
    """
    row = _fullest(rows)
    if row is None:
        return None
    alone = list(_sequences(row))
    padding = DataCollatorForLanguageModeling(collator.pad_token_id)
    batch = collator([row])
    try:
        packed = _token_logps(model, batch, args.device)
    # A model may fail in its own way on a packed row; each way is a no, and is quoted.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    expected = torch.cat([_token_logps(model, padding([one]), args.device) for one in alone])

    def difference(logps: Tensor) -> float:
        return (logps - expected).abs().mean().item()

    dtype = torch.bfloat16 if args.bf16 else plain_model(model).dtype
    allowed = FLOOR[dtype] + 3 * difference(_token_logps(model, padding(alone), args.device))
    if dtype.itemsize == 2:
        mixed = {"input_ids": row["input_ids"], "labels": batch["labels"][0].tolist()}
        allowed += ROUNDING_SHARE * difference(_token_logps(model, padding([mixed]), args.device))
    if difference(packed) <= allowed:
        return None
    return f"log-probabilities differ by {difference(packed):.2g} on average from a plain forward"


def _token_logps(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """Log-probability of every trained token, row after row."""
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    losses, _, _, mask = token_figures(model, on_device)
    return -losses[mask].float().cpu()


def _fullest(rows: Dataset) -> dict[str, list[int]] | None:
    """Of the first packed rows, the one with the most tokens in at least two sequences."""
    lengths = rows[:ROWS_SEARCHED]["seq_lengths"]
    candidates = [index for index, parts in enumerate(lengths) if len(parts) > 1]
    return rows[max(candidates, key=lambda index: sum(lengths[index]))] if candidates else None


def _sequences(row: dict[str, list[int]]) -> Iterator[dict[str, list[int]]]:
    start = 0
    for length in row["seq_lengths"]:
        yield {key: row[key][start : start + length] for key in ("input_ids", "labels")}
        start += length
