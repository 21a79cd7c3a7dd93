"""The loss of 20 steps of DPO, or of a reward model, is one curve, however the batch is laid out, split or sharded."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.tracking.local import read_metrics
from tests.launching import deepspeed, run_modes

SCRIPT = Path(__file__).with_name("curves.py")
ONE_RANK = {"forest": "", "padded": "layout=padded", "accumulation": "micro=2", "lora": "peft=lora"}
TWO_RANKS = {
    "ddp": "micro=4",
    "zero0": "micro=4,zero=0",
    "zero1": "micro=4,zero=1",
    "zero2": "micro=4,zero=2",
    # A cache of its own: the reference pass, too, must be right under ZeRO-3.
    "zero3": "micro=2,zero=3,cache=zero3",
    "zero2_offload": "micro=4,zero=2,offload=cpu",
    "zero3_offload": "micro=4,zero=3,offload=cpu",
    "zero3_lora": "micro=4,zero=3,peft=lora",
}
REWARD_ONE_RANK = {"reward": "stage=reward", "reward_padded": "stage=reward,layout=padded,micro=2"}
REWARD_TWO_RANKS = {
    "reward_ddp": "stage=reward,micro=4",
    "reward_zero2": "stage=reward,micro=2,zero=2",
    "reward_zero3": "stage=reward,micro=4,zero=3",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Name of a way -> the folder of its stage."""
    folder = tmp_path_factory.mktemp("curves")
    run_modes([sys.executable], SCRIPT, folder, ONE_RANK | REWARD_ONE_RANK)
    run_modes(deepspeed("--no_local_rank"), SCRIPT, folder, TWO_RANKS | REWARD_TWO_RANKS)
    return {path.parts[-3]: path.parent for path in folder.glob("*/*/metrics.jsonl")}


@pytest.fixture(scope="module")
def curves(folders) -> dict[str, list[float]]:
    return {name: losses(folders[name] / "metrics.jsonl") for name in {**ONE_RANK, **TWO_RANKS}}


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(path) if "loss" in line]


def largest_difference(curve: list[float], other: list[float]) -> float:
    assert len(curve) == len(other) == 20
    return max(abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True))


@pytest.mark.timeout(900)
def test_the_first_loss_is_ln2_however_it_is_computed(curves):
    assert {name: curve[0] for name, curve in curves.items()} == pytest.approx(
        {name: math.log(2) for name in curves}, abs=1e-6
    )


SAME = [name for name in {**ONE_RANK, **TWO_RANKS} if name != "forest" and "lora" not in name]


@pytest.mark.parametrize("name", SAME)
def test_twenty_steps_follow_the_same_curve(curves, name):
    assert largest_difference(curves[name], curves["forest"]) < 1e-5
    assert curves["forest"][-1] < 0.99 * math.log(2), "the curve must move, or it shows nothing"


def test_lora_under_zero3_follows_lora_on_one_rank(curves):
    assert largest_difference(curves["zero3_lora"], curves["lora"]) < 1e-5
    assert largest_difference(curves["lora"], curves["forest"]) > 1e-3


@pytest.mark.parametrize("name", ["reward_padded", *REWARD_TWO_RANKS])
def test_a_reward_model_is_the_same_however_it_is_trained(folders, name):
    one, other = (folders[way] for way in ("reward", name))
    expected, found = (losses(folder / "metrics.jsonl") for folder in (one, other))
    assert largest_difference(found, expected) < 1e-5
    assert min(expected) < 0.9 * expected[0], "the curve must move, or it shows nothing"
    figures = [json.loads((folder / "scores.json").read_text())["figures"] for folder in (one, other)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    configs = [json.loads((folder / "reward_model/config.json").read_text()) for folder in (one, other)]
    assert configs[1]["reward_centre"] == pytest.approx(configs[0]["reward_centre"], abs=1e-4)
    heads = [load_file(folder / "reward_model/model.safetensors")["score.weight"] for folder in (one, other)]
    assert torch.allclose(heads[1], heads[0], atol=1e-5)
