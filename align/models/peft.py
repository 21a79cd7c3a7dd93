"""Adapters: put on a model, and folded back into it."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from align.config.errors import UserError
from align.config.schema import ModelConfig, PeftConfig, PeftMethod
from align.models.load import load_model


def add_adapter(model: PreTrainedModel, peft: PeftConfig, *, seed: int, zero3: bool) -> PreTrainedModel | PeftModel:
    """The model with a fresh adapter, whose weights are drawn from `seed`; the model itself for peft=none.

    Raises: UserError if target_modules match nothing.
    """
    if peft.method is PeftMethod.none:
        return model
    torch.manual_seed(seed)
    config = LoraConfig(
        r=peft.r,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        target_modules=peft.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        # ZeRO-3 gathers parameters in one buffer of one dtype, so adapters stay in the base's there.
        return get_peft_model(model, config, autocast_adapter_dtype=not zero3)
    except ValueError as error:
        raise UserError(f"peft.target_modules={peft.target_modules}: {error}") from error


def merged_model(policy: str, adapter_dir: Path, model: ModelConfig, *, seed: int) -> PreTrainedModel:
    """The base in fp32 with the adapter of `adapter_dir` folded in."""
    base = load_model(policy, model, torch.float32, seed=seed)
    assert isinstance(base, PreTrainedModel)
    return PeftModel.from_pretrained(base, str(adapter_dir)).merge_and_unload()
