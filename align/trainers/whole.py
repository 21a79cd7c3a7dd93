"""A model in the middle of training, whole and able to generate."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from align.distributed import zero


@contextmanager
def gathered(engine: nn.Module, policy: nn.Module) -> Iterator[None]:
    """Inside, ZeRO-3's parameters of the policy are whole and its hooks are off: one gathering for all that is read.

    Call it on every rank; inside, each may do something else. Without ZeRO-3 nothing happens.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        yield
        return
    from trl.models.utils import add_hooks, remove_hooks

    with zero.gathered(list(policy.parameters())):
        remove_hooks(engine)
        yield
        add_hooks(engine)
