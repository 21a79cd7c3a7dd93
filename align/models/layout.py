"""Which batch layout a model computes exactly, proven on one real batch before anything is trained."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.config.errors import UserError
from align.config.schema import Layout
from align.data.forest import Tree, lay_out
from align.models.attention import FOREST_ATTENTION, forest_masks

# Mean difference of what is read that is rounding for sure. On top of it comes three times what right padding,
# which every causal model computes exactly, differs by: bf16 rounds the logits of large models by 0.01 to 0.1.
# A wrong mask or window shows as 0.01 to 0.3 (small random models, transformers 5.23, 2026-11).
FLOOR = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
ROUNDING_SHARE = 0.05
"""In half precision: what rounding may add, as a share of what no separation at all does (rounding was 0.015 at most:
tiny models, CPU, 2026-11)."""


@dataclass(frozen=True)
class ProvenLayout:
    """The layout a run uses, and why it is not an earlier one of forest, sequences, padded."""

    layout: Layout
    reason: str


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, DeepSpeed and PEFT wrappers."""
    while not isinstance(model, PreTrainedModel):
        model = model.module if hasattr(model, "module") else model.get_base_model()
    return model


def speaking_model(model: nn.Module) -> PreTrainedModel:
    """What is sampled from: the plain model, which holds an adapter's layers, or with virtual tokens PEFT's wrapping,
    without which they would be left out and the base would answer."""
    while hasattr(model, "module"):
        model = model.module
    return model if prompt_learning(model) else plain_model(model)


def prompt_learning(model: nn.Module) -> bool:
    """Whether a PEFT adapter puts virtual tokens in front of the real ones."""
    while hasattr(model, "module"):
        model = model.module
    return hasattr(model, "peft_config") and any(c.is_prompt_learning for c in model.peft_config.values())


def attach(model: nn.Module, layout: Layout) -> str:
    """Switch the model to the attention `layout` needs; returns the implementation it had, for `detach`."""
    plain = plain_model(model)
    before = plain.config._attn_implementation
    if layout is Layout.forest and before != FOREST_ATTENTION:
        plain.set_attn_implementation(FOREST_ATTENTION)
    return before


def detach(model: nn.Module, implementation: str) -> None:
    """Give the model back the attention implementation that `attach` returned."""
    plain = plain_model(model)
    if plain.config._attn_implementation != implementation:
        plain.set_attn_implementation(implementation)


