"""What is refused on the command line, and what the one line says."""

import pytest

from align.config.errors import UserError
from align.config.store import compose_run

WRONG_KEYS = [
    ("+recipe=dpo beta=0.2", "did you mean stages.dpo.beta=0.2?"),
    ("+recipe=dpo betta=0.2", "did you mean stages.dpo.beta=0.2?"),
    ("+recipe=dpo stages.dpo.betta=0.2", "did you mean stages.dpo.beta=0.2?"),
    ("+recipe=dpo learningrate=1", "did you mean stages.dpo.learning_rate=1?"),
    ("+recipe=sft_dpo learning_rate=1", "did you mean stages.sft.learning_rate=1 or stages.dpo.learning_rate=1?"),
    ("+recipe=dpo model.pth=x", "did you mean model.path=x?"),
    ("+recipe=dpo modle=tiny", "did you mean model=tiny?"),
    ("+recipe=dpo data.preference=x", "did you mean data.preferences=x?"),
    ("+recipe=dpo stages.sft.beta=1", "did you mean stages.dpo.beta=1?"),
    ("+recipe=dpo +stages.dpo.foo=1", "stages.dpo.foo is not a key"),
    ("+recipe=dpo ++stages.dpo.foo=1", "stages.dpo.foo is not a key"),
    ("+recipe=dpo +stages.dpo.beta=0.1", "write stages.dpo.beta=0.1, without the plus"),
    ("+recipe=dpo stages.dpo={beta:1}", "stages.dpo is a section"),
    ("+recipe=dpo stages.dpo.beta", "settings are key=value"),
    ("+recipe=dpo ~stages.dpo", "nothing can be taken out"),
    ("+recipe=dpo hydra.run.dir=x", "only sweeps"),
]
WRONG_OPTIONS = [
    ("+recipe=dpo peft=lroa", "did you mean lora? (adalora, bottleneck, "),
    ("+recipe=dpo peft=null", "did you mean peft=none?"),
    ("+recipe=dpo ~peft", "write peft=none"),
    ("+recipe=dpo deepspeed=off", "did you mean deepspeed=none?"),
    ("+recipe=dpo deepspeed=3", "did you mean zero3?"),
    ("+recipe=dpo +peft=lora", "write peft=lora"),
    ("+recipe=dpo peft=[lora]", "takes one option"),
    ("+recipe=dpo model=/models/qwen", "model.path=/models/qwen names your own"),
    ("+recipe=dpo model=own", "add model.path="),
    ("+recipe=dpo model=tiny_sft model.path=/x", "drop one"),
]
WRONG_RECIPES = [
    ("+recipe=dpoo", "did you mean dpo?"),
    ("recipe=dpo", "write +recipe=dpo"),
    ("+recipes=dpo", "write +recipe=dpo"),
    ("++recipe=dpo", "write +recipe=dpo"),
    ("dpo", "did you mean +recipe=dpo?"),
    ("peft=lora", "no recipe; add one of +recipe=chat, +recipe=classify, +recipe=constitutional, "),
    ("+recipe=dpo +recipe=sft", "a run has one recipe"),
    ("+recipe=dpo,sft", "add -m for a sweep"),
]
WRONG_VALUES = [
    ("+recipe=dpo stages.dpo.beta=hot", "stages.dpo.beta=hot: a number was expected"),
    ("+recipe=dpo stages.dpo.beta=null", "a number was expected"),
    ("+recipe=dpo stages.dpo.max_steps=1.5", "a whole number was expected"),
    ("+recipe=dpo log.wandb=perhaps", "true or false was expected"),
    ("+recipe=dpo run=dpo", "a list was expected, such as [sft,dpo]"),
    ("+recipe=ppo stages.ppo.stop_on=kll", "such as [kl] (kl, reward_by_length, entropy, value, ratio)"),
    ("+recipe=ppo stages.ppo.stop_on=all", "such as [kl,reward_by_length] (kl,"),
    ("+recipe=ppo stages.ppo.stop_on=[entropy,kll]", "stop_on=[entropy,kll]: kll is not a choice; did you mean kl? ("),
    (
        "+recipe=ppo stages.ppo.batch_size=48",
        "stages.ppo.batch_size=48 does not divide stages.ppo.completions_per_update=128, the completions of an update, "
        "evenly; use stages.ppo.batch_size=32 or stages.ppo.completions_per_update=144",
    ),
    (
        "+recipe=ppo stages.ppo.completions_per_prompt=3",
        "use stages.ppo.completions_per_prompt=2 or stages.ppo.completions_per_update=384",
    ),
    ("+recipe=dpo stages.dpo.loss=ipoo", "did you mean ipo? (sigmoid, hinge, ipo, robust, sigmoid_norm)"),
    ("+recipe=dpo precision=fp16", "(auto, fp32, bf16)"),
    ("+recipe=dpo stages.dpo.beta=0.1,0.2", "add -m for a sweep"),
    ("+recipe=dpo stages.dpo.reference=x(y", "put quotes around"),
    ("+recipe=dpo run=[dpoo]", "did you mean dpo?"),
    ("+recipe=dpo run=[sft,dpo]", "recipe dpo has no stage sft"),
    ("+recipe=dpo run_dir=${nope}/x", "nope"),
    ("+recipe=dpo stages.dpo.beta=0", "must be above 0"),
    ("+recipe=dpo stages.dpo.label_smoothing=0.5", "not including, 0.5"),
    ("+recipe=dpo stages.dpo.batch_size=0", "must be 1 or more"),
    ("+recipe=dpo stages.dpo.batch_size=6", "not a multiple of stages.dpo.micro_batch_size=4"),
    ("+recipe=dpo stages.dpo.learning_rate=nan", "must be above 0"),
    ("+recipe=dpo data.held_out_fraction=1.5", "must be from 0"),
    ("+recipe=dpo peft=lora peft.r=0", "must be 1 or more"),
]
NO_EFFECT = [
    ("+recipe=dpo stages.sft.learning_rate=1e-3", "the run has no stage sft"),
    ("+recipe=sft_dpo run=[dpo] stages.sft.seed=1", "the run has no stage sft"),
    ("+recipe=dpo peft.r=8", "add peft=lora"),
    ("+recipe=dpo deepspeed.stage=3", "only ZeRO reads it"),
    ("+recipe=dpo deepspeed=none deepspeed.offload=cpu", "only ZeRO reads it"),
    ("+recipe=dpo log.project=x", "add log=wandb"),
    ("+recipe=dpo data.text=a.txt", "no stage of this run (dpo) reads it"),
    ("+recipe=dpo data=hh_rlhf data.demonstrations=a.jsonl", "they read data.preferences"),
    ("+recipe=dpo data.on_bad_rows=drop data.max_bad_fraction=0.1", "never stops"),
    ("+recipe=dpo stages.dpo.loss=hinge stages.dpo.label_smoothing=0.1", "no label smoothing"),
    ("+recipe=dpo stages.dpo.epochs=2 stages.dpo.max_steps=3", "takes the place of epochs"),
    ("+recipe=dpo stages.dpo.save_every=0 stages.dpo.keep_checkpoints=3", "writes no checkpoints"),
    ("+recipe=dpo model.revision=main", "only a hub id has revisions"),
    ("+recipe=dpo model.trust_remote_code=true", "come without code"),
    ("+recipe=sft_dpo stages.evaluate.seed=3 stages.evaluate.kl_prompts=0", "sample nothing"),
    ("+recipe=sft_dpo stages.evaluate.judge.reward_model=x", "only stages.evaluate.judge.kind=reward reads it"),
    ("+recipe=sft_dpo stages.evaluate.judge.speaker.model=x", "only stages.evaluate.judge.kind=model reads it"),
    ("+recipe=sft_dpo stages.evaluate.max_pairs=0 stages.evaluate.beta=0.2", "weighs no pairs"),
    ("+recipe=sft_dpo stages.evaluate.resamples=500", "judges nothing"),
    (
        "+recipe=reward stages.reward.objective=ordinal stages.reward.label_smoothing=0.1",
        "only stages.reward.objective=",
    ),
    ("+recipe=reward stages.reward.objective=regression stages.reward.centring_weight=1", "scores without a zero"),
]
WITH_EFFECT = [
    "+recipe=dpo peft=lora peft.r=8",
    "+recipe=dpo deepspeed=zero2 deepspeed.offload=cpu",
    "+recipe=dpo log=wandb log.project=x",
    "+recipe=sft data=hh_rlhf data.preferences=a.jsonl",
    "+recipe=sft_dpo data=hh_rlhf data.preferences=a.jsonl",
    "+recipe=dpo stages.dpo.loss=robust stages.dpo.label_smoothing=0.1",
    "+recipe=dpo stages.dpo.max_steps=3",
    "+recipe=reward stages.reward.label_smoothing=0.1 stages.reward.centring_weight=0.01",
    "+recipe=dpo model.path=org/model model.revision=main",
    "+recipe=sft_dpo stages.evaluate.temperature=0.5 stages.evaluate.seed=3",
    "+recipe=dpo peft=none deepspeed=none log=local",
    "+recipe=sft_dpo run=[dpo] stages.dpo.beta=0.2",
]


