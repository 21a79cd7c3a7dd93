"""A model as its stage trained it: whole, or the base with the adapter on it, found by the stage's manifest."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from align import artifacts
from align.artifacts import Manifest
from align.config.errors import UserError
from align.config.schema import ModelConfig, PeftMethod
from align.models.adapters import bottleneck  # noqa: F401  PEFT learns of the method
from align.models.load import adapter_base, context_length, is_adapter, load_model, resolve_model, virtual_tokens

POLICY, ADAPTER, BASE = "policy", "adapter", "policy.base"


@dataclass(frozen=True)
class Trained:
    """Where the parts of a trained model are."""

    policy: str
    """As it was named."""
    whole: bool
    """Whether `policy` holds all weights, an adapter merged in."""
    adapter: Path | None = None
    """What was trained, where that was an adapter."""
    base: str | None = None
    """What the adapter was trained on."""
    manifest: Manifest | None = None
    """Of the stage that trained it; None for a model from elsewhere."""

    @property
    def seed(self) -> int:
        """By which the weights of `tiny-untrained` are drawn."""
        return self.manifest.seed if self.manifest is not None else 0

    @property
    def start(self) -> str:
        """The whole model: the policy itself, or what its adapter sits on."""
        return self.policy if self.whole else str(self.base)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence it takes, its virtual ones not counted, if its config says so."""
        longest = context_length(self.start)
        return longest if longest is None or self.whole else longest - virtual_tokens(Path(str(self.adapter)))


def trained_model(policy: str) -> Trained:
    """The parts of a model: of a stage's policy, of PEFT's adapter folder, of any model.

    Raises: UserError for an adapter whose base is not said, is not there, or has changed since.
    """
    folder = Path(resolve_model(policy))
    manifest = artifacts.read_manifest(folder.parent) if folder.is_dir() else None
    if manifest is not None and artifacts.digest_of_output(manifest.outputs, folder.name) is None:
        manifest = None
    if is_adapter(folder):
        return Trained(policy, False, folder, _base(folder, manifest), manifest)
    beside = folder.parent / ADAPTER
    if trained_in_4_bits(manifest):
        # The adapter fits a base in 4 bits; the policy is that base, de-quantised, with the adapter merged in.
        return Trained(policy, True, manifest=manifest)
    if manifest is not None and folder.name == POLICY and is_adapter(beside):
        return Trained(policy, True, beside, _base(beside, manifest), manifest)
    return Trained(policy, True, manifest=manifest)


def trained_in_4_bits(manifest: Manifest | None) -> bool:
    """Whether a stage trained an adapter on a base in 4 bits."""
    return manifest is not None and manifest.config.get("peft", {}).get("method") == PeftMethod.qlora.value


def load_trained(trained: Trained, model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The model as it was trained, the adapter unmerged, its other weights in `dtype`; in eval mode."""
    if trained.adapter is None:
        return load_model(trained.policy, model, dtype, seed=trained.seed).eval()
    base = load_model(str(trained.base), model, dtype, seed=trained.seed)
    return PeftModel.from_pretrained(base, str(trained.adapter)).eval()


def _base(adapter: Path, manifest: Manifest | None) -> str:
    if manifest is None:
        return adapter_base(adapter)
    inputs = {entry["name"]: entry for entry in manifest.inputs}
    # An export takes in the base beside the policy; of a stage that trains the policy it started from is the base.
    entry = inputs.get(BASE) or inputs[POLICY]
    base = _moved(entry["path"], adapter.parent.parent)
    folder = Path(resolve_model(base))
    if folder.is_dir() and artifacts.digest_model(folder) != entry["digest"]:
        raise UserError(f"{adapter}: its base {base} is not what it was trained on any more; put that back")
    return base


def _moved(base: str, run_dir: Path) -> str:
    """The base where it is now: a policy of the same run has moved with the run folder."""
    if Path(resolve_model(base)).exists():
        return base
    beside = run_dir.joinpath(*Path(base).parts[-2:])
    return str(beside) if beside.is_dir() else base
