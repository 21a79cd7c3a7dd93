"""Models that a stage has left as base + adapter, loaded for what only asks them: evaluation, scores, chats."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from align.config.errors import UserError
from align.config.schema import ModelConfig
from align.models import load
from align.models.adapters.bottleneck import BottleneckConfig
from align.models.reward import load_reward_model


def load_speaker(name: str, model: ModelConfig, dtype: torch.dtype, *, seed: int) -> nn.Module:
    """As `align.models.load.load_model`, of a folder with a whole model or with an adapter and the name of its base."""
    folder = Path(load.resolve_model(name))
    if not load.is_adapter(folder):
        return load.load_model(name, model, dtype, seed=seed)
    return _with_adapter(load.load_model(load.adapter_base(folder), model, dtype, seed=seed), folder)


def load_scorer(name: str, model: ModelConfig, dtype: torch.dtype, *, seed: int) -> nn.Module:
    """As `align.models.reward.load_reward_model`, in the same way."""
    folder = Path(load.resolve_model(name))
    if not load.is_adapter(folder):
        return load_reward_model(name, model, dtype, seed=seed)
    base = load_reward_model(load.adapter_base(folder), model, dtype, seed=seed)
    config = load.load_config(name, model)
    for key in ("reward_centre", "reward_std", "reward_ratings"):
        if hasattr(config, key):
            setattr(base.config, key, getattr(config, key))
    return _with_adapter(base, folder)


def _with_adapter(base: PreTrainedModel, folder: Path) -> nn.Module:
    """The base with the adapter folded in; with bottleneck layers in it; or, with virtual tokens, under PEFT."""
    try:
        adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(f"{folder}: its adapter does not fit {base.name_or_path} ({reason})") from error
    config = adapted.active_peft_config
    if config.is_prompt_learning:
        if config.peft_type != "PREFIX_TUNING":
            base.virtual_tokens = config.num_virtual_tokens
        return adapted
    return adapted.get_base_model() if isinstance(config, BottleneckConfig) else adapted.merge_and_unload()
