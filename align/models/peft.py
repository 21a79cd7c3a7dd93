"""Adapters: put on a model, and folded back into it."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft import PeftConfig as AdapterConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.config.errors import UserError
from align.config.schema import ModelConfig, PeftConfig, PeftMethod
from align.models.load import load_model
from align.models.reward import SCORE_HEAD, load_reward_model

ALL_LINEAR = "all-linear"


def add_adapter(
    model: PreTrainedModel, peft: PeftConfig, *, seed: int, zero3: bool, task: TaskType = TaskType.CAUSAL_LM
) -> PreTrainedModel | PeftModel:
    """The model with a fresh adapter, whose weights are drawn from `seed`; the model itself for peft=none.

    task: with SEQ_CLS the score head is trained whole, and is a part of the adapter.
    Raises: UserError if target_modules name a layer that is not there, or the output layer.
    """
    if peft.method is PeftMethod.none:
        return model
    targets = target_modules(model, peft.target_modules)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=peft.r,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        target_modules=targets,
        task_type=task,
    )
    try:
        # ZeRO-3 gathers parameters in one buffer of one dtype, so adapters stay in the base's there.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=not zero3)
    except ValueError as error:
        raise UserError(f"peft.target_modules={peft.target_modules}: {error}") from error
    if not zero3:
        _train_in_fp32(adapted)
    return adapted


def _train_in_fp32(model: PeftModel) -> None:
    """PEFT casts what it adds, but not a head that it trains whole: small steps would be lost in bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def target_modules(model: PreTrainedModel, wanted: Any) -> str | list[str]:
    """`all-linear` (every linear layer but the output layer), or names of linear layers that are all there.

    The output layer is refused: SFT computes log-probabilities past an adapter on it, and merging into weights that it
    shares with the embeddings would change those too. A score head is trained whole.
    Raises: UserError naming what the model has.
    """
    if wanted == ALL_LINEAR:
        return ALL_LINEAR
    names = [wanted] if isinstance(wanted, str) else wanted
    outputs = (model.get_output_embeddings(), getattr(model, SCORE_HEAD, None))
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in outputs
    ]
    known = ", ".join(sorted({layer.rsplit(".", 1)[-1] for layer in layers}))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"peft.target_modules={wanted}: must be {ALL_LINEAR} or a list of {known}")
    for name in names:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise UserError(f"peft.target_modules: no layer for an adapter is called {name}; this model has {known}")
    return names


def merged_model(policy: str, adapter_dir: Path, model: ModelConfig, *, seed: int) -> PreTrainedModel:
    """The base in fp32 with the adapter of `adapter_dir` folded in; a reward model if the adapter has a score head."""
    scores = AdapterConfig.from_pretrained(str(adapter_dir)).task_type == TaskType.SEQ_CLS
    base = (load_reward_model if scores else load_model)(policy, model, torch.float32, seed=seed)
    assert isinstance(base, PreTrainedModel)
    return PeftModel.from_pretrained(base, str(adapter_dir)).merge_and_unload()