@pytest.mark.parametrize(("command", "says"), WRONG_KEYS + WRONG_OPTIONS + WRONG_RECIPES + WRONG_VALUES)
def test_a_mistake_is_refused_in_one_line_that_says_what_to_type(command, says):
    with pytest.raises(UserError) as refusal:
        compose_run(command.split())
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("command", "reason"), NO_EFFECT)
def test_a_key_that_would_change_nothing_is_refused_with_the_reason(command, reason):
    with pytest.raises(UserError, match="would have no effect") as refusal:
        compose_run(command.split())
    assert reason in str(refusal.value)


@pytest.mark.parametrize("command", WITH_EFFECT)
def test_a_key_that_changes_something_is_taken(command):
    composed = compose_run(command.split())
    typed = dict(part.split("=", 1) for part in command.split()[1:] if "." in part.split("=")[0])
    for path, value in typed.items():
        node = composed.tree
        for part in path.split("."):
            node = node[part]
        assert str(getattr(node, "name", node)).lower() == value


def test_a_recipes_own_idle_key_is_not_judged(tmp_path):
    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("# @package _global_\ndefaults: [dpo, _self_]\nname: mine\npeft: {r: 4}\n")
    assert compose_run(["+recipe=mine"], tmp_path).config.peft.r == 4


