"""A base in 4 bits (NF4, bitsandbytes): loaded, made whole again, and LoftQ's start for what the rounding has lost."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
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
    were off by up to 0.9 % from then on, in training too.
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


@torch.no_grad()
def start_from_rounding(model: nn.Module, folder: str) -> None:
    """LoftQ on a base that is rounded already: each update starts as the best one of its rank for what rounding has
    taken off the weight (arXiv:2310.08659, algorithm 1 with one step).

    PEFT's own does it on a GPU alone, from one file alone, and without the scale of the update (peft 0.21.2).
    folder: of the exact weights. Raises: UserError if they are not there as safetensors, under the model's names.
    """
    exact = _Weights(folder)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and _is_packed(layer.get_base_layer()):
            base = layer.get_base_layer()
            lost = exact[name.removeprefix("base_model.model.") + ".weight"].to(base.weight.device).float()
            lost -= _whole(base.weight)
            left, size, right = torch.linalg.svd(lost, full_matrices=False)
            for adapter in layer.active_adapters:
                r, scale = layer.r[adapter], layer.scaling[adapter]
                root = (size[:r] / scale).sqrt()
                layer.lora_A[adapter].weight.copy_(root[:, None] * right[:r])
                layer.lora_B[adapter].weight.copy_(left[:, :r] * root)


def _is_packed(layer: nn.Module) -> bool:
    return type(getattr(layer, "weight", None)).__name__ == "Params4bit"


def _whole(weight: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


class _Weights:
    """Tensors of a model folder, read one at a time."""

    def __init__(self, folder: str) -> None:
        self.folder, self.files = folder, {}
        for file in sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else ():
            with safe_open(file, framework="pt") as tensors:
                self.files |= dict.fromkeys(tensors.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise UserError(
                f"peft.init=loftq: {self.folder} has no safetensors with the exact {name} in it; save the model in a "
                "folder with save_pretrained, or leave init out"
            )
        with safe_open(self.files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)
