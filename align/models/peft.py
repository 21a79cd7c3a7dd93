"""Adapters: put on a model, folded back into it, or loaded with it where they cannot be folded."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig as AdapterConfig
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from transformers import PreTrainedModel

from align.config.errors import UserError
from align.config.schema import AdapterStart, ModelConfig, PeftConfig, PeftMethod
from align.models.adapters.configs import adapter_config
from align.models.adapters.quantised import dequantised, is_quantised, quantisation, start_from_rounding
from align.models.load import load_model
from align.models.reward import load_reward_model


def add_adapter(
    model: PreTrainedModel, peft: PeftConfig, *, seed: int, zero3: bool, task: TaskType = TaskType.CAUSAL_LM
) -> PreTrainedModel | PeftModel:
    """The model with a fresh adapter, whose weights are drawn from `seed`; the model itself for peft=none.

    task: with SEQ_CLS the score head is trained whole, and is a part of the adapter.
    Raises: UserError if target_modules name a layer that is not there, or the output layer.
    """
    if peft.method is PeftMethod.none:
        return model
    torch.manual_seed(seed)
    config = adapter_config(model, peft, task)
    try:
        with quiet_peft():
            # ZeRO-3 gathers parameters in one buffer of one dtype, so adapters stay in the base's there.
            adapted = get_peft_model(model, config, autocast_adapter_dtype=not zero3)
    except ValueError as error:
        raise UserError(f"peft.target_modules={peft.target_modules}: {error}") from error
    if config.is_prompt_learning and not isinstance(config, PrefixTuningConfig):
        # Hidden states of these come first; a scorer counts its positions behind them.
        model.virtual_tokens = config.num_virtual_tokens
    if peft.init is AdapterStart.loftq and is_quantised(model):
        start_from_rounding(adapted, model.name_or_path)
    if not zero3:
        train_in_fp32(adapted)
    return adapted


def train_in_fp32(model: torch.nn.Module) -> None:
    """PEFT casts what it adds, but not a head that it trains whole: small steps would be lost in bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without PEFT's warnings of what is meant: AdaLoRA's matrices of rank 0, and ranks under names it knows later."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


def merged_model(
    policy: str, adapter_dir: Path, model: ModelConfig, *, seed: int, peft: PeftConfig | None = None, bf16: bool = False
) -> PreTrainedModel:
    """The base in fp32 with the adapter of `adapter_dir` folded in; a reward model if the adapter has a score head.

    peft: with qlora the base is what its 4 bits stand for, which is what the adapter was trained on.
    bf16: whether it was trained in that.
    """
    scores = AdapterConfig.from_pretrained(str(adapter_dir)).task_type == TaskType.SEQ_CLS
    rounded = None if peft is None else quantisation(peft, bf16=bf16)
    load_any = load_reward_model if scores else load_model
    base = load_any(policy, model, torch.float32, seed=seed, quantisation=rounded)
    base = base if rounded is None else dequantised(base)
    with quiet_peft():
        return PeftModel.from_pretrained(base, str(adapter_dir)).merge_and_unload()
