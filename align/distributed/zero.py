"""The DeepSpeed dictionary, and the choice that `deepspeed=auto` makes."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import nn

from align.config.schema import DeepSpeedConfig, Offload, ZeroChoice
from align.distributed.memory import Sharding, size_words, verdict

WORDS = {"fits": "fits", "tight": "may fit"}


def join_process_group(backend: str, timeout: timedelta) -> None:
    """Start the process group through DeepSpeed, so that `zero.Init` sees every rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if backend == "nccl" else "cpu")
    import deepspeed

    # It prints what it compiled, on the standard output, which is for the summary.
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


@dataclass(frozen=True)
class Choice:
    """How states are spread, why, and whether that fits as far as it was asked."""

    sharding: Sharding
    reason: str
    fits: bool = True


def choose(config: DeepSpeedConfig, *, ranks: int, memory: float, peak: Callable[[Sharding], float]) -> Choice:
    """The way to spread states that the config asks for; for `auto` the least sharding that fits.

    memory: of one device. peak: what a rank takes at most, in bytes; asked for `auto` alone. One rank has nothing to
    share, so `auto` is plain PyTorch there. If nothing fits, the choice is the smallest of all and says so.
    """
    if config.mode is ZeroChoice.none:
        return Choice(Sharding(None, False, ranks), "deepspeed=none")
    if config.mode is ZeroChoice.zero:
        return Choice(Sharding(config.stage, config.offload is Offload.cpu, ranks), "asked for")
    candidates = [Sharding(stage, False, ranks) for stage in ((None,) if ranks == 1 else (1, 2, 3))]
    peaks = {one: peak(one) for one in candidates}
    for word in ("fits", "tight"):
        for one, bytes_ in peaks.items():
            if verdict(bytes_, memory) == word:
                first = "one rank has nothing to share" if ranks == 1 else f"least sharding that {WORDS[word]}"
                return Choice(one, f"{first}: {size_words(bytes_)} of {size_words(memory)}")
    least = min(peaks, key=lambda one: peaks[one])
    return Choice(least, f"nothing fits: {size_words(peaks[least])} of {size_words(memory)}", fits=False)


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
