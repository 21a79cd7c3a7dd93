"""peft=lora: only the adapter learns, the reference is the base, and the next stage finds a whole model."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.artifacts import read_manifest
from align.config.errors import UserError
from align.models.load import resolve_model
from align.tracking.local import read_metrics
from tests.stages.runs import run

LORA = ("peft=lora", "peft.r=4")


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    run(folder, *LORA, "stages.sft.learning_rate=1e-2", "stages.dpo.learning_rate=1e-2")
    return folder / "run"


def base_of(chain: Path, stage: str) -> str:
    return {"sft": resolve_model("tiny-base"), "dpo": str(chain / "sft" / "policy")}[stage]


def logits(model) -> torch.Tensor:
    ids = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def load(path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_merged_policy_is_the_base_with_the_adapter(chain, stage):
    base = load(base_of(chain, stage))
    alone = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, str(chain / stage / "adapter")))
    merged = logits(load(chain / stage / "policy"))
    assert (merged - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert (merged - alone).abs().max() > 1e-2


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_only_what_the_adapter_targets_changes(chain, stage):
    base, policy = load(base_of(chain, stage)).state_dict(), load(chain / stage / "policy").state_dict()
    changed = {name for name, weight in base.items() if not torch.equal(weight, policy[name])}
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_adapter_is_kept_beside_the_policy_and_holds_nothing_else(chain, stage):
    folder = chain / stage / "adapter"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert any(weight.abs().max() > 0 for name, weight in tensors.items() if ".lora_B." in name)


def test_the_reference_is_the_base_that_dpo_starts_from(chain):
    first, *_, last = (line for line in read_metrics(chain / "dpo/metrics.jsonl") if "eval_loss" in line)
    assert (first["eval_rewards/chosen"], first["eval_rewards/rejected"]) == pytest.approx((0, 0), abs=1e-6)
    weight = read_manifest(chain / "dpo").config["stages"]["dpo"]["nll_weight"]
    assert first["eval_loss"] - weight * first["eval_nll"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(last["eval_rewards/chosen"]) > 1e-3


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ("[q_proj,nope]", "no layer for an adapter is called nope; this model has down_proj, gate_proj, k_proj"),
        ("[lm_head]", "no layer for an adapter is called lm_head"),
        ("[]", "must be all-linear or a list of down_proj"),
        ("3", "must be all-linear or a list of down_proj"),
    ],
)
def test_target_modules_that_are_not_there_are_one_line(tmp_path, modules, found):
    with pytest.raises(UserError, match=f"^peft.target_modules[^\n]*{found}[^\n]*$"):
        run(tmp_path, "run=[sft]", "peft=lora", f"peft.target_modules={modules}")
    assert not (tmp_path / "run/sft/policy").exists()


def test_one_name_is_a_list_of_one(tmp_path):
    run(tmp_path, *LORA, "run=[sft]", "peft.target_modules=v_proj")
    tensors = load_file(tmp_path / "run/sft/adapter/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == {"v_proj"}


def test_keep_adapter_leaves_the_policy_as_an_adapter_that_peft_loads(tmp_path):
    run(tmp_path, *LORA, "run=[sft]", "peft.keep_adapter=true", "stages.sft.learning_rate=1e-2")
    policy = tmp_path / "run/sft/policy"
    assert (policy / "adapter_config.json").is_file()
    assert not (policy / "model.safetensors").exists()
    base = load(base_of(tmp_path, "sft"))
    alone = logits(base)
    assert (logits(PeftModel.from_pretrained(base, str(policy))) - alone).abs().max() > 1e-2
    with pytest.raises(UserError, match=r"^stages.dpo.policy=[^\n]*: an adapter, not a whole model; [^\n]*$"):
        run(tmp_path, "run=[dpo]")


def test_keep_adapter_is_refused_where_another_stage_starts_from_it(tmp_path):
    with pytest.raises(UserError, match=r"^stages.dpo.policy=[^\n]*: with peft.keep_adapter=true stage sft leaves an"):
        run(tmp_path, *LORA, "peft.keep_adapter=true")
    assert not (tmp_path / "run").exists()
