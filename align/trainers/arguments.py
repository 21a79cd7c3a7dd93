"""From the typed config to the Trainer's arguments: the one mapping."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from align.config.errors import UserError
from align.config.schema import StageConfig

_FIELDS = {field.name for field in fields(TrainingArguments)}
# transformers 5.20, the last for Python 3.10, knows only the older name.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"


@dataclass(frozen=True)
class Machine:
    """What the arguments need to know of the machine: `zero` is DeepSpeed's dictionary, or None without it."""

    world_size: int
    cuda: bool
    bf16: bool
    zero: dict[str, Any] | None


def accumulation_steps(stage: StageConfig, world_size: int) -> int:
    """Forwards per optimizer step on each rank.

    Raises: UserError if batch_size is not micro_batch_size x ranks x a whole number.
    """
    per_forward = stage.micro_batch_size * world_size
    if stage.batch_size % per_forward:
        raise UserError(
            f"batch_size={stage.batch_size} is no multiple of micro_batch_size={stage.micro_batch_size} x "
            f"{world_size} ranks = {per_forward}; try batch_size={-(-stage.batch_size // per_forward) * per_forward}"
        )
    return stage.batch_size // per_forward


def trainer_arguments(
    stage: StageConfig,
    machine: Machine,
    checkpoints: Path,
    *,
    log_every: int,
    evaluate: bool,
    judge_first: bool,
    paged: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for transformers.TrainingArguments and its subclasses.

    paged: optimizer states that bitsandbytes moves to main memory while a GPU is full.
    `evaluate` is whether held-out rows exist; `judge_first` is whether that comes before the next step, as at step 0.
    """
    saving = stage.save_every > 0
    return {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": stage.micro_batch_size,
        "per_device_eval_batch_size": stage.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(stage, machine.world_size),
        "max_steps": stage.max_steps if stage.max_steps is not None else -1,
        "num_train_epochs": stage.epochs,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": stage.schedule.value,
        "warmup_steps": stage.warmup_fraction,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "optim": "paged_adamw_32bit" if paged else "adamw_torch_fused" if machine.cuda else "adamw_torch",
        CHECKPOINTING: stage.activation_checkpointing,
        "seed": stage.seed,
        "data_seed": stage.seed,
        "bf16": machine.bf16,
        "use_cpu": not machine.cuda,
        "deepspeed": machine.zero,
        "ddp_backend": "gloo" if machine.world_size > 1 and not machine.cuda else None,
        "ddp_find_unused_parameters": False,
        "logging_steps": log_every,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "all",
        "eval_strategy": "steps" if evaluate and stage.eval_every else "no",
        "eval_steps": stage.eval_every or None,
        "eval_on_start": evaluate and judge_first,
        "save_strategy": "steps" if saving else "no",
        "save_steps": stage.save_every or 500,
        # The best one is kept beside the newest ones, not in place of one.
        "save_total_limit": stage.keep_checkpoints + stage.keep_best,
        "average_tokens_across_devices": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": machine.cuda,
        "disable_tqdm": True,
        "report_to": [],
    }
