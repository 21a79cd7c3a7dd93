"""Sources of reward: what may be written, and that everything else is refused by the name of its key."""

import math

import pytest

from align.config.errors import UserError
from align.config.rewards import RewardSetting, parse_rewards


def test_models_and_functions_are_read_in_order_with_their_weights():
    found = parse_rewards(
        {
            "helpful": {"model": "runs/reward/reward/reward_model"},
            "short": {"function": "my.rewards:short", "weight": -2},
            "kind": {"function": "rewards:kind", "model": None, "weight": 0.5},
        }
    )
    assert found == [
        RewardSetting("helpful", "runs/reward/reward/reward_model", None, 1.0),
        RewardSetting("short", None, "my.rewards:short", -2.0),
        RewardSetting("kind", None, "rewards:kind", 0.5),
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"modle": "x"}, "stages.ppo.rewards.mine.modle is not a key; did you mean model?"),
        ({"model": "x", "scale": 2}, "stages.ppo.rewards.mine.scale is not a key"),
        ({"model": "x", "function": "a:b"}, "stages.ppo.rewards.mine has both model and function"),
        ({"weight": 2.0}, "stages.ppo.rewards.mine has neither model nor function"),
        ({}, "stages.ppo.rewards.mine has neither model nor function"),
        ({"model": ""}, "stages.ppo.rewards.mine.model=: give the folder"),
        ({"model": 3}, "stages.ppo.rewards.mine.model=3: give the folder"),
        ({"model": "x", "weight": 0}, "stages.ppo.rewards.mine.weight=0 has no effect"),
        ({"model": "x", "weight": 0.0}, "stages.ppo.rewards.mine.weight=0 has no effect"),
        ({"model": "x", "weight": math.nan}, "stages.ppo.rewards.mine.weight=nan: a finite number"),
        ({"model": "x", "weight": -math.inf}, "stages.ppo.rewards.mine.weight=-inf: a finite number"),
        ({"model": "x", "weight": "much"}, "stages.ppo.rewards.mine.weight=much: a finite number"),
        ({"model": "x", "weight": True}, "stages.ppo.rewards.mine.weight=True: a finite number"),
        ({"model": "x", "weight": None}, "stages.ppo.rewards.mine.weight=None: a finite number"),
        ({"function": "rewards"}, "stages.ppo.rewards.mine.function=rewards: write module:name"),
        ({"function": "rewards:"}, "stages.ppo.rewards.mine.function=rewards:: write module:name"),
        ({"function": ":name"}, "stages.ppo.rewards.mine.function=:name: write module:name"),
        ({"function": "a b:c"}, "stages.ppo.rewards.mine.function=a b:c: write module:name"),
        ({"function": 7}, "stages.ppo.rewards.mine.function=7: write module:name"),
        ({"function": "./my/rewards.py:short"}, "give the module, not its file: my.rewards:short"),
        ("runs/reward", "stages.ppo.rewards.mine=runs/reward: write {model: FOLDER}"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_names_the_key(value, said):
    with pytest.raises(UserError) as refusal:
        parse_rewards({"sound": {"model": "x"}, "mine": value})
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_null_leaves_out_what_a_recipe_has_under_that_name():
    assert [one.name for one in parse_rewards({"sound": {"model": "x"}, "mine": None})] == ["sound"]


def test_no_reward_at_all_is_refused():
    with pytest.raises(UserError, match=r"^stages\.ppo\.rewards is empty: nothing scores completions"):
        parse_rewards({})
