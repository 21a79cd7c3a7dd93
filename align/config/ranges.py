"""What values may be, beyond their type. Sizes that depend on the number of ranks are checked where ranks are known."""

import math
import re
from collections.abc import Callable
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

from align.config.best import check_best
from align.config.errors import UserError
from align.config.keys import keys, stage_of
from align.config.rewards import parse_rewards
from align.config.schema import Advantage, PPOStage, RunConfig, StageConfig

Limit = tuple[Callable[[Any], bool], str]
AT_LEAST_ONE: Limit = (lambda value: value >= 1, "1 or more")
NOT_NEGATIVE: Limit = (lambda value: value >= 0, "0 or more")
ABOVE_ZERO: Limit = (lambda value: value > 0, "above 0")
FRACTION: Limit = (lambda value: 0 <= value <= 1, "from 0 to 1")
BELOW_ONE: Limit = (lambda value: 0 <= value < 1, "from 0 up to, not including, 1")
BELOW_HALF: Limit = (lambda value: 0 <= value < 0.5, "from 0 up to, not including, 0.5")

LIMITS: dict[str, Limit] = {
    "data.max_bad_fraction": FRACTION,
    "data.held_out_fraction": BELOW_ONE,
    "data.near_duplicate_threshold": (lambda value: 0 < value <= 1, "above 0 and up to 1"),
    "peft.r": AT_LEAST_ONE,
    "peft.alpha": AT_LEAST_ONE,
    "peft.dropout": BELOW_ONE,
    "peft.final_r": AT_LEAST_ONE,
    "peft.rank_warmup_fraction": BELOW_ONE,
    "peft.rank_settled_fraction": BELOW_ONE,
    "peft.virtual_tokens": AT_LEAST_ONE,
    "deepspeed.stage": (lambda value: value in (0, 1, 2, 3), "0, 1, 2 or 3"),
    "deepspeed.timeout_seconds": AT_LEAST_ONE,
    "plan.gpus": AT_LEAST_ONE,
    "plan.gpu_memory_gib": ABOVE_ZERO,
    "chat.temperature": NOT_NEGATIVE,
    "chat.max_new_tokens": AT_LEAST_ONE,
    "chat.seed": (lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
    "sweep.prune_after": AT_LEAST_ONE,
    "sweep.prune_from_fraction": BELOW_ONE,
    "log.every": AT_LEAST_ONE,
    "stages.*.max_steps": AT_LEAST_ONE,
    "stages.*.epochs": ABOVE_ZERO,
    "stages.*.learning_rate": ABOVE_ZERO,
    "stages.*.warmup_fraction": BELOW_ONE,
    "stages.*.weight_decay": NOT_NEGATIVE,
    "stages.*.max_grad_norm": NOT_NEGATIVE,
    "stages.*.batch_size": AT_LEAST_ONE,
    "stages.*.micro_batch_size": AT_LEAST_ONE,
    "stages.*.max_tokens": AT_LEAST_ONE,
    "stages.*.max_prompts": AT_LEAST_ONE,
    "stages.*.max_new_tokens": AT_LEAST_ONE,
    "stages.*.seed": (lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
    "stages.*.eval_every": NOT_NEGATIVE,
    "stages.*.save_every": NOT_NEGATIVE,
    # The newest is trusted only once it is sealed, so the one before it has to be there.
    "stages.*.keep_checkpoints": (lambda value: value >= 2, "2 or more"),
    "stages.*.max_nonfinite_steps": NOT_NEGATIVE,
    "stages.*.stop_after": NOT_NEGATIVE,
    "stages.*.temperature": NOT_NEGATIVE,
    "stages.dpo.beta": ABOVE_ZERO,
    "stages.dpo.label_smoothing": BELOW_HALF,
    "stages.dpo.nll_weight": NOT_NEGATIVE,
    "stages.ppo.value_learning_rate": ABOVE_ZERO,
    "stages.ppo.completions_*": AT_LEAST_ONE,
    "stages.ppo.update_epochs": AT_LEAST_ONE,
    "stages.ppo.rollout_batch_size": AT_LEAST_ONE,
    "stages.ppo.temperature": ABOVE_ZERO,
    "stages.ppo.gamma": FRACTION,
    "stages.ppo.gae_lambda": FRACTION,
    "stages.ppo.clip_low": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "stages.ppo.clip_high": ABOVE_ZERO,
    "stages.ppo.dual_clip": (lambda value: value == 0 or value > 1, "0 (off) or above 1"),
    "stages.ppo.value_clip": NOT_NEGATIVE,
    "stages.ppo.value_weight": ABOVE_ZERO,
    "stages.ppo.value_warmup_updates": NOT_NEGATIVE,
    "stages.ppo.kl_coefficient": NOT_NEGATIVE,
    "stages.ppo.kl_target_nats_per_completion": ABOVE_ZERO,
    "stages.ppo.kl_horizon_completions": AT_LEAST_ONE,
    "stages.ppo.reward_clip": NOT_NEGATIVE,
    "stages.ppo.missing_stop_penalty": NOT_NEGATIVE,
    "stages.ppo.length_penalty_per_token": NOT_NEGATIVE,
    "stages.ppo.entropy_weight": NOT_NEGATIVE,
    "stages.ppo.pretraining_weight": NOT_NEGATIVE,
    "stages.ppo.importance_cap": NOT_NEGATIVE,
    "stages.ppo.ema_decay": BELOW_ONE,
    "stages.ppo.sample_every": NOT_NEGATIVE,
    "stages.ppo.sample_prompts": AT_LEAST_ONE,
    "stages.constitutional.rounds": NOT_NEGATIVE,
    "stages.constitutional.helpful_ratio": NOT_NEGATIVE,
    "stages.constitutional.samples": (lambda value: value >= 2, "2 or more"),
    "stages.constitutional.judge_principles": AT_LEAST_ONE,
    "stages.constitutional.revision_temperature": NOT_NEGATIVE,
    "stages.constitutional.max_critique_tokens": AT_LEAST_ONE,
    "stages.constitutional.*.concurrency": AT_LEAST_ONE,
    "stages.constitutional.*.timeout_seconds": ABOVE_ZERO,
    "stages.constitutional.*.retries": NOT_NEGATIVE,
    "stages.constitutional.*.votes": NOT_NEGATIVE,
    "stages.constitutional.*.memory_share": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "stages.constitutional.*price": NOT_NEGATIVE,
    "stages.evaluate.few_shot": NOT_NEGATIVE,
    "stages.evaluate.kl_prompts": NOT_NEGATIVE,
    "stages.evaluate.max_pairs": NOT_NEGATIVE,
    "stages.evaluate.max_texts": NOT_NEGATIVE,
    "stages.evaluate.beta": ABOVE_ZERO,
    "stages.evaluate.resamples": (lambda value: value >= 100, "100 or more"),
    **{
        f"{who}.{key}": limit
        for who in ("stages.evaluate.*", "best.*")
        for key, limit in (
            ("concurrency", AT_LEAST_ONE),
            ("timeout_seconds", ABOVE_ZERO),
            ("retries", NOT_NEGATIVE),
            ("votes", NOT_NEGATIVE),
            ("memory_share", (lambda value: 0 < value < 1, "above 0 and below 1")),
        )
    },
    "stages.evaluate.*price": NOT_NEGATIVE,
    "stages.classify.few_shot": NOT_NEGATIVE,
    "stages.classify.max_rows": AT_LEAST_ONE,
    "stages.classify.resamples": (lambda value: value >= 100, "100 or more"),
    "stages.export.tolerance_nats": ABOVE_ZERO,
    "stages.export.max_shard_size": (
        lambda value: re.fullmatch(r"[1-9]\d*[KMG]B", str(value)) is not None,
        "a size such as 500MB or 5GB",
    ),
    "best.*price": NOT_NEGATIVE,
    "best.rows": AT_LEAST_ONE,
    "best.max_new_tokens": AT_LEAST_ONE,
    "best.judge.speaker.max_tokens": AT_LEAST_ONE,
    "best.batch_size": AT_LEAST_ONE,
    "stages.reward.label_smoothing": BELOW_HALF,
    "stages.reward.centring_weight": NOT_NEGATIVE,
    "stages.reward.statistics_rows": AT_LEAST_ONE,
}


def refuse_out_of_range(config: RunConfig) -> None:
    """Check every value of the run, wherever it was set.

    Raises: UserError naming the first key that is out of range.
    """
    for path in keys():
        value = _value(config, path)
        limit = next((limit for pattern, limit in LIMITS.items() if fnmatchcase(path, pattern)), None)
        if value is None or limit is None:
            continue
        allowed, words = limit
        # A not-a-number is in no range, so the test is for being allowed.
        if not allowed(value):
            raise UserError(f"{path}={value}: must be {words}")
    for name in config.run:
        stage = getattr(config.stages, name)
        _refuse_uneven_batch(name, stage)
        check_best(config, name)
        if isinstance(stage, PPOStage):
            _refuse_uneven_update(stage)


def _refuse_uneven_batch(name: str, stage: Any) -> None:
    if isinstance(stage, StageConfig) and stage.batch_size % stage.micro_batch_size:
        raise UserError(
            f"stages.{name}.batch_size={stage.batch_size}: not a multiple of "
            f"stages.{name}.micro_batch_size={stage.micro_batch_size}; change one of them"
        )


def _refuse_uneven_update(stage: PPOStage) -> None:
    """A rollout is whole prompts and whole minibatches, and a completion has room behind its prompt."""
    for name in ("batch_size", "completions_per_prompt"):
        size = getattr(stage, name)
        if stage.completions_per_update % size:
            raise UserError(_uneven_update(stage, name))
    if stage.max_new_tokens >= stage.max_tokens:
        raise UserError(
            f"stages.ppo.max_new_tokens={stage.max_new_tokens} leaves no room for a prompt in "
            f"stages.ppo.max_tokens={stage.max_tokens}; raise max_tokens"
        )
    if stage.advantage in (Advantage.rloo, Advantage.grpo) and stage.completions_per_prompt < 2:
        raise UserError(
            f"stages.ppo.advantage={stage.advantage.value} compares the completions of a prompt; "
            "set stages.ppo.completions_per_prompt=4 or another number above 1"
        )
    parse_rewards(stage.rewards)


def _uneven_update(stage: PPOStage, name: str) -> str:
    """The two numbers that do not go together, and for each the nearest one that does."""
    whole, size = stage.completions_per_update, getattr(stage, name)
    step = stage.micro_batch_size if name == "batch_size" else 1
    fitting = [number for number in range(step, whole + 1, step) if whole % number == 0]
    ways = [f"stages.ppo.{name}={min(fitting, key=lambda number: abs(number - size))}"] if fitting else []
    each = math.lcm(stage.batch_size, stage.completions_per_prompt)
    ways.append(f"stages.ppo.completions_per_update={-(-whole // each) * each}")
    return (
        f"stages.ppo.{name}={size} does not divide stages.ppo.completions_per_update={whole}, the completions of an "
        f"update, evenly; use {' or '.join(ways)}"
    )


def _value(config: RunConfig, path: str) -> Any:
    """The value at a dotted path; None below a stage that is not in the run."""
    node: Any = config
    if stage_of(path) is not None and stage_of(path) not in config.run:
        return None
    for part in path.split("."):
        if node is None:
            return None
        assert part in {field.name for field in fields(node)}, path
        node = getattr(node, part)
    return node
