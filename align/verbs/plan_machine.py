"""The machine that `do=plan` plans for: this one, or the one that `plan.gpus` and `plan.gpu_memory_gib` describe."""

import torch

from align.config.errors import UserError
from align.config.schema import Precision, RunConfig
from align.distributed.devices import device_memory, host_share
from align.distributed.memory import GIB, RESERVE
from align.distributed.runtime import launched_world_size
from align.models.load import use_bf16
from align.stages.needs import Target


def planned_target(config: RunConfig) -> Target:
    """The machine as it is here, where the keys do not say otherwise.

    Raises: UserError if GPUs are to be planned for whose memory is not known.
    """
    plan, here = config.plan, torch.cuda.is_available()
    cuda = here or plan.gpu_memory_gib is not None
    if plan.gpus is not None and not cuda:
        raise UserError(f"plan.gpus={plan.gpus}: there is no GPU here to look at; add plan.gpu_memory_gib=80")
    memory = (
        plan.gpu_memory_gib * GIB if plan.gpu_memory_gib is not None else device_memory("cuda:0" if here else "cpu")
    )
    elsewhere = plan.gpus is not None or plan.gpu_memory_gib is not None
    # A GPU that is not here is taken for one that has bf16.
    bf16 = config.precision is not Precision.fp32 if cuda and not here else use_bf16(config.precision, _device(cuda))
    ranks = plan.gpus if plan.gpus is not None else launched_world_size()
    return Target(ranks, memory, None if elsewhere else host_share(), cuda, bf16)


def _device(cuda: bool) -> str:
    return "cuda:0" if cuda else "cpu"


def target_lines(config: RunConfig, target: Target) -> list[str]:
    """What is planned for, in words."""
    one = "GPU" if target.cuda else "rank, its share of main memory"
    where = "as plan.* says" if target.host is None else "as it is here"
    launcher = (
        "" if target.host is None or target.ranks > 1 else "; plan.gpus=8 plan.gpu_memory_gib=80 plans for others"
    )
    return [
        f"plan of {config.name}: {', '.join(config.run)}",
        f"machine  {target.ranks} rank{'s' * (target.ranks > 1)}, {target.memory / GIB:.1f} GiB a {one}, of which "
        f"{RESERVE / GIB:.0f} GiB is left to the libraries; {'bf16' if target.bf16 else 'fp32'} ({where}{launcher})",
    ]
