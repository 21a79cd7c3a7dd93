"""Two updates of PPO are the same on one rank and on two, whatever is sharded."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.config.schema import ModelConfig
from align.models.load import load_tokenizer
from align.models.reward import load_reward_model, set_statistics
from align.tracking.local import read_metrics
from align.trainers.samples import read_samples
from tests.launching import REPO, deepspeed, run_modes

SCRIPT = Path(__file__).with_name("ppo_ranks.py")
ONE_RANK = {"one": "", "one_padded_split": "micro=1", "one_lora": "peft=lora"}
TWO_RANKS = {
    "ddp": "",
    "zero2": "zero=2",
    "zero3": "micro=1,zero=3",
    "zero3_lora": "zero=3,peft=lora",
}
PAIRS = [("one_padded_split", "one"), ("ddp", "one"), ("zero2", "one"), ("zero3", "one"), ("zero3_lora", "one_lora")]


def make_reward_model(folder: Path) -> None:
    """The embedded model under a random head, with statistics, as a reward stage leaves it."""
    model = load_reward_model("tiny-sft", ModelConfig(), torch.float32, seed=3)
    set_statistics(model.config, 0.2, 1.0)
    model.save_pretrained(folder)
    load_tokenizer("tiny-sft", ModelConfig(), None).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_reward_model(folder / "reward_model")
    run_modes([sys.executable], SCRIPT, folder, ONE_RANK)
    run_modes(deepspeed("--no_local_rank"), SCRIPT, folder, TWO_RANKS)
    return folder


def figures(stage: Path) -> list[dict[str, float]]:
    """Those of each update that time does not decide."""
    return [
        {name: value for name, value in line.items() if "second" not in name}
        for line in read_metrics(stage / "metrics.jsonl")
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "alone"), PAIRS)
def test_the_same_tokens_are_sampled_in_every_update(folder, name, alone):
    found, expected = (json.loads((folder / way / "completions.json").read_text()) for way in (name, alone))
    assert found == expected
    assert len(found) == 2 and len(found[0]) == 8 and found[0] != found[1]


@pytest.mark.parametrize(("name", "alone"), PAIRS)
def test_figures_and_samples_are_the_same(folder, name, alone):
    found, expected = (figures(folder / way / "ppo") for way in (name, alone))
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert 0 < sum(line["completion/unscored"] for line in expected) < 2
    assert expected[0]["policy/ratio_first"] < 1e-4 and expected[0]["kl/nats_per_completion"] < 1e-5
    assert expected[1]["kl/nats_per_completion"] != 0 != expected[0]["policy/approx_kl"], "the policy must move"
    samples, wanted = (read_samples(folder / way / "ppo/samples.jsonl") for way in (name, alone))
    assert [line["completion"] for line in samples] == [line["completion"] for line in wanted]
    assert [line["score"] for line in samples] == pytest.approx(
        [line["score"] for line in wanted], rel=1e-4, abs=1e-5, nan_ok=True
    )


@pytest.mark.parametrize(("name", "alone"), PAIRS)
def test_the_policy_its_average_and_the_value_model_are_the_same(folder, name, alone):
    start = load_file(REPO / "align/world/models/sft/model.safetensors")
    for part in ("policy", "policy_ema", "value"):
        files = [next((folder / way / "ppo" / part).glob("*.safetensors")) for way in (name, alone)]
        found, expected = map(load_file, files)
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert torch.allclose(tensor, expected[key], rtol=0, atol=1e-5), f"{part} {key}"
        if part != "value":
            moves = {key: (expected[key].float() - start[key].float()).abs().max().item() for key in expected}
            assert max(moves.values()) > (5e-5 if part == "policy" else 2e-5), part
    policy, average = (load_file(folder / name / f"ppo/{part}/model.safetensors") for part in ("policy", "policy_ema"))
    assert any(not torch.equal(policy[key], average[key]) for key in policy)
