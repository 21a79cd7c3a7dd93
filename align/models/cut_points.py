"""Cut points of an ordinal reward model: parameters of its score head while it is trained, numbers of its config after.

They are a parameter of the head, so that ZeRO-3 gathers them, PEFT trains its copy and checkpoints hold them, all with
the head. A saved reward model has none: it stays a plain one, and other tools read the score alone.
"""

import torch
from torch import Tensor, nn

from align.distributed import zero

SCORE_HEAD, CUTS = "score", "cuts"
PEFT_COPY = f"{SCORE_HEAD}.modules_to_save.default"


def ordered_cuts(free: Tensor) -> Tensor:
    """Rising cut points (K - 1,) from as many free numbers: the first one, then the logarithms of the gaps."""
    return torch.cat([free[:1], free[:1] + torch.cumsum(free[1:].exp(), 0)])


def first_cuts(counts: Tensor) -> Tensor:
    """The free numbers of `ordered_cuts`, (K - 1,) float64, under which a score of 0 predicts the shares of the levels.

    counts (K,): completions of each level, all above 0. For equal scores it is the maximum of the likelihood.
    """
    share = counts.double().cumsum(0)[:-1] / counts.sum()
    cuts = torch.logit(share)
    return torch.cat([cuts[:1], cuts.diff().log()])


def add_cut_points(model: nn.Module, counts: Tensor) -> None:
    """Give the score head cut points to learn, as parameters; from now on its forward returns score - cut as well.

    counts (K,): completions of each level in the rows to train on. Call it before the model is wrapped.
    """
    head = trained_head(model)
    free = first_cuts(counts).to(device=head.weight.device, dtype=head.weight.dtype)
    head.register_parameter(CUTS, nn.Parameter(free))


def cut_points(model: nn.Module) -> list[float] | None:
    """The rising cut points of a model, on every rank; None without. Call it on every rank."""
    free = cut_parameter(model)
    if free is None:
        return None
    with zero.whole([free]):
        return ordered_cuts(free.detach().double().cpu()).tolist()


def cut_parameter(model: nn.Module) -> nn.Parameter | None:
    """The parameter that the cut points are made of, where the model has them."""
    return getattr(trained_head(model), CUTS, None)


def drop_cut_points(model: nn.Module) -> None:
    """Take the cut points off, before a model is saved as a plain one."""
    if cut_parameter(model) is not None:
        delattr(trained_head(model), CUTS)


def trained_head(model: nn.Module) -> nn.Linear:
    """The score head that is trained: under PEFT its copy."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    copies = [module for name, module in found.items() if name.endswith(PEFT_COPY)]
    own = [module for name, module in found.items() if name == SCORE_HEAD or name.endswith(f".{SCORE_HEAD}")]
    [head] = copies or own
    return head
