"""What is measured of a policy while it trains is the same on one rank and on two, whatever is sharded."""

import sys
from pathlib import Path

import pytest

from align.tracking.local import read_metrics
from align.trainers.samples import read_samples
from tests.distributed.test_ppo_ranks import make_reward_model
from tests.launching import deepspeed, run_modes, slow

SCRIPT = Path(__file__).with_name("best_ranks.py")
ONE_RANK = {"one_win": "by=win_rate", "one_kl": "by=kl"}
TWO_RANKS = {"ddp_win": "by=win_rate", "zero2_win": "by=win_rate,zero=2", "zero3_win": "by=win_rate,zero=3"}
TWO_RANKS |= {"zero3_kl": "by=kl,zero=3"}
PAIRS = [("ddp_win", "one_win"), ("zero2_win", "one_win"), ("zero3_win", "one_win"), ("zero3_kl", "one_kl")]
pytestmark = [slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    make_reward_model(folder / "reward_model")
    run_modes([sys.executable], SCRIPT, folder, ONE_RANK)
    run_modes(deepspeed("--no_local_rank"), SCRIPT, folder, TWO_RANKS)
    return folder


def judged(stage: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(stage / "metrics.jsonl") if "eval_loss" in line]


@pytest.mark.parametrize(("name", "alone"), PAIRS)
def test_two_ranks_measure_what_one_does(folder, name, alone):
    found, expected = judged(folder / name / "sft"), judged(folder / alone / "sft")
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [0, 2, 4]
    measured = [key for key in expected[0] if key.startswith("eval_") and "second" not in key and "runtime" not in key]
    assert {"eval_win_rate", "eval_garbled"} <= set(measured) if name.endswith("win") else "eval_kl" in measured
    for now, then in zip(found, expected, strict=True):
        assert {key: now[key] for key in measured} == pytest.approx({key: then[key] for key in measured}, abs=2e-3)
    if name.endswith("win"):
        assert found[0]["eval_win_rate"] == 0.5, "before the first step every reply is the baseline's"
    replies = [read_samples(folder / way / "sft/samples.jsonl") for way in (name, alone)]
    assert replies[0][:9] == replies[1][:9], "before the first step the policy is the same to the last bit"


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_the_policy_of_the_best_evaluation_is_left(folder, name):
    assert (folder / name / "sft/policy/model.safetensors").is_file()