def model_inputs(plain: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a forward of the model itself takes of a batch: tokens, their places and the mask of its layout."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    inputs |= {key: batch[key] for key in ("position_ids", "attention_mask") if key in batch}
    if "forest_table" in batch:
        inputs["attention_mask"] = forest_masks(plain.config, batch["forest_table"])
    return inputs


def takes_columns(plain: PreTrainedModel) -> bool:
    """Whether a model can be asked for the logits of some positions alone (`logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(type(plain).forward).parameters


def scored_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The rows of logits that predict `targets`, (S, V), from a batch of `lay_out`.

    Only scoring positions reach the output layer, where the model has `logits_to_keep`.
    """
    plain = plain_model(model)
    positions, width = batch["positions"], batch["input_ids"].shape[1]
    inputs = model_inputs(plain, batch)
    if not takes_columns(plain) or prompt_learning(model):
        # Virtual tokens come first, so real positions are counted from the end.
        logits = model(**inputs).logits[:, -width:]
        return logits.reshape(-1, logits.shape[-1])[positions]
    if len(batch["input_ids"]) == 1:
        return model(**inputs, logits_to_keep=positions).logits[0]
    columns = torch.unique(positions % width)
    logits = model(**inputs, logits_to_keep=columns).logits
    kept = positions // width * len(columns) + torch.searchsorted(columns, positions % width)
    return logits.flatten(0, 1)[kept]


def _target_logps(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits = scored_logits(model, batch).float()
    return logits.log_softmax(-1).gather(-1, batch["targets"][:, None]).squeeze(-1)


@dataclass(frozen=True)
class Reading:
    """What is read of a model, one number for each completion token, and must be the same in every layout."""

    name: str
    lay_out: Callable[[Sequence[Tree], Layout, int], dict[str, Tensor]]
    read: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    """Batch of `lay_out` -> (S,), completions in order."""
    relative: bool
    """Differences count in standard deviations of what plain forwards give: the numbers have no scale of their own."""


TOKEN_LOGPS = Reading("log-probabilities", lay_out, _target_logps, relative=False)


def prove_layout(
    model: nn.Module,
    trees: Sequence[Tree],
    requested: Layout,
    *,
    pad_token_id: int,
    device: torch.device,
    reading: Reading = TOKEN_LOGPS,
) -> ProvenLayout:
    """The first layout in which `reading` gives every completion token the number it has in its sequence alone; the
    model is left attached to it.

    `trees` are real ones, longest first: two are enough to show a leak between trees, and the longest shows windows.
    Shortened copies go with them, because sequences that fill a row each show no leak between those of a row.
    Every rank must call it with the same trees, whatever wraps the model (ZeRO-3 gathers in step).
    Raises: UserError if `requested` is not `auto` and the model cannot take it.
    """
    training = model.training
    trees = [*trees, *map(_shortened, trees)]
    model.eval()
    try:
        with torch.no_grad():
            return _Probe(model, trees, pad_token_id, device, reading).first_exact(requested)
    finally:
        model.train(training)


def _shortened(tree: Tree) -> Tree:
    """The first third of the prompt and of each completion."""
    prompt, *completions = (ids[: -(-len(ids) // 3)] for ids in (tree.prompt, *tree.completions))
    return Tree(prompt, completions)


@dataclass(frozen=True)
class _Probe:
    """One batch of real trees, on which layouts are held against plain forwards."""

    model: nn.Module
    trees: Sequence[Tree]
    pad_token_id: int
    device: torch.device
    reading: Reading

    def first_exact(self, requested: Layout) -> ProvenLayout:
        if requested is Layout.padded:
            return ProvenLayout(Layout.padded, "requested")
        alone = self._read_alone()
        dtype = plain_model(self.model).dtype
        allowed = FLOOR[dtype] + 3 * self._difference(self.trees, Layout.padded, alone)
        if dtype.itemsize == 2:
            allowed += ROUNDING_SHARE * self._difference(self._unseparated(), Layout.padded, alone)
        reasons = []
        for layout in (Layout.forest, Layout.sequences) if requested is Layout.auto else (requested,):
            problem = self._problem(layout, alone, allowed)
            if problem is None:
                return ProvenLayout(layout, "; ".join(reasons) or "exact on real rows")
            reasons.append(f"{layout.value}: {problem}")
        if requested is not Layout.auto:
            raise UserError(f"layout={requested.value} is not exact for this model ({reasons[0]}); set layout=auto")
        return ProvenLayout(Layout.padded, "; ".join(reasons))

    def _problem(self, layout: Layout, alone: Tensor, allowed: float) -> str | None:
        """Why `layout` is wrong for the model, or None if it is exact; the model stays attached only if it is."""
        if prompt_learning(self.model):
            return "the adapter puts virtual tokens in front of every row"
        before = attach(self.model, layout)
        plain = plain_model(self.model)
        if layout is Layout.forest and plain.config._attn_implementation != FOREST_ATTENTION:
            return f"{type(plain).__name__} does not take another attention function"
        try:
            difference = self._difference(self.trees, layout, alone)
        # A model may fail in its own way on a mask it does not know; each way is a no, and is quoted.
        except Exception as error:
            detach(self.model, before)
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if difference <= allowed:
            return None
        detach(self.model, before)
        return f"{self.reading.name} differ by {difference:.2g} on average from a plain forward"

    def _unseparated(self) -> list[Tree]:
        """The trees with completions that see each other: how large a difference is that a wrong mask makes."""
        return [Tree(tree.prompt, ([*chain(*tree.completions)],)) for tree in self.trees]

    def _difference(self, trees: Sequence[Tree], layout: Layout, alone: Tensor) -> float:
        """Mean difference of what is read in `layout` from what plain forwards gave."""
        difference = (self._read(trees, layout) - alone).abs().mean()
        return (difference / alone.std() if self.reading.relative else difference).item()

    def _read(self, trees: Sequence[Tree], layout: Layout) -> Tensor:
        batch = self.reading.lay_out(trees, layout, self.pad_token_id)
        return self.reading.read(self.model, {key: value.to(self.device) for key, value in batch.items()}).cpu()

    def _read_alone(self) -> Tensor:
        """What is read in a forward of each sequence by itself, no packing and no padding."""
        alone = [Tree(tree.prompt, (completion,)) for tree in self.trees for completion in tree.completions]
        return torch.cat([self._read([one], Layout.padded) for one in alone])
