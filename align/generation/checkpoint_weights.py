"""A model's tensors as its checkpoint files would have them: what another engine loads while the model is trained."""

from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

BASE = "base_layer."


@torch.no_grad()
def checkpoint_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that `save_pretrained` would write, tied weights once, the active adapter folded in.

    The model is not changed: weights without an adapter are its own tensors, to be read at once, and the others are
    made one at a time, summed in fp32 and in the precision of the base. With ZeRO-3 the weights have to be whole.
    Raises: NotImplementedError for adapters other than LoRA.
    """
    named, nothing = _named_tensors(model), {}
    if revert_weight_conversion(model, nothing) is nothing:
        yield from named
    else:
        # In memory transformers stacks experts and renames some tensors; its files, and other engines, do not.
        yield from revert_weight_conversion(model, dict(named)).items()


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by their names without adapters."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    temporary = {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name not in temporary]
    for name, tensor in [*model.named_parameters(), *buffers]:
        path = next((path for path in layers if name.startswith(f"{path}.")), None)
        if path is None:
            yield name, tensor.detach()
            continue
        inside = name.removeprefix(f"{path}.")
        if inside == f"{BASE}weight":
            yield f"{path}.weight", _merged(layers[path], tensor)
        elif inside.startswith(BASE):
            yield f"{path}.{inside.removeprefix(BASE)}", tensor.detach()


def _merged(layer: BaseTunerLayer, weight: Tensor) -> Tensor:
    """The weight of a layer with what its active adapters add to it."""
    if not isinstance(layer, LoraLayer):
        raise NotImplementedError(f"{type(layer).__name__}: only LoRA can be folded into the weights of a rollout")
    whole = weight.detach().float()
    # Autocast would round the product of the two factors to half precision.
    with torch.autocast(weight.device.type, enabled=False):
        for adapter in layer.active_adapters:
            whole = whole + layer.get_delta_weight(adapter).to(whole)
    return whole.to(weight.dtype)
