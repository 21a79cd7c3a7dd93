"""The PPO stage: what it leaves, what it says, and what it refuses before anything is trained."""

import contextlib
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align import cli
from align.artifacts import damaged_outputs, read_manifest
from align.chain import check_chain
from align.config.errors import UserError
from align.config.schema import Advantage, Guard
from align.config.store import compose_run
from align.data.forest import Tree, lay_out
from align.stages import ppo as ppo_stage
from align.stages.ppo_models import Models
from align.tracking.local import read_metrics
from align.trainers.guards import Alarm, Guards
from align.trainers.ppo import PPOTrainer
from align.trainers.samples import HeldOutSamples, read_samples
from tests.launching import slow
from tests.stages.runs import write_pairs
from tests.tracking.wandb_file import read_runs

SETTINGS = {
    "max_steps": 2,
    "save_every": 1,
    "completions_per_update": 8,
    "batch_size": 4,
    "micro_batch_size": 4,
    "update_epochs": 1,
    "max_tokens": 128,
    "max_new_tokens": 10,
    "temperature": 1.5,
    "learning_rate": 3e-4,
    "sample_every": 1,
    "sample_prompts": 4,
}
MINE = "stages.ppo.rewards.mine={function: 'tests.stages.test_ppo:vowels'}"
ALONE = ("stages.ppo.rewards.preference=null", MINE)
BASE = str(Path(__file__).resolve().parents[2] / "align/world/models/sft")
NOT_SIGNED = {"config.yaml", "started.json", "metrics.jsonl", "manifest.json", "wandb_id"}


