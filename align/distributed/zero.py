"""The DeepSpeed dictionary, and the choice that `deepspeed=auto` makes."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from torch import nn

from align.config.errors import UserError
from align.config.schema import DeepSpeedConfig, Offload, ZeroChoice

# Bytes a parameter costs in mixed-precision Adam: weight 2, gradient 2, fp32 master, momentum and variance 12.
# Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1.
WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 2, 12
STATES_SHARE_OF_MEMORY = 0.7
"""Share of a GPU that model states may take; the rest is for activations and logits."""


def join_process_group(backend: str, timeout: timedelta) -> None:
    """Start the process group through DeepSpeed, so that `zero.Init` sees every rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if backend == "nccl" else "cpu")
    import deepspeed

    # It prints what it compiled, on the standard output, which is for the summary.
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def state_bytes(parameters: int, world_size: int, stage: int) -> float:
    """Bytes of model states per rank for full training at a ZeRO stage. Source: arXiv:1910.02054, figure 1."""
    weights = parameters * WEIGHT_BYTES / (world_size if stage >= 3 else 1)
    gradients = parameters * GRADIENT_BYTES / (world_size if stage >= 2 else 1)
    optimizer = parameters * OPTIMIZER_BYTES / (world_size if stage >= 1 else 1)
    return weights + gradients + optimizer


def choose(config: DeepSpeedConfig, *, parameters: int, world_size: int, memory_bytes: float) -> tuple[int | None, str]:
    """The ZeRO stage to use (None: no DeepSpeed) and the reason, in words.

    Raises: UserError if `auto` finds no stage whose model states fit; `memory_bytes` is one device's memory.
    """
    if config.mode is ZeroChoice.none:
        return None, "deepspeed=none"
    if config.mode is ZeroChoice.zero:
        return config.stage, "asked for"
    if world_size == 1:
        return None, "one rank has nothing to share"
    budget = STATES_SHARE_OF_MEMORY * memory_bytes
    for stage in (1, 2, 3):
        need = state_bytes(parameters, world_size, stage)
        if need <= budget:
            return stage, f"least sharding that fits: {need / 2**30:.1f} of {memory_bytes / 2**30:.0f} GiB per rank"
    raise UserError(
        f"model states of {parameters / 1e9:.1f}B parameters need {need / 2**30:.0f} GiB per rank even at ZeRO-3 on "
        f"{world_size} ranks of {memory_bytes / 2**30:.0f} GiB; try deepspeed=zero3_offload, peft=lora or more ranks"
    )


def zero_dict(stage: int, offload: Offload, *, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration; `auto` values are filled in by the Trainer from its own arguments.

    No `optimizer` entry: torch's AdamW is used, so that nothing is compiled and losses equal a plain run's.
    """
    zero: dict[str, Any] = {"stage": stage}
    if stage >= 1:
        zero |= {"contiguous_gradients": True, "overlap_comm": bf16}
    if stage == 3:
        # Without it save_model writes no weights, and says nothing (deepspeed 0.19.8, seen 2026-11).
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    if offload is Offload.cpu and stage >= 1:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": bf16}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": bf16}
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        # The Trainer's own torch optimizer is used, also with offload.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **{name: "auto" for name in automatic},
    }


@contextlib.contextmanager
def whole(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has sharded are whole on every rank; what rank 0 writes into them is kept.

    Parameters that are not sharded are left as they are. Call it on every rank.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    # Without modifier_rank what was written is dropped, and nothing is said (deepspeed 0.19.8).
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
        yield


@contextlib.contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has sharded are whole on every rank, to be read. Call it on every rank."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield
