"""What a run says of its adapter, and how it is written: alone, beside the model that it is folded into or sits on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig

from align.config.adapters import VIRTUAL_TOKENS
from align.config.schema import Layout, PeftMethod
from align.distributed import memory, zero
from align.distributed.memory import Sharding, size_words
from align.models.layout import plain_model
from align.tracking.progress import say

START = "adapter_start"
"""PiSSA takes its start out of the base: it is kept, so that the adapter can be saved for the base as it was."""


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are; also of one whose parameters are shared out."""
    trained = sum(_numbers(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(map(_numbers, model.parameters()))


def trained_words(session: Any, model: nn.Module) -> str:
    """How many parameters are trained, of how many, and the memory that `do=plan` counts for them.

    session: an `align.stages.session.Session`.
    """
    trained, total = parameter_counts(model)
    peft, machine = session.context.config.peft, session.machine
    offload = session.context.config.deepspeed.offload.value != "none" and machine.zero is not None
    sharding = Sharding(session.zero_stage, offload, machine.world_size)
    form = memory.form_of(bf16=machine.bf16, deepspeed=machine.zero is not None, adapters=True)
    parts = memory.state_bytes(trained, total - trained, sharding, form)
    rounded = sum(_numbers(parameter) for parameter in model.parameters() if _is_packed(parameter))
    parts["weights"] -= memory.saved_by_rounding(rounded, form, double=peft.double_quantisation)
    words = ", ".join(f"{name} {size_words(size)}" for name, size in parts.items())
    return (
        f"peft={peft.method.value} trains {trained:,} of {total:,} parameters ({trained / total:.2%}); "
        f"do=plan counts {size_words(sum(parts.values()))} a rank for them ({words})"
    )


def padded_for_adapter(session: Any) -> Layout | None:
    """The layout that virtual tokens need, said with its reason; None for a method that takes what the base takes.

    Layouts are proven on the base, whose forest says nothing of a policy with virtual tokens.
    """
    method = session.context.config.peft.method
    if method not in VIRTUAL_TOKENS:
        return None
    reason = f"peft={method.value} puts its virtual tokens in front of every row"
    say(f"{session.context.stage_name}: layout padded ({reason})", active=session.context.runtime.is_main)
    return Layout.padded


def rounding_key(session: Any) -> dict[str, Any]:
    """What rounding a base to 4 bits adds to the key of its numbers; nothing where it is not rounded."""
    peft = session.context.config.peft
    if peft.method is not PeftMethod.qlora:
        return {}
    return {"nf4": [peft.double_quantisation, peft.compute_precision.value]}


def _numbers(parameter: nn.Parameter) -> int:
    """How many a parameter holds: whole, where ZeRO-3 has sharded it; two in each byte, where it is in 4 bits."""
    return getattr(parameter, "ds_numel", parameter.numel()) * (2 if _is_packed(parameter) else 1)


def _is_packed(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ == "Params4bit"


def keep_start(model: PeftModel, folder: Path) -> None:
    """Write the adapter as it starts, before training, for `write_adapter`."""
    config = model.active_peft_config
    method, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(str(folder / START))
    config.init_lora_weights = method


def write_adapter(model: PeftModel, folder: Path, start: Path, *, main: bool) -> None:
    """Write the adapter alone, such that it gives the same on the base as it was. Call it on every rank.

    start: of `keep_start`, if there is one: PEFT then writes what has changed since, at twice the rank.
    """
    options = {"path_initial_model_for_weight_conversion": str(start)} if start.is_dir() else {}
    with zero.whole([parameter for parameter in model.parameters() if parameter.requires_grad]):
        if main:
            model.save_pretrained(str(folder), **options)
            shutil.rmtree(start, ignore_errors=True)


def write_with_base(model: nn.Module, adapter: Path, folder: Path, finish: Callable[[PreTrainedConfig], None]) -> None:
    """A folder of base + adapter: the adapter, which names its base, and the config of the whole."""
    shutil.copytree(adapter, folder)
    base = plain_model(model)
    finish(base.config)
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder)
