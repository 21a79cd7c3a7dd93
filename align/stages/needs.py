"""How much memory a stage takes: its models, rows and settings put into the formulas of `align.distributed.memory`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.config.adapters import VIRTUAL_TOKENS
from align.config.errors import UserError
from align.config.rewards import RewardSetting, parse_rewards
from align.config.schema import (
    Advantage,
    DPOStage,
    Layout,
    PeftMethod,
    PPOStage,
    RewardStage,
    RolloutEngine,
    RunConfig,
    StageConfig,
)
from align.distributed import memory
from align.distributed.memory import Batch, Form, Need, Shape, Sharding
from align.models.shape import shape_of
from align.stages.longest import Rows, longest_batch

READING_FORWARD = 4
"""Micro-batches that forwards without gradients take at once: the reference pass, scoring, reading of rollouts."""


@dataclass(frozen=True)
class Target:
    """The machine that memory is counted for; `memory` is one device's, or a rank's share of main memory."""

    ranks: int
    memory: float
    host: float | None
    """Main memory of a rank, for what is offloaded; None: not known."""
    cuda: bool
    bf16: bool


@dataclass(frozen=True)
class Setup:
    """A stage with all that decides its memory but how states are spread."""

    config: RunConfig
    name: str
    rows: Rows
    target: Target

    @property
    def stage(self) -> Any:
        """Its settings; virtual tokens are trained in padded rows alone."""
        stage = getattr(self.config.stages, self.name)
        virtual = self.config.peft.method in VIRTUAL_TOKENS and isinstance(stage, DPOStage | RewardStage)
        return replace(stage, layout=Layout.padded) if virtual else stage

    @property
    def adapters(self) -> bool:
        return self.config.peft.method is not PeftMethod.none

    def form(self, sharding: Sharding) -> Form:
        return memory.form_of(bf16=self.target.bf16, deepspeed=sharding.stage is not None, adapters=self.adapters)

    def shape(self, model: str, *, trained: bool = True, scores: bool = False) -> Shape:
        """Of a model by its name in the config; `trained` ones have the run's adapters.

        Raises: UserError if its config cannot be read.
        """
        start = origin(self.config, model)
        return shape_of(start, self.config.model, self.config.peft if trained else None, scores=scores)

    def shape_or_policys(self, model: str, *, trained: bool = False, scores: bool = False) -> Shape:
        """The same, of a model that may not be there yet: then it is taken to be as large as the policy."""
        try:
            return self.shape(model, trained=trained, scores=scores)
        except UserError:
            return self.shape(self.stage.policy, trained=trained, scores=scores)

    def batch(self, micro_batches: int = 1) -> Batch:
        """The longest micro-batch, or so many of them at once, with the adapter's virtual tokens."""
        return memory.with_virtual_tokens(self.policy(), longest_batch(self.stage, self.rows, micro_batches))

    def policy(self) -> Shape:
        return self.shape(self.stage.policy, scores=isinstance(self.stage, RewardStage))


def origin(config: RunConfig, model: str) -> str:
    """The model whose config a model of this run will have: followed through stages that have not made it yet."""
    path = Path(model)
    maker = path.parent.name
    if path.parent.parent != Path(config.run_dir) or (path / "config.json").is_file():
        return model
    stage = getattr(config.stages, maker, None)
    return origin(config, stage.policy) if isinstance(stage, StageConfig) else model


# What a stage takes.


def needs(setup: Setup, sharding: Sharding) -> dict[str, Need]:
    """Phase -> what it takes of a rank's memory. Phases follow each other; each frees what it took."""
    if isinstance(setup.stage, PPOStage):
        return {"training": _ppo_need(setup, sharding)}
    found = {"training": _training_need(setup, sharding)}
    if isinstance(setup.stage, DPOStage):
        return {"reference pass": _reference_need(setup, sharding)} | found
    return found


def worst(setup: Setup, sharding: Sharding) -> Need:
    """The phase that takes most of the device, with the most main memory that any of them takes."""
    phases = needs(setup, sharding).values()
    return replace(max(phases, key=lambda need: need.peak), host=max(need.host for need in phases))


def _states(setup: Setup, shapes: list[Shape], sharding: Sharding) -> dict[str, float]:
    trained, frozen = sum(shape.trained for shape in shapes), sum(shape.frozen for shape in shapes)
    form = setup.form(sharding)
    found = memory.state_bytes(trained, frozen, sharding, form)
    found["weights"] -= memory.saved_by_rounding(shapes[0].quantised, form, double=shapes[0].double_quantisation)
    return found


def _backward(setup: Setup, shape: Shape, batch: Batch, sharding: Sharding) -> dict[str, float]:
    """What the backward pass of one model adds, without logits."""
    form, checkpointing = setup.form(sharding), setup.stage.activation_checkpointing
    return {
        "activations": memory.activation_bytes(shape, batch, form, checkpointing=checkpointing)
        + memory.weight_copy_bytes(shape, form),
        "buffers": memory.buffer_bytes(shape, sharding, form, lazy=not setup.target.cuda),
    }


def _training_need(setup: Setup, sharding: Sharding) -> Need:
    shape, form, batch = setup.policy(), setup.form(sharding), setup.batch()
    backward = _backward(setup, shape, batch, sharding)
    moments = {"backward pass": backward, "optimizer step": {"step": memory.step_bytes(shape.trained, sharding)}}
    if isinstance(setup.stage, DPOStage):
        backward["logits"] = memory.whole_logits_bytes(shape, batch, form)
    elif isinstance(setup.stage, RewardStage):
        several = setup.batch(READING_FORWARD)
        moments["scoring"] = {"activations": memory.reading_bytes(shape, several, form)}
    else:
        backward["logits"] = memory.next_token_bytes(shape, batch, form)
    host = memory.offloaded_bytes(shape.trained, shape.frozen, sharding, form)
    return Need(_states(setup, [shape], sharding), moments, host)


