"""What `stages.ppo.rewards` says, checked before anything is loaded. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.config.errors import UserError
from align.config.refusals import near

KEY = "stages.ppo.rewards"
KEYS = ["model", "function", "weight"]


@dataclass(frozen=True)
class RewardSetting:
    """One source of reward: a reward model or a Python function, and what its scores count."""

    name: str
    model: str | None
    """A reward model's folder or hub id."""
    function: str | None
    """`module:name` of a Python function."""
    weight: float = 1.0
    """The score is multiplied by this; negative for what should become less."""
    where: str = ""
    """The setting that names the function, where it is not one of `stages.ppo.rewards`."""


def parse_rewards(rewards: Mapping[str, Any]) -> list[RewardSetting]:
    """The sources of reward, in the order in which they are given.

    rewards: name -> {model: FOLDER or function: module:name, weight: number (default 1)}; null leaves out what a recipe
    has under that name.
    Raises: UserError naming the first key that is wrong, or that nothing is given.
    """
    given = {str(name): value for name, value in rewards.items() if value is not None}
    if not given:
        raise UserError(
            f"{KEY} is empty: nothing scores completions; give a reward model, such as "
            f"'{KEY}={{helpful: {{model: FOLDER}}}}', or a function: '{KEY}={{mine: {{function: module:name}}}}'"
        )
    return [_setting(name, value) for name, value in given.items()]


def _setting(name: str, value: Any) -> RewardSetting:
    key = f"{KEY}.{name}"
    if not isinstance(value, Mapping):
        raise UserError(f"{key}={value}: write {{model: FOLDER}} or {{function: module:name}}, with weight if not 1")
    for inner in value:
        if inner not in KEYS:
            raise UserError(f"{key}.{inner} is not a key{near(str(inner), KEYS)}")
    model, function = value.get("model"), value.get("function")
    if (model is None) == (function is None):
        found = "neither model nor function" if model is None else "both model and function"
        raise UserError(f"{key} has {found}; give one of them, and the other a name of its own")
    weight = _weight(f"{key}.weight", value.get("weight", 1.0))
    if model is not None and not (isinstance(model, str) and model):
        raise UserError(f"{key}.model={model}: give the folder of a reward model, or a hub id")
    if function is not None:
        check_function(f"{key}.function", function)
    return RewardSetting(name, model, function, weight)


def _weight(key: str, value: Any) -> float:
    # A bool is an int too, but weight=true is a slip.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key}={value}: a finite number was expected")
    if value == 0:
        raise UserError(f"{key}=0 has no effect; leave the reward out")
    return float(value)


def check_function(key: str, value: Any) -> None:
    """Refuse what is not `module:name`; whether it exists is known once it is imported."""
    module, colon, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    if module.endswith(".py") or "/" in module:
        dotted = module.removesuffix(".py").removeprefix("./").replace("/", ".")
        raise UserError(f"{key}={value}: give the module, not its file: {dotted}:{name or 'name'}")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{key}={value}: write module:name, the Python module and the function in it")
