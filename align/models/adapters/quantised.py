"""A base in 4 bits (NF4, bitsandbytes): loaded, made whole again, and LoftQ's start for what the rounding has lost."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from align.config.errors import UserError
from align.config.schema import PeftConfig, PeftMethod, Precision
from align.models.cut_points import SCORE_HEAD

KEPT_WHOLE = ("lm_head", "embed_out", "output", SCORE_HEAD)
"""Layers that read the hidden states out: rounding them would change every token's probability at once."""


def quantisation(peft: PeftConfig, *, bf16: bool) -> Any | None:
    """What `from_pretrained` is told, for qlora; None for any other method. bf16: whether the run computes in it.

    Raises: UserError if bitsandbytes is not installed.
    """
    if peft.method is not PeftMethod.qlora:
        return None
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "peft=qlora needs bitsandbytes, which is not installed; pip install 'align-train[qlora]', or use peft=lora"
        )
    from transformers import BitsAndBytesConfig

    half = bf16 if peft.compute_precision is Precision.auto else peft.compute_precision is Precision.bf16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=peft.double_quantisation,
        bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
        llm_int8_skip_modules=list(KEPT_WHOLE),
    )


def is_quantised(model: nn.Module) -> bool:
    """Whether a model was loaded with `quantisation`."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def compute_exactly(model: nn.Module) -> None:
    """Judge and sample with the numbers that are trained on.

    In eval mode on a CPU with AVX-512, bitsandbytes 0.50 packs the weights anew for a bf16 kernel, for good: logits
    were off by 0.5 % from then on, in training too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain linear layers that hold what its 4 bits stand for, in fp32."""
    whole = model.dequantize().float()
    if hasattr(whole.config, "quantization_config"):
        # Else the saved config would say that these weights are to be read as 4 bits.
        del whole.config.quantization_config
    return whole


def start_from_rounding(model: nn.Module, path: str) -> None:
    """LoftQ: the adapters of a quantised model start from what rounding has taken off the weights (arXiv:2310.08659).

    path: the folder of the weights. Raises: UserError if they are not one safetensors file, the only kind PEFT reads.
    """
    from peft import replace_lora_weights_loftq

    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    if len(files) != 1:
        raise UserError(
            f"peft.init=loftq: {path} is no folder with one safetensors file, which PEFT reads the exact weights from; "
            "save the model there as one file, or leave init out"
        )
    replace_lora_weights_loftq(model, model_path=str(files[0]))
