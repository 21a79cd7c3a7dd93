"""What values may be, beyond their type. Sizes that depend on the number of ranks are checked where ranks are known."""

from collections.abc import Callable
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

from align.config.errors import UserError
from align.config.keys import keys, stage_of
from align.config.schema import RunConfig, StageConfig

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
    "deepspeed.stage": (lambda value: value in (0, 1, 2, 3), "0, 1, 2 or 3"),
    "deepspeed.timeout_seconds": AT_LEAST_ONE,
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
    "stages.*.temperature": NOT_NEGATIVE,
    "stages.dpo.beta": ABOVE_ZERO,
    "stages.dpo.label_smoothing": BELOW_HALF,
    "stages.dpo.nll_weight": NOT_NEGATIVE,
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
        _refuse_uneven_batch(name, getattr(config.stages, name))


def _refuse_uneven_batch(name: str, stage: Any) -> None:
    if isinstance(stage, StageConfig) and stage.batch_size % stage.micro_batch_size:
        raise UserError(
            f"stages.{name}.batch_size={stage.batch_size}: not a multiple of "
            f"stages.{name}.micro_batch_size={stage.micro_batch_size}; change one of them"
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