def test_a_wrong_key_in_a_users_recipe_is_named_with_a_near_match(tmp_path):
    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("# @package _global_\ndefaults: [dpo, _self_]\nstages: {dpo: {betta: 1}}\n")
    with pytest.raises(UserError, match=r"did you mean stages\.dpo\.beta") as refusal:
        compose_run(["+recipe=mine"], tmp_path)
    assert "\n" not in str(refusal.value) and "recipe/mine" in str(refusal.value)


def test_a_users_recipe_with_a_shipped_name_is_refused(tmp_path):
    recipe = tmp_path / "recipe" / "dpo.yaml"
    recipe.parent.mkdir()
    recipe.write_text("name: dpo\n")
    with pytest.raises(UserError, match="exists already"):
        compose_run(["+recipe=dpo"], tmp_path)


def test_a_missing_config_dir_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        compose_run(["+recipe=dpo"], tmp_path / "nowhere")


@pytest.mark.parametrize(
    "given", ["stages.ppo.batch_size=48", "stages.ppo.completions_per_prompt=3", "stages.ppo.completions_per_update=80"]
)
def test_each_way_out_that_is_named_for_an_uneven_update_is_one(given):
    with pytest.raises(UserError) as refusal:
        compose_run(["+recipe=ppo", given])
    ways = str(refusal.value).partition("; use ")[2].split(" or ")
    assert len(ways) == 2
    for way in ways:
        kept = [given] if way.partition("=")[0] != given.partition("=")[0] else []
        compose_run(["+recipe=ppo", *kept, way])
