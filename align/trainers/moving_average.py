"""An exponential moving average of the policy's weights, in fp32, on whatever share of them a rank holds."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class MovingAverage:
    """average = decay * average + (1 - decay) * weight after each optimizer step.

    In fp32: at a decay of 0.99 a bf16 average would lose most steps to rounding. Each rank averages what it holds of a
    parameter: all of it, or under ZeRO-3 its own part, so nothing is gathered.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.averages = [held(parameter).detach().float().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(held(parameter).float(), 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages; a second call puts both back, up to the precision of the weights."""
        for place, parameter in enumerate(self.parameters):
            weights = held(parameter)
            before = weights.detach().float().clone()
            weights.copy_(self.averages[place])
            self.averages[place] = before

    def save(self, file: Path) -> None:
        """Write what this rank holds."""
        save_file({str(place): average.cpu().contiguous() for place, average in enumerate(self.averages)}, str(file))

    def load(self, file: Path) -> None:
        """Take up what `save` wrote on this rank."""
        found = load_file(str(file))
        assert len(found) == len(self.averages), f"{file} averages another model"
        for place, average in enumerate(self.averages):
            average.copy_(found[str(place)])


def held(parameter: nn.Parameter) -> Tensor:
    """The values of a parameter that this rank holds: a flat part under ZeRO-3 (`ds_tensor`), else all."""
    return getattr(parameter, "ds_tensor", parameter.data)
