"""kill -9 anywhere in PPO, retype the command: the same figures, samples and weights, bit for bit."""

import json
from pathlib import Path

import pytest

from align.artifacts import read_manifest
from align.tracking.local import read_metrics
from tests.chain.runs import finish, kill_when, logged_step

JUDGE = """
def vowels(prompts, completions, rows):
    '''No score for a completion that says nothing.'''
    return [sum(map(text.count, "aeiou")) / len(text) if text.strip() else None for text in completions]
"""
PPO = {
    "rewards.preference": "null",
    "rewards.vowels": "{function: 'judge:vowels'}",
    "max_steps": 4,
    "save_every": 2,
    "completions_per_update": 8,
    "batch_size": 4,
    "micro_batch_size": 2,
    "update_epochs": 2,
    "max_tokens": 256,
    "max_new_tokens": 8,
    "temperature": 1.5,
    "learning_rate": 1e-4,
    # What a checkpoint has to carry beyond weights, moments of Adam and the schedule.
    "kl_controller": "adaptive",
    "kl_horizon_completions": 40,
    "reward_scale": "running",
    "ema_decay": 0.8,
    "value_warmup_updates": 1,
    "sample_every": 1,
    "sample_prompts": 2,
}
COMMAND = ("+recipe=ppo", "precision=fp32", *(f"stages.ppo.{key}={value}" for key, value in PPO.items()))
STEPS_PER_UPDATE = 4


def run_folder(folder: Path) -> Path:
    """A folder to run in, with the reward function; returns the stage's folder."""
    (folder / "judge.py").write_text(JUDGE)
    return folder / "runs/ppo/ppo"


def figures(stage_dir: Path) -> list[str]:
    """Each line of metrics.jsonl but for what time decides, digit by digit."""
    lines = read_metrics(stage_dir / "metrics.jsonl")
    timeless = [{key: line[key] for key in line if "second" not in key} for line in lines]
    return [json.dumps(line) for line in timeless]


def digests(stage_dir: Path) -> dict[str, str]:
    """Weights of each model, as the manifest gives them."""
    outputs = read_manifest(stage_dir).outputs
    return {one["path"]: one["sha256"] for one in outputs if one["path"].endswith("/model.safetensors")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    stage_dir = run_folder(folder)
    finish(folder, *COMMAND)
    return stage_dir


@pytest.mark.timeout(300)
def test_ppo_killed_at_any_moment_ends_as_if_it_never_was(uninterrupted, tmp_path):
    stage_dir = run_folder(tmp_path)
    second, last = (stage_dir / f"checkpoints/checkpoint-{n * STEPS_PER_UPDATE}" for n in (2, 4))
    # Before the first checkpoint; in a rollout that no checkpoint follows; after the last.
    kill_when(lambda: logged_step(stage_dir) >= 1, tmp_path, *COMMAND)
    assert not (second / "sealed.json").exists()
    kill_when(lambda: logged_step(stage_dir) >= 3, tmp_path, *COMMAND)
    assert not last.exists()
    kill_when((stage_dir / "policy.partial").exists, tmp_path, *COMMAND)
    assert not (stage_dir / "policy").exists()
    output = finish(tmp_path, *COMMAND)
    assert f"ppo: going on from step {4 * STEPS_PER_UPDATE}" in output
    assert [json.loads(line)["step"] for line in figures(stage_dir)] == [1, 2, 3, 4]
    assert figures(stage_dir) == figures(uninterrupted)
    assert (stage_dir / "samples.jsonl").read_bytes() == (uninterrupted / "samples.jsonl").read_bytes()
    assert digests(stage_dir) == digests(uninterrupted)
    assert read_manifest(stage_dir).metrics.keys() == read_manifest(uninterrupted).metrics.keys()


def test_the_uninterrupted_run_has_what_a_checkpoint_could_lose(uninterrupted):
    """Else the test above would show nothing."""
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    assert len({line["kl/coefficient"] for line in lines}) == 4
    assert all(line["kl/nats_per_completion"] != 0 for line in lines[2:])
    scales = [line["reward/total"] / line["reward/score"] for line in lines]
    assert max(scales) - min(scales) > 0.01 * abs(scales[0])
    assert digests(uninterrupted).keys() == {f"{name}/model.safetensors" for name in ("policy", "policy_ema", "value")}
    assert len(set(digests(uninterrupted).values())) == 3
    steps = [json.loads(line)["step"] for line in (uninterrupted / "samples.jsonl").read_text().splitlines()]
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
