"""Policy and value model as the one module that a trainer wraps and saves.

Each forward reads both, because DDP and ZeRO want a gradient for every trained parameter in every one. Here the two
have weights of their own; `align.models.shared_base` has the same interface on the weights of one base.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from align.config.schema import Layout
from align.models import layout as layouts
from align.models.reward import score_batch

CHUNK_NUMBERS = 2**24
"""Logits that are widened to fp32 at a time: 64 MiB. With a vocabulary of 150,000 that is 111 tokens."""


class Read(Enum):
    """What a forward reads. Wrapped models are only called, never asked for a method, so this is an argument."""

    tokens = "tokens"
    """`TokenReadings` of policy and value model, with gradient."""
    reference = "reference"
    """Log-probabilities (S,) of the policy before training, without gradient; only where it shares the base."""
    scores = "scores"
    """Scores (C,) of the reward model, centred, without gradient; only where it shares the base."""


class TokenReadings(NamedTuple):
    """One number for each completion token of a batch of `lay_out`, in fp32, completions in order."""

    logps: Tensor
    """(S,) log-probability of the token at the temperature of the policy."""
    values: Tensor | None
    """(S,) value of the state before the token; None without a value model."""
    entropies: Tensor | None
    """(S,) entropy in nats of the distribution that the token was drawn from; None if not asked for."""


class ActorCritic(nn.Module):
    """A policy and a value model with separate weights.

    It is called, not asked: `model(batch)`, also when wrapped by DDP or DeepSpeed. What has to be known of the module
    inside (`generating`, `parameter_groups`, `kept`) is asked of the unwrapped one.
    """

    main_input_name = "input_ids"
    _keys_to_ignore_on_save = None

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel | None, *, temperature: float):
        """critic: a scorer of `align.models.reward`, or None where no value model is trained.
        temperature: that of sampling; log-probabilities and entropies are those of softmax(logits / temperature).
        """
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature={temperature}: log-probabilities need a positive number")
        self.policy = policy
        self.critic = critic
        self.temperature = temperature
        # As bits, because DeepSpeed rounds every float of a module to bf16, buffers too.
        self.register_buffer("value_bits", _as_bits(1.0, 0.0))

    def forward(self, batch: Mapping[str, Tensor], entropies: bool = False, read: Read = Read.tokens) -> Any:
        """`TokenReadings` of a batch of `lay_out` in any layout, with gradient; for other `read` see `Read`.

        entropies: read them as well (with gradient); they cost about as much again as the log-probabilities.
        """
        if read is Read.reference:
            return self.reference_logps(batch)
        if read is Read.scores:
            return self.scores(batch)
        logps, entropy = read_tokens(
            self._policy_logits(batch), batch["targets"], temperature=self.temperature, entropies=entropies
        )
        return TokenReadings(logps, self._values(batch), entropy)

    def _policy_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (S, V) that predict the targets."""
        return layouts.scored_logits(self.policy, batch)

    def _value_scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the head of the value model gives at the positions of the batch, (S,) in fp32."""
        return score_batch(self.critic, batch)

    def _values(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        if not self.has_value:
            return None
        # Read anew each time: DDP writes buffers in place between two forwards of a step.
        scale, centre = self.value_bits.view(torch.float64).float()
        return scale * (self._value_scores(batch) - centre)

    def reference_logps(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Raises: here the reference is a model of its own."""
        raise NotImplementedError("the reference of separate weights is a model of its own")

    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Raises: here reward models are models of their own."""
        raise NotImplementedError("no reward model is an adapter of this one")

    @property
    def has_value(self) -> bool:
        """Whether a value model is trained."""
        return self.critic is not None

    @property
    def has_own_reference(self) -> bool:
        """Whether `reference_logps` can be had: the policy before training is still in here."""
        return False

    @property
    def has_own_reward(self) -> bool:
        """Whether `scores` can be had: a reward model is in here."""
        return False

    @property
    def config(self) -> PreTrainedConfig:
        """The policy's, for the Trainer and its callbacks."""
        return self.policy.config

    @property
    def device(self) -> torch.device:
        return self.value_bits.device

    @property
    def backbones(self) -> list[PreTrainedModel]:
        """The transformers models inside."""
        return [layouts.plain_model(model) for model in (self.policy, self.critic) if model is not None]

    def initialise_value(self, *, scale: float = 1.0, centre: float = 0.0) -> None:
        """From now on V = scale * (score of the head - centre); both are saved with the weights.

        A value model that starts from a reward model predicts the reward from the first step on: with a reward of
        weight * (score - reward centre) / spread, scale is weight / spread. Call it on every rank, before wrapping.
        Raises: ValueError if one is no finite number, or scale is 0.
        """
        if not (math.isfinite(scale) and math.isfinite(centre) and scale != 0):
            raise ValueError(f"a value needs finite numbers and a scale other than 0, not {scale=}, {centre=}")
        self.value_bits.copy_(_as_bits(scale, centre))

    @property
    def value_affine(self) -> tuple[float, float]:
        """(scale, centre) of `initialise_value`; (1, 0) before."""
        scale, centre = self.value_bits.view(torch.float64).tolist()
        return scale, centre

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters: those of "policy", and those of "value" (empty without a value model)."""
        critic = () if self.critic is None else self.critic.parameters()
        groups = {"policy": self.policy.parameters(), "value": critic}
        return {name: [p for p in parameters if p.requires_grad] for name, parameters in groups.items()}

    @contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        """Inside: the model whose `generate` samples from the policy, with its cache on; after, the cache is off."""
        with cache_on(layouts.plain_model(self.policy)) as policy:
            yield policy

    def attach(self, layout: Layout) -> None:
        """Switch every backbone to the attention `layout` needs."""
        for backbone in self.backbones:
            layouts.attach(backbone, layout)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass of both models; the Trainer calls it."""
        for backbone in self.backbones:
            backbone.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The name that older releases of transformers call it by."""
        for backbone in self.backbones:
            backbone.gradient_checkpointing_enable(**options)

    def _kept_names(self) -> list[str]:
        """Names of what a checkpoint holds: each tensor once, under the first of its names."""
        temporary = {
            f"{path}.{name}".removeprefix(".")
            for path, module in self.named_modules()
            for name in module._non_persistent_buffers_set
        }
        buffers = [name for name, _ in self.named_buffers() if name not in temporary]
        return [name for name, _ in self.named_parameters()] + buffers

    def kept(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Of a state dictionary of every tensor, such as ZeRO-3 gathers, what `state_dict` writes.

        safetensors refuses tensors that share memory, as those of tied weights do.
        """
        return {name: state[name] for name in self._kept_names()}

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> dict[str, Any]:
        """As any module's, without a second name of the same tensor."""
        state = super().state_dict(*args, prefix=prefix, **options)
        kept = {prefix + name for name in self._kept_names()}
        for name in [name for name in state if name.startswith(prefix) and name not in kept]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes exactly what `state_dict` writes, also with `strict=False`, which is how the Trainer calls it.

        Raises: RuntimeError naming what is missing or unknown.
        """
        kept = set(self._kept_names())
        wrong = [f"{name} is missing" for name in sorted(kept - state_dict.keys())]
        wrong += [f"{name} is unknown" for name in sorted(state_dict.keys() - kept)]
        if wrong:
            raise RuntimeError(f"{len(wrong)} tensors of the checkpoint do not fit the model, {wrong[0]}")
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        result.missing_keys.clear()  # second names of tied weights, and what is frozen
        return result


def read_tokens(
    logits: Tensor, targets: Tensor, *, temperature: float, entropies: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the targets under softmax(logits / temperature), and its entropies if asked for, in fp32.

    Shapes: logits (S, V), targets (S,); both returned are (S,). Of many logits only a chunk is in fp32 at a time: it is
    made again in the backward pass, so that what stays in memory is the logits as they came.
    """
    chunks = logits.split(max(1, CHUNK_NUMBERS // logits.shape[-1]))
    parts = []
    for chunk, wanted in zip(chunks, targets.split([len(chunk) for chunk in chunks]), strict=True):
        if len(chunks) == 1 or not torch.is_grad_enabled():
            parts.append(_read_chunk(chunk, wanted, temperature, entropies))
        else:
            parts.append(
                checkpoint(
                    _read_chunk, chunk, wanted, temperature, entropies, use_reentrant=False, preserve_rng_state=False
                )
            )
    readings = torch.cat(parts, -1)
    return readings[0], readings[1] if entropies else None


def _read_chunk(logits: Tensor, targets: Tensor, temperature: float, entropies: bool) -> Tensor:
    """Rows of the log-probabilities and, if asked for, of the entropies: (1 or 2, S)."""
    logps = (logits.float() / temperature).log_softmax(-1)
    taken = logps.gather(-1, targets[:, None]).squeeze(-1)
    # A token whose probability rounds to 0 has a log-probability of -inf where the model masks it: 0 * inf.
    entropy = [-(logps.exp() * logps.clamp(min=-1e4)).sum(-1)] if entropies else []
    return torch.stack([taken, *entropy])


def _as_bits(scale: float, centre: float) -> Tensor:
    return torch.tensor([scale, centre], dtype=torch.float64).view(torch.int64)


@contextmanager
def cache_on(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside: a model that is trained, and so without a cache, with one to generate."""
    _set_cache(model, True)
    try:
        yield model
    finally:
        _set_cache(model, False)


def _set_cache(model: PreTrainedModel, use: bool) -> None:
    model.config.use_cache = use
    if model.generation_config is not None:
        model.generation_config.use_cache = use