def _frozen_bytes(setup: Setup, shape: Shape, sharding: Sharding) -> float:
    """Weights of a model that is only read."""
    whole = float(shape.parameters * (2 if setup.target.bf16 else 4))
    return whole / sharding.ranks if sharding.stage == 3 else whole


def _reference_need(setup: Setup, sharding: Sharding) -> Need:
    """DPO's reference: a model of its own, freed before the policy is loaded."""
    stage, form = setup.stage, setup.form(sharding)
    shape = setup.shape_or_policys(stage.reference or stage.policy)
    batch = setup.batch(READING_FORWARD)
    weights = shape.parameters * form.weight / (sharding.ranks if sharding.stage == 3 else 1)
    rounded = setup.policy()
    weights -= memory.saved_by_rounding(rounded.quantised, form, double=rounded.double_quantisation)
    reading = {
        "activations": memory.reading_bytes(shape, batch, form) + memory.weight_copy_bytes(shape, form),
        "logits": memory.whole_logits_bytes(shape, batch, form, gradients=False),
    }
    if sharding.stage == 3:
        reading["buffers"] = memory.buffer_bytes(shape, replace(sharding, offload=False), form, lazy=True)
    return Need({"weights": weights}, {"reading": reading})


def _ppo_need(setup: Setup, sharding: Sharding) -> Need:
    """Policy and value model in one backward pass, with what is only read beside them."""
    stage, form = setup.stage, setup.form(sharding)
    trained = _actor_shapes(setup)
    frozen = {name: _frozen_bytes(setup, shape, sharding) for name, shape in frozen_models(setup).items()}
    batch, several = setup.batch(), setup.batch(READING_FORWARD)
    parts = [_backward(setup, shape, batch, sharding) for shape in trained]
    policy = trained[0]
    backward = {
        "activations": sum(part["activations"] for part in parts),
        "buffers": max(part["buffers"] for part in parts),
        "logits": memory.chunked_logits_bytes(policy, batch, form),
    }
    scoring = {
        "activations": memory.reading_bytes(policy, several, form),
        "logits": memory.chunked_logits_bytes(policy, several, form, gradients=False),
    }
    moments = {
        "backward pass": backward,
        "optimizer step": {"step": memory.step_bytes(sum(shape.trained for shape in trained), sharding)},
        "scoring": scoring,
        "sampling": _sampling(setup, policy, form, sharding),
    }
    stored = trained_models(setup)
    kept = _states(setup, stored, sharding)
    if stage.offload_frozen:
        scoring["other models"] = sum(frozen.values())
    else:
        kept["other models"] = sum(frozen.values())
    if stage.ema_decay:
        kept["other models"] = kept.get("other models", 0.0) + 4.0 * policy.trained
    host = sum(memory.offloaded_bytes(shape.trained, shape.frozen, sharding, form) for shape in stored)
    return Need(kept, moments, host + (sum(frozen.values()) if stage.offload_frozen else 0.0))


def _actor_shapes(setup: Setup) -> list[Shape]:
    """The policy and, with advantage=gae, the value model, each as a forward of its own."""
    policy = setup.policy()
    if setup.stage.advantage is not Advantage.gae:
        return [policy]
    if setup.adapters:
        # On the policy's own base, under an adapter and a head of its own.
        return [policy, replace(policy, adapter=policy.adapter + policy.hidden, vocabulary=0)]
    return [policy, setup.shape_or_policys(_value_model(setup), trained=True, scores=True)]


def trained_models(setup: Setup) -> list[Shape]:
    """What is in memory to be trained: one model, or PPO's policy and value model; a base that they share once."""
    if not isinstance(setup.stage, PPOStage):
        return [setup.policy()]
    shapes = _actor_shapes(setup)
    if not setup.adapters or len(shapes) == 1:
        return shapes
    return [replace(shapes[0], adapter=sum(shape.adapter for shape in shapes))]


def _value_model(setup: Setup) -> str:
    models = [setting.model for setting in _reward_models(setup)]
    return setup.stage.value or (models[0] if models else setup.stage.policy)


def _reward_models(setup: Setup) -> list[RewardSetting]:
    return [setting for setting in parse_rewards(setup.stage.rewards) if setting.model]


def frozen_models(setup: Setup) -> dict[str, Shape]:
    """Name -> every model that PPO only reads: the reference, unless it is a base without adapters, and rewards."""
    stage = setup.stage
    found = {}
    if stage.kl_coefficient and not setup.adapters:
        found["reference"] = setup.shape_or_policys(stage.reference or stage.policy)
    for setting in _reward_models(setup):
        found[f"reward {setting.name}"] = setup.shape_or_policys(str(setting.model), scores=True)
    return found


def _sampling(setup: Setup, policy: Shape, form: Form, sharding: Sharding) -> dict[str, float]:
    """Keys, values and logits of the completions sampled together, and weights that ZeRO-3 gathers for it."""
    stage = setup.stage
    whole = form.weight * policy.parameters if sharding.stage == 3 else 0.0
    if stage.rollout is RolloutEngine.vllm:
        return {"gathered weights": whole}
    together = min(stage.rollout_batch_size, stage.completions_per_update // setup.target.ranks)
    tokens = together * (int(setup.rows.lengths.row.max()) + stage.max_new_tokens)
    logits = together * policy.vocabulary * (form.compute + 8)
    return {
        "cache": memory.cache_bytes(policy, tokens, form),
        "logits": float(logits),
        "gathered weights": float(whole),
    }
