"""What training an adapter needs beyond training: ranks that move (AdaLoRA), and checkpoints that hold all of it."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from align.config.schema import PeftConfig, PeftMethod

STATE = "adapter_state.pt"
ORTHOGONAL_WEIGHT = 0.5
"""Of the penalty that keeps AdaLoRA's directions apart. Source: PEFT's default; arXiv:2303.10512 tries 0.1 to 0.5."""


class RankSchedule(TrainerCallback):
    """Takes AdaLoRA's ranks from where they matter least, step by step; nothing in transformers or TRL would.

    PEFT's own entry keeps the ranks in the adapter's config from the first step on, and then saves checkpoints that are
    cut to them and cannot be taken up; here they get there when training is over (`settle`).
    """

    def __init__(self, peft: PeftConfig) -> None:
        self.peft = peft
        self.pattern: dict[str, list[bool]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Steps are known by now. Short runs have at least one step in which ranks may go."""
        config, steps = _config(model), state.max_steps
        config.total_step, config.deltaT = steps, 1
        config.tfinal = min(int(self.peft.rank_settled_fraction * steps), steps - 1)
        config.tinit = min(int(self.peft.rank_warmup_fraction * steps), steps - config.tfinal - 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """The gradient of weight * mean over matrices of |P P' - 1| (arXiv:2303.10512, equation 4), in every stage.

        After the clipping, so that it does not count for what is logged as the gradient's norm.
        """
        with torch.enable_grad():
            bases = {name: p for name, p in model.named_parameters() if _is_basis(name) and p.grad is not None}
            if not bases:
                return
            rows = [p if ".lora_A." in name else p.T for name, p in bases.items()]
            penalty = ORTHOGONAL_WEIGHT * sum(map(_not_orthogonal, rows)) / len(rows)
            for p, gradient in zip(bases.values(), torch.autograd.grad(penalty, list(bases.values())), strict=True):
                p.grad += gradient

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Gradients are still there. A step that was skipped has none, and moves no ranks."""
        inner, allocator, config = model.base_model.model, model.base_model.rankallocator, _config(model)
        step, last = state.global_step + 1, config.total_step - config.tfinal
        graded = all(p.grad is not None for p in model.parameters() if p.requires_grad)
        if step <= last and (graded or step == last):
            _, pattern = allocator.update_and_allocate(inner, step, force_mask=step == last)
            self.pattern = pattern or self.pattern
        elif self.pattern:
            allocator.mask_using_rank_pattern(inner, self.pattern)

    def settle(self, model: nn.Module) -> None:
        """From now on the adapter is saved with the ranks that are left."""
        _config(model).rank_pattern = self.pattern or None

    def figures(self) -> dict[str, float]:
        """Ranks at the end: the mean over all matrices, and for each kind of layer."""
        kinds: dict[str, list[int]] = defaultdict(list)
        for name, kept in self.pattern.items():
            kinds[name.split(".lora_E")[0].rsplit(".", 1)[-1]].append(sum(kept))
        every = [rank for ranks in kinds.values() for rank in ranks]
        if not every:
            return {}
        means = {f"adapter/rank/{kind}": sum(ranks) / len(ranks) for kind, ranks in sorted(kinds.items())}
        return {"adapter/rank": sum(every) / len(every)} | means

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What goes on from a checkpoint."""
        found = model.base_model.rankallocator
        return {"pattern": self.pattern, "ipt": found.exp_avg_ipt, "unc": found.exp_avg_unc, "at": found.ipt}

    def take_up(self, model: nn.Module, state: dict[str, Any]) -> None:
        """The opposite of `state`."""
        allocator = model.base_model.rankallocator
        self.pattern = state["pattern"]
        allocator.exp_avg_ipt, allocator.exp_avg_unc, allocator.ipt = state["ipt"], state["unc"], state["at"]


class AdapterCallbacks(TrainerCallback):
    """Keeps every trained tensor of an adapter in a checkpoint, as it is; for peft=none it does nothing.

    What PEFT writes is made for use, not for going on: of p-tuning the virtual tokens without the network that makes
    them, of AdaLoRA no record of what mattered. DeepSpeed's own checkpoints are whole.
    """

    def __init__(self, peft: PeftConfig, *, deepspeed: bool, main: bool) -> None:
        self.active, self.main = peft.method is not PeftMethod.none and not deepspeed, main
        self.ranks = RankSchedule(peft) if peft.method is PeftMethod.adalora else None
        self.resume_from: Path | None = None
        """The checkpoint that training goes on from."""

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """What a trainer is given, before what seals a checkpoint."""
        return [*([self.ranks] if self.ranks else []), *([self] if self.active else [])]

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.main and _adapted(model):
            tensors = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
            ranks = None if self.ranks is None else self.ranks.state(model)
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save({"tensors": tensors, "ranks": ranks}, folder / STATE)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.resume_from is not None:
            self.take_up(model, self.resume_from)

    def take_up(self, model: nn.Module, checkpoint: Path) -> None:
        """Put back what `on_save` has kept. Call it after transformers has loaded the checkpoint."""
        if not (self.active and _adapted(model)):
            return
        kept = torch.load(checkpoint / STATE, map_location=next(model.parameters()).device, weights_only=True)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in kept["tensors"].items():
                parameters[name].copy_(tensor)
        if self.ranks is not None:
            self.ranks.take_up(model, kept["ranks"])


def _adapted(model: nn.Module) -> bool:
    """Whether a model is PEFT's; PPO's, which is not, keeps its adapters itself."""
    return hasattr(model, "peft_config")


def _config(model: nn.Module) -> Any:
    return model.peft_config[model.active_adapter]


def _is_basis(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _not_orthogonal(rows: torch.Tensor) -> torch.Tensor:
    """|P P' - 1| of directions as rows (r, d)."""
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype))