def vowels(prompts: list[Any], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [sum(map(text.count, "aeiou")) / 10 for text in completions]


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """The recipe's exit code and what it said."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Who is villager {n}?"}) + "\n" for n in range(24)))
    said = io.StringIO()
    words = [f"data.prompts={prompts}", f"run_dir={folder}/run", f"cache_dir={folder}/cache", "precision=fp32"]
    words += [] if any(word.startswith("data.held_out") for word in arguments) else ["data.held_out_fraction=0.3"]
    words += [f"stages.ppo.{key}={value}" for key, value in SETTINGS.items()]
    # The embedded model's settings hold the policy still at first; without a value model there is nothing to say of it.
    words += [] if any("advantage=" in word for word in arguments) else ["stages.ppo.value_warmup_updates=0"]
    # What is given comes last, in place of the settings above.
    given = {word.partition("=")[0] for word in arguments}
    words = [word for word in words if word.partition("=")[0] not in given]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main(["+recipe=ppo", *words, *arguments])
    return code, said.getvalue()


class Trained(NamedTuple):
    """A finished run, with numbers of the model as it was in memory when it was saved."""

    folder: Path
    said: str
    state: dict[str, torch.Tensor]
    logps: torch.Tensor
    values: torch.Tensor | None

    @property
    def stage(self) -> Path:
        return self.folder / "run/ppo"


PROMPT, COMPLETION = [5, 9, 300, 17, 42, 8], [33, 7, 120, 64]


def train(folder: Path, *arguments: str) -> Trained:
    kept: list[Any] = []
    save = ppo_stage.save_actor

    def watched(session, trainer):
        trainer.inner.eval()
        batch = lay_out([Tree(PROMPT, [COMPLETION])], trainer.layout, 0)
        with torch.no_grad():
            found = trainer.inner(batch)
        state = {name: tensor.clone() for name, tensor in trainer.inner.state_dict().items()}
        kept.extend((state, found.logps, found.values))
        return save(session, trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_stage, "save_actor", watched)
        code, said = run(folder, *arguments)
    assert code == 0, said
    return Trained(folder, said, *kept)


def reward_model(folder: Path, *arguments: str) -> Path:
    pairs = write_pairs(folder)
    words = [f"data.preferences={pairs}", f"run_dir={folder}/reward", f"cache_dir={folder}/cache", "precision=fp32"]
    steps = ["stages.reward.max_steps=2", "stages.reward.learning_rate=1e-3", "stages.reward.max_tokens=128"]
    assert cli.main(["+recipe=reward", *words, *steps, *arguments]) == 0
    return folder / "reward/reward/reward_model"


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    return reward_model(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def rewards(judge) -> tuple[str, ...]:
    return f"stages.ppo.rewards.preference={{model: '{judge}', weight: 0.5}}", MINE


@pytest.fixture(scope="module")
def trained(tmp_path_factory, rewards) -> Trained:
    folder = tmp_path_factory.mktemp("ppo")
    return train(folder, *rewards, "stages.ppo.ema_decay=0.5", "log=wandb", "log.mode=offline")


def completion_logps(model: torch.nn.Module, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([PROMPT + COMPLETION])).logits[0] / temperature
    rows = logits.log_softmax(-1)[len(PROMPT) - 1 : -1]
    return rows.gather(1, torch.tensor(COMPLETION)[:, None])[:, 0]


def state_scores(model: torch.nn.Module) -> torch.Tensor:
    """The score of each state before a token of COMPLETION, each from a forward of its own."""
    states = [PROMPT + COMPLETION[:at] for at in range(len(COMPLETION))]
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=torch.tensor([state])).logits[0] for state in states])


# What it leaves.


def test_transformers_alone_loads_policy_and_value_model_as_they_were_trained(trained, judge):
    policy = AutoModelForCausalLM.from_pretrained(trained.stage / "policy")
    torch.testing.assert_close(completion_logps(policy, 1.5), trained.logps, rtol=0, atol=1e-5)
    for name, tensor in policy.state_dict().items():
        if f"policy.{name}" in trained.state:
            assert torch.equal(tensor, trained.state[f"policy.{name}"]), name
    start = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert not torch.allclose(completion_logps(start, 1.5), trained.logps, rtol=0, atol=1e-3)
    value = AutoModelForSequenceClassification.from_pretrained(trained.stage / "value")
    values = value.config.value_scale * (state_scores(value) - value.config.reward_centre)
    torch.testing.assert_close(values, trained.values, rtol=0, atol=1e-5)
    before = AutoModelForSequenceClassification.from_pretrained(judge)
    began = 0.5 * (state_scores(before) - before.config.reward_centre)
    assert (began - trained.values).abs().max() > 1e-3, "it must be trained, or it shows nothing"
    # Values started as what the reward model gives: weight * (score - centre).
    assert (value.config.value_scale, value.config.reward_centre) == (0.5, before.config.reward_centre)
    assert "<|" in AutoTokenizer.from_pretrained(trained.stage / "policy").chat_template


def test_the_average_lies_between_the_start_and_the_policy(trained):
    start = load_file(f"{BASE}/model.safetensors")
    policy, average = (load_file(trained.stage / name / "model.safetensors") for name in ("policy", "policy_ema"))
    assert average.keys() == policy.keys()
    moved = sum((policy[name] - start[name].float()).pow(2).sum() for name in policy)
    along = sum(((average[name] - start[name].float()) * (policy[name] - start[name].float())).sum() for name in policy)
    assert 0.3 < along / moved < 0.95
    assert AutoModelForCausalLM.from_pretrained(trained.stage / "policy_ema").config.use_cache


def test_the_manifest_signs_for_every_file_but_the_settings_and_the_log(trained):
    manifest = read_manifest(trained.stage)
    files = {str(path.relative_to(trained.stage)) for path in trained.stage.rglob("*") if path.is_file()}
    signed = {output["path"] for output in manifest.outputs}
    assert files - NOT_SIGNED == signed
    assert {"samples.jsonl", "ppo_report.html", "policy/model.safetensors", "value/config.json"} <= signed
    assert damaged_outputs(trained.stage, manifest) == []
    page = (trained.stage / "ppo_report.html").read_text()
    assert "<svg" in page and "Who is villager" in page


def test_rewards_are_logged_by_name_and_add_up_by_weight(trained):
    lines = read_metrics(trained.stage / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["reward/score"] == pytest.approx(0.5 * line["reward/preference"] + line["reward/mine"], rel=1e-6)
        assert abs(line["reward/preference"]) > 1e-6 and line["reward/mine"] > 0
    figures = read_manifest(trained.stage).metrics
    assert figures["first/reward/score"] == lines[0]["reward/score"]
    assert figures["last/reward/score"] == lines[1]["reward/score"]


def test_a_text_scores_the_same_in_the_reward_stages_model_and_inside_ppo(trained, judge):
    compare_scores(trained, judge)


def compare_scores(trained: Trained, judge: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    tokenizer = AutoTokenizer.from_pretrained(judge)
    samples = read_samples(trained.stage / "samples.jsonl")
    compared = []
    for line in samples:
        chat = [{"role": "user", "content": line["prompt"]}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + line["completion"]
        ids = tokenizer(text + tokenizer.eos_token * line["finished"], add_special_tokens=False).input_ids
        with torch.no_grad():
            score = model(input_ids=torch.tensor([ids])).logits.item() - model.config.reward_centre
        assert line["scores"]["preference"] == pytest.approx(score, abs=1e-5)
        compared.append(score)
    assert len(compared) > 4 and max(compared) - min(compared) > 1e-3


def test_samples_are_of_held_out_prompts_before_the_first_update_and_after_each(trained):
    samples = read_samples(trained.stage / "samples.jsonl")
    assert [line["step"] for line in samples] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({line["prompt"] for line in samples}) == 4
    for line in samples:
        assert line["score"] == pytest.approx(0.5 * line["scores"]["preference"] + line["scores"]["mine"])
    figures = read_manifest(trained.stage).metrics
    for moment, step in (("before", 0), ("after", 2)):
        mean = sum(line["score"] for line in samples if line["step"] == step) / 4
        assert figures[f"{moment}/samples/score"] == pytest.approx(mean)


def test_wandb_has_the_samples_of_each_step_as_a_table(trained):
    (seen,) = read_runs(trained.folder / "run")
    tables = {name: row["train/global_step"] for row in seen["rows"] for name in row if name.startswith("samples/step")}
    assert {name.partition(".")[0]: step for name, step in tables.items()} == {
        f"samples/step_{step:05d}": step for step in range(3)
    }
    assert [row["reward/mine"] for row in seen["rows"] if "reward/mine" in row] == [
        line["reward/mine"] for line in read_metrics(trained.stage / "metrics.jsonl")
    ]
    written = [json.loads(path.read_text()) for path in sorted((trained.folder / "run").rglob("*.table.json"))]
    texts = {row[table["columns"].index("completion")] for table in written for row in table["data"]}
    assert texts == {line["completion"] for line in read_samples(trained.stage / "samples.jsonl")}


# Adapters on one base.


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Trained, Path]:
    folder = tmp_path_factory.mktemp("shared")
    judge = reward_model(folder, "peft=lora")
    rewards = (f"stages.ppo.rewards.preference={{model: '{judge}', weight: 2}}", MINE)
    return train(folder, *rewards, "peft=lora", "stages.ppo.ema_decay=0.5"), judge


def test_the_merged_policy_is_the_base_with_the_adapter(shared):
    trained, _ = shared
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    plain = completion_logps(base, 1.5)
    adapted = completion_logps(PeftModel.from_pretrained(base, trained.stage / "adapter"), 1.5)
    merged = completion_logps(AutoModelForCausalLM.from_pretrained(trained.stage / "policy"), 1.5)
    torch.testing.assert_close(adapted, trained.logps, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, trained.logps, rtol=0, atol=1e-5)
    assert (plain - merged).abs().max() > 1e-3
    manifest = read_manifest(trained.stage)
    signed = {output["path"] for output in manifest.outputs}
    assert {"adapter/adapter_model.safetensors", "policy/model.safetensors", "policy_ema/model.safetensors"} <= signed
    files = {str(path.relative_to(trained.stage)) for path in trained.stage.rglob("*") if path.is_file()}
    assert files - NOT_SIGNED == signed


def test_a_reward_model_that_was_an_adapter_of_the_same_base_is_one_inside_ppo(shared):
    trained, judge = shared
    adapter = judge.parent / "adapter"
    assert f"reward preference is an adapter of the policy's own base ({adapter})" in trained.said
    compare_scores(trained, judge)


def test_values_can_be_had_from_the_folder_of_the_value_adapter_alone(shared):
    trained, judge = shared
    folder = trained.stage / "value"
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1, dtype=torch.float32)
    scores = state_scores(PeftModel.from_pretrained(base, folder))
    numbers = json.loads((folder / "value.json").read_text())
    values = numbers["value_scale"] * (scores - numbers["reward_centre"])
    torch.testing.assert_close(values, trained.values, rtol=0, atol=1e-5)
    centre = json.loads((judge / "config.json").read_text())["reward_centre"]
    assert numbers == {"value_scale": 2.0, "reward_centre": centre}
    assert "value/value.json" in {output["path"] for output in read_manifest(trained.stage).outputs}
    assert not (trained.stage / "adapter/value.json").exists()


# Without a value model.


@pytest.mark.parametrize("advantage", [Advantage.rloo, Advantage.grpo, Advantage.reinforce_plus_plus])
def test_without_a_value_model_no_value_is_left(advantage, tmp_path, rewards):
    shared = advantage is Advantage.grpo
    more = ["peft=lora", *rewards] if shared else ALONE
    pairs = ["stages.ppo.completions_per_prompt=2", "data.held_out_fraction=0", "stages.ppo.max_steps=1"]
    found = train(tmp_path, *more, *pairs, f"stages.ppo.advantage={advantage.value}")
    left = {path.name for path in found.stage.iterdir()}
    assert left - NOT_SIGNED == {"policy", "samples.jsonl", "ppo_report.html", *(["adapter"] if shared else [])}
    assert found.values is None
    (line,) = read_metrics(found.stage / "metrics.jsonl")
    assert not any(name.startswith("value/") for name in line)
    assert "ppo: no prompt is held out, so samples are of prompts that are trained on" in found.said
    # A reward model with weights of its own is no adapter of anything.
    assert "own base" not in found.said


def test_where_prompts_are_held_out_nothing_is_said_of_them(trained):
    assert "no prompt is held out" not in trained.said


# Guards.


class Killed(RuntimeError):
    """Stands for the end of the process."""


@pytest.mark.parametrize(("interrupted", "sample_every"), [(False, 1), (True, 1), (False, 0)])
def test_a_guard_that_stops_leaves_the_policy_of_the_best_checkpoint(interrupted, sample_every, tmp_path, monkeypatch):
    """Interrupted: while it was saved, and the same command typed again."""
    kept: dict[int, tuple[dict[str, torch.Tensor], list[torch.Tensor]]] = {}
    end_update, observe = PPOTrainer.end_update, Guards.observe

    def ended(trainer):
        average = [tensor.clone() for tensor in trainer.average.averages]
        kept[trainer.update] = {name: one.clone() for name, one in trainer.inner.state_dict().items()}, average
        return end_update(trainer) | {"objective": {1: 1.0, 2: 5.0}.get(trainer.update, 2.0)}

    def alarmed(guards, update, figures):
        alarms = [Alarm(Guard.kl, "too far")] if update == 3 else []
        guards.raised += [alarm.line(update) for alarm in alarms]
        return observe(guards, update, figures) + alarms

    def killed(*_):
        raise Killed

    monkeypatch.setattr(PPOTrainer, "end_update", ended)
    monkeypatch.setattr(Guards, "observe", alarmed)
    every = f"stages.ppo.sample_every={sample_every}"
    options = ("stages.ppo.max_steps=5", "stages.ppo.stop_on=[kl]", "stages.ppo.ema_decay=0.5", every)
    if interrupted:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ppo_stage, "save_actor", killed)
            run(tmp_path, *ALONE, *options)
    found = train(tmp_path, *ALONE, *options)
    assert "ppo: stopped by a guard; the policy is that of checkpoint-4, the best before" in found.said
    best, average = kept[2]
    assert all(torch.equal(found.state[name], tensor) for name, tensor in best.items())
    assert not all(torch.equal(kept[3][0][name], tensor) for name, tensor in best.items())
    assert [line["step"] for line in read_metrics(found.stage / "metrics.jsonl")] == [1, 2, 3]
    steps = {line["step"] for line in read_samples(found.stage / "samples.jsonl")}
    assert steps == ({0, 1, 2, 3} if sample_every else {0, 2, 3})
    check_figures_of(2, found)
    saved = load_file(found.stage / "policy_ema/model.safetensors")
    names = [name.removeprefix("policy.") for name in best if name.startswith("policy.")]
    assert len(saved) == len(average) == len(names)
    assert all(any(torch.equal(one, tensor) for one in saved.values()) for tensor in average)
    manifest = read_manifest(found.stage)
    assert manifest.metrics["stopped_by_guard"] == 1.0
    assert "too far" in (found.stage / "ppo_report.html").read_text()


def check_figures_of(update: int, found: Trained) -> None:
    """The manifest's last figures, and its samples after, are those of the policy after `update`, which was saved."""
    model = AutoModelForCausalLM.from_pretrained(found.stage / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(found.stage / "policy")
    samples = [line for line in read_samples(found.stage / "samples.jsonl") if line["step"] == update]
    assert len(samples) == 4
    for line in samples:
        chat = [{"role": "user", "content": line["prompt"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        reply = model.generate(**ids, do_sample=False, max_new_tokens=10)[0, ids["input_ids"].shape[1] :]
        assert line["completion"] == tokenizer.decode(reply, skip_special_tokens=True)
    figures, lines = read_manifest(found.stage).metrics, read_metrics(found.stage / "metrics.jsonl")
    assert figures["after/samples/score"] == pytest.approx(sum(line["score"] for line in samples) / 4)
    assert figures["last/reward/score"] == lines[update - 1]["reward/score"] != lines[-1]["reward/score"]
    assert figures["updates"] == len(lines)


# What is refused.


def test_a_finished_run_is_skipped_and_other_rewards_are_refused_by_name(trained, rewards, judge):
    same = (*rewards, "stages.ppo.ema_decay=0.5", "log=wandb", "log.mode=offline")
    code, said = run(trained.folder, *same)
    assert code == 0 and "ppo: complete, skipped" in said
    other = (f"stages.ppo.rewards.preference={{model: '{judge}', weight: 2}}", *same[1:])
    code, said = run(trained.folder, *other)
    assert code == 2 and "stages.ppo.rewards.preference.weight was 0.5, is 2" in said


def test_a_finished_run_knows_the_reward_model_it_was_made_with(trained, rewards, judge):
    same = (*rewards, "stages.ppo.ema_decay=0.5", "log=wandb", "log.mode=offline")
    file = judge.parent / "manifest.json"
    content = file.read_text()
    weights = next(one for one in json.loads(content)["outputs"] if one["path"] == "reward_model/model.safetensors")
    try:
        # As if the reward stage had been run again, to other weights.
        file.write_text(content.replace(weights["sha256"], "0" * 64))
        code, said = run(trained.folder, *same)
    finally:
        file.write_text(content)
    assert code == 2 and f"was made from other inputs: {judge} changed since" in said
    assert run(trained.folder, *same)[0] == 0


REFUSED = [
    (
        ("stages.ppo.rewards.preference.model=nowhere",),
        "stages.ppo.rewards.preference.model=nowhere: no such folder, and not a hub id",
    ),
    (
        ("stages.ppo.rewards.preference.model=tiny-sft",),
        "stages.ppo.rewards.preference.model=tiny-sft: not a reward model, it has no score head; make a reward model "
        "with +recipe=reward first",
    ),
    (
        (ALONE[0], MINE.replace("vowels", "vowel")),
        "stages.ppo.rewards.mine.function=tests.stages.test_ppo:vowel: tests.stages.test_ppo has no vowel; "
        "did you mean vowels?",
    ),
    ((*ALONE, "stages.ppo.rollout=vllm"), "stages.ppo.rollout=vllm: "),
]


@pytest.mark.parametrize(("arguments", "line"), REFUSED)
def test_what_cannot_work_is_one_line_before_a_model_is_loaded(arguments, line, tmp_path, monkeypatch):
    monkeypatch.setattr(Models, "prove_layout", lambda self: pytest.fail("it went on to load models"))
    code, said = run(tmp_path, *arguments)
    last = said.strip().splitlines()[-1]
    assert code == 2 and last.startswith(f"align: {line}"), said
    assert not (tmp_path / "run/ppo/metrics.jsonl").exists()


def test_a_function_that_fails_is_one_line_and_the_run_goes_on_once_it_is_mended(tmp_path, monkeypatch):
    calls = []

    def failing(prompts, completions, rows):
        calls.append(len(completions))
        if len(calls) == 4:
            raise KeyError("label")
        return [0.5] * len(completions)

    import tests.stages.test_ppo as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "vowels", failing)
        code, said = run(tmp_path, *ALONE)
    assert code == 2
    assert said.strip().splitlines()[-1] == (
        "align: tests.stages.test_ppo:vowels: KeyError: 'label'; mend the function; then the same command goes on from "
        "the last checkpoint"
    )
    # Samples before, update 1, samples after it; the function failed in update 2.
    assert calls == [4, 8, 4, 8]
    code, said = run(tmp_path, *ALONE)
    assert code == 0 and "ppo: going on from step 2" in said
    assert [line["step"] for line in read_metrics(tmp_path / "run/ppo/metrics.jsonl")] == [1, 2]


RLHF_REFUSED = {
    "stages.ppo.rewards.mine.function=tests.stages.test_ppo:vowel": "has no vowel; did you mean vowels?",
    "stages.ppo.rewards.preference.model=nowhere": "no such folder, and not a hub id (organisation/model)",
    "stages.ppo.rewards.preference.model=tiny-sft": "not a reward model, it has no score head",
}


@pytest.mark.parametrize(("given", "words"), RLHF_REFUSED.items())
def test_a_reward_that_cannot_be_had_is_refused_before_the_stages_in_front_of_ppo(given, words, tmp_path):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(["+recipe=rlhf", f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache", given])
    line = said.getvalue().strip()
    assert code == 2 and line.startswith(f"align: {given}: ") and words in line
    assert line.endswith("make a reward model with +recipe=reward first") is (".model=" in given)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_that_an_earlier_stage_makes_need_not_be_there_yet(tmp_path):
    check_chain(compose_run(["+recipe=rlhf", f"run_dir={tmp_path}/run", "cache_dir=none"]).config, tmp_path / "run")


def test_a_hub_id_that_cannot_be_had_names_the_key_and_the_config(tmp_path, monkeypatch):
    def absent(name, **_):
        raise OSError(f"{name} is not on the hub")

    monkeypatch.setattr("align.models.load.AutoConfig.from_pretrained", absent)
    monkeypatch.setattr("align.models.load.AutoTokenizer.from_pretrained", absent)
    given = "stages.ppo.rewards.preference.model=org/name"
    with pytest.raises(UserError) as refusal:
        check_chain(compose_run(["+recipe=rlhf", given, f"run_dir={tmp_path}/run"]).config, tmp_path / "run")
    assert str(refusal.value).startswith(f"{given}: no such folder here, and the hub does not give the config (OSError")
    assert "tokenizer" not in str(refusal.value)


# A function that is another one.

FAILING = """
calls = []
def score(prompts, completions, rows):
    calls.append(len(completions))
    if len(calls) == 4:
        raise KeyError("label")
    return [len(text) / 50 for text in completions]
"""


@pytest.fixture
def own_function(tmp_path, monkeypatch):
    """The module of a reward function, and the command line that names it."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own_scores.py"
    file.write_text(FAILING.replace("== 4", "== 0"))
    yield file, (ALONE[0], "stages.ppo.rewards.mine={function: 'own_scores:score'}")
    sys.modules.pop("own_scores", None)


CHANGED = "was made from other inputs: own_scores:score changed since"


def test_a_changed_function_is_refused_where_a_finished_run_would_be_skipped(own_function, tmp_path):
    file, rewards = own_function
    assert run(tmp_path, *rewards, "stages.ppo.max_steps=1")[0] == 0
    text = file.read_text()
    entry = {"name": "rewards.mine", "path": "own_scores:score", "digest": hashlib.sha256(text.encode()).hexdigest()}
    assert entry in read_manifest(tmp_path / "run/ppo").inputs
    file.write_text(text.replace("50", "40"))
    code, said = run(tmp_path, *rewards, "stages.ppo.max_steps=1")
    assert code == 2 and CHANGED in said
    file.write_text(text)
    code, said = run(tmp_path, *rewards, "stages.ppo.max_steps=1")
    assert code == 0 and "ppo: complete, skipped" in said


def test_a_function_that_failed_may_be_mended_and_only_then_changed(own_function, tmp_path, monkeypatch):
    def killed(*_):
        raise Killed

    file, rewards = own_function
    file.write_text(FAILING)
    code, said = run(tmp_path, *rewards)
    assert code == 2 and "KeyError: 'label'; mend the function; then the same command goes on from the last" in said
    mended = FAILING.replace("== 4", "== 0")
    file.write_text(mended)
    del sys.modules["own_scores"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ppo_stage, "save_actor", killed)
        run(tmp_path, *rewards)
    file.write_text(mended.replace("50", "40"))
    for _ in range(2):
        code, said = run(tmp_path, *rewards)
        assert code == 2 and CHANGED in said
    file.write_text(mended)
    code, said = run(tmp_path, *rewards)
    assert code == 0 and "ppo: going on from step 4" in said
    digests = {one["path"]: one["digest"] for one in read_manifest(tmp_path / "run/ppo").inputs}
    assert digests["own_scores:score"] == hashlib.sha256(mended.encode()).hexdigest()
    assert not (tmp_path / "run/ppo/function_failed").exists()


def test_the_policy_of_the_best_samples_is_kept_and_training_ends_when_none_are_better(tmp_path, monkeypatch, rewards):
    scores = iter([0.0, 0.5, 0.2, 0.9])
    take = HeldOutSamples.take

    def taken(self, update):
        lines, figures = take(self, update)
        return lines, figures | {"samples/score": next(scores)}

    monkeypatch.setattr(HeldOutSamples, "take", taken)
    kept = {}
    seal = PPOTrainer.save_state

    def remember(self, folder=None):
        seal(self, folder)
        kept[self.update] = {name: tensor.clone() for name, tensor in self.inner.policy.state_dict().items()}

    monkeypatch.setattr(PPOTrainer, "save_state", remember)
    best = ("stages.ppo.keep_best=true", "stages.ppo.stop_after=1", "stages.ppo.max_steps=4")
    done = train(tmp_path, *rewards, *best)
    metrics = read_manifest(done.stage).metrics
    assert (metrics["updates"], metrics["kept_step"], metrics["stopped_early"]) == (2.0, 1.0, 1.0)
    assert "stopped at step 2: the score of held-out samples was not better than the 0.5 of step 1" in done.said
    assert "the policy is that of update 1, where the score of held-out samples was highest: 0.5000" in done.said
    policy = {name.removeprefix("policy."): tensor for name, tensor in done.state.items() if name.startswith("policy.")}
    assert len(policy) > 10 and all(torch.equal(policy[name], kept[1][name]) for name in policy)


@slow
def test_figures_of_evaluate_are_measured_with_the_samples(tmp_path, rewards):
    by = ("stages.ppo.best_by=win_rate", "stages.ppo.stop_after=9", "best.rows=2", "best.max_new_tokens=8")
    judge = ("best.judge.kind=function", "best.judge.function=tests.stages.test_ppo:vowels")
    done = train(tmp_path, *rewards, *by, *judge)
    rates = [line["eval_win_rate"] for line in read_metrics(done.stage / "metrics.jsonl") if "eval_win_rate" in line]
    assert len(rates) == 2 and all(0 <= rate <= 1 for rate in rates)
    assert read_manifest(done.stage).metrics["after/win_rate"] == rates[-1]
