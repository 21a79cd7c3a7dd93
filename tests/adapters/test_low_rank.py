"""LoRA and its relatives: what PEFT is asked for, ranks that AdaLoRA takes, adapters that fit the base as it was."""

import re
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType, get_peft_model

from align.artifacts import read_manifest
from align.config.errors import UserError
from align.config.schema import AdapterStart, ModelConfig, PeftConfig, PeftMethod
from align.models.adapters.configs import adapter_config
from align.models.load import load_model
from align.models.peft import add_adapter
from align.trainers.adapters import ORTHOGONAL_WEIGHT, RankSchedule
from tests.stages.runs import run

IDS = torch.randint(5, 200, (2, 20), generator=torch.Generator().manual_seed(1))


def base():
    return load_model("tiny-base", ModelConfig(), torch.float32, seed=0).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_settings_reach_peft():
    peft = PeftConfig(method=PeftMethod.dora, r=4, rank_stabilised=True, rank_pattern={"q_proj": 7})
    config = adapter_config(base(), peft, TaskType.CAUSAL_LM)
    assert isinstance(config, LoraConfig) and config.use_dora and config.use_rslora
    adapted = add_adapter(base(), peft, seed=0, zero3=False)
    ranks = {name.split(".")[-4]: p.shape[0] for name, p in adapted.named_parameters() if ".lora_A." in name}
    assert ranks["q_proj"] == 7 and ranks["v_proj"] == 4
    layer = adapted.get_base_model().model.layers[0].self_attn.v_proj
    assert layer.scaling["default"] == pytest.approx(32 / 4**0.5)


def test_a_rank_for_a_layer_that_is_not_there_is_refused():
    peft = PeftConfig(method=PeftMethod.lora, rank_pattern={"qproj": 7})
    with pytest.raises(UserError, match=r"^peft.rank_pattern: no layer is called qproj; this model has down_proj, "):
        add_adapter(base(), peft, seed=0, zero3=False)


def test_a_fresh_pissa_computes_what_the_base_does():
    peft = PeftConfig(method=PeftMethod.lora, r=8, init=AdapterStart.pissa)
    adapted = add_adapter(base(), peft, seed=0, zero3=False)
    assert (logits(adapted) - logits(base())).abs().max() < 1e-4
    with adapted.disable_adapter():
        assert (logits(adapted) - logits(base())).abs().max() > 1e-2  # its base is what is left


def test_a_pissa_adapter_is_saved_for_the_base_as_it_was(tmp_path):
    run(tmp_path, "run=[sft]", "peft=lora", "peft.r=4", "peft.init=pissa", "stages.sft.learning_rate=1e-2")
    stage = tmp_path / "run" / "sft"
    alone = PeftModel.from_pretrained(base(), str(stage / "adapter"))
    assert alone.active_peft_config.r == 8 and alone.active_peft_config.init_lora_weights is True
    merged = load_model(str(stage / "policy"), ModelConfig(), torch.float32, seed=0)
    assert (logits(merged) - logits(alone)).abs().max() < 1e-4
    assert (logits(merged) - logits(base())).abs().max() > 1e-2
    assert not (stage / "adapter_start").exists()


@pytest.fixture(scope="module")
def adalora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adalora")
    ranks = ("peft.r=6", "peft.final_r=2", "stages.sft.max_steps=10", "stages.sft.learning_rate=1e-2")
    run(folder, "run=[sft]", "peft=adalora", *ranks)
    return folder / "run" / "sft"


def test_adalora_ends_with_the_ranks_it_was_asked_for_and_says_where_they_are(adalora):
    config = AdaLoraConfig.from_pretrained(str(adalora / "adapter"))
    ranks = [sum(kept) for kept in config.rank_pattern.values()]
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1
    figures = read_manifest(adalora).metrics
    assert figures["adapter/rank"] == 2
    kinds = {name for name in figures if name.startswith("adapter/rank/")}
    assert {name.rsplit("/", 1)[-1] for name in kinds} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_a_merged_adalora_is_its_adapter_on_the_base(adalora):
    alone = PeftModel.from_pretrained(base(), str(adalora / "adapter"))
    merged = load_model(str(adalora / "policy"), ModelConfig(), torch.float32, seed=0)
    assert (logits(merged) - logits(alone)).abs().max() < 1e-4
    assert (logits(merged) - logits(base())).abs().max() > 1e-3


def test_the_orthogonal_penalty_has_the_gradient_of_peft_s_own():
    peft = PeftConfig(method=PeftMethod.adalora, r=4, final_r=2)
    ours, theirs = (get_peft_model(base(), adapter_config(base(), peft, TaskType.CAUSAL_LM)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    theirs.active_peft_config.orth_reg_weight = ORTHOGONAL_WEIGHT
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    RankSchedule(peft).on_pre_optimizer_step(None, None, None, model=ours)
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    compared = [(p.grad, q.grad) for (name, p), q in pairs if re.search(r"lora_[AB]", name)]
    assert compared and all(torch.allclose(p, q, atol=1e-6) for p, q in compared)
