"""Which options are in force for which command line."""

import json
import shutil

import pytest

from align.config.schema import DPOStage, Offload, PairLoss, PeftMethod, SFTStage, ZeroChoice
from align.config.store import EMBEDDED_CONFIG, compose_run

EMBEDDED_DPO = compose_run(["+recipe=dpo"]).config.stages.dpo


def test_a_value_of_the_command_line_wins_over_recipe_and_options():
    config = compose_run(
        ["+recipe=sft_dpo", "stages.dpo.beta=0.3", "stages.dpo.loss=ipo", "peft=lora", "deepspeed=zero3_offload"]
    ).config
    assert (config.stages.dpo.beta, config.stages.dpo.loss) == (0.3, PairLoss.ipo)
    assert config.peft.method is PeftMethod.lora
    assert (config.deepspeed.mode, config.deepspeed.stage) == (ZeroChoice.zero, 3)
    assert config.deepspeed.offload is Offload.cpu


def test_a_chain_is_wired_by_paths_below_run_dir():
    config = compose_run(["+recipe=sft_dpo", "run_dir=elsewhere/x"]).config
    assert config.stages.sft.policy == "tiny-base"
    assert config.stages.dpo.policy == "elsewhere/x/sft/policy"
    assert config.stages.evaluate.models == {
        "base": "tiny-base",
        "sft": "elsewhere/x/sft/policy",
        "dpo": "elsewhere/x/dpo/policy",
    }


def test_part_of_a_chain_keeps_its_wires_and_leaves_the_other_stages_out():
    config = compose_run(["+recipe=sft_dpo", "run=[dpo]"]).config
    assert config.run == ["dpo"]
    assert config.stages.dpo.policy == "runs/sft_dpo/sft/policy"
    assert config.stages.sft is None and config.stages.evaluate is None


def test_a_stage_can_be_added_to_a_recipe():
    config = compose_run(["+recipe=dpo", "stage=[dpo,evaluate]", "run=[dpo,evaluate]"]).config
    assert config.stages.evaluate.models == {"base": "tiny-sft"}


def test_a_model_of_ones_own_gets_field_standard_settings_and_it_is_said():
    composed = compose_run(["+recipe=sft_dpo", "model.path=/models/qwen"])
    assert composed.config.stages.sft == SFTStage(policy="/models/qwen")
    assert composed.config.stages.dpo == DPOStage(policy="runs/sft_dpo/sft/policy")
    assert "model=own" in composed.notes[0] and "embedded tiny world" in composed.notes[1]


def test_the_embedded_model_gets_settings_of_its_size():
    assert EMBEDDED_DPO.learning_rate > 100 * DPOStage().learning_rate


def test_an_embedded_name_puts_its_option_in_force():
    composed = compose_run(["+recipe=sft_dpo", "model.path=tiny-sft"])
    assert composed.config.stages.dpo.learning_rate == EMBEDDED_DPO.learning_rate
    assert composed.config.model.path == "tiny-sft" and composed.notes == []


@pytest.mark.skipif(not EMBEDDED_CONFIG.is_file(), reason="the embedded model is not built")
def test_a_policy_trained_from_the_embedded_model_keeps_its_settings(tmp_path):
    shutil.copy(EMBEDDED_CONFIG, tmp_path)
    assert compose_run(["+recipe=dpo", f"model.path={tmp_path}"]).config.stages.dpo.learning_rate > 1e-4
    grown = json.loads(EMBEDDED_CONFIG.read_text()) | {"hidden_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(grown))
    assert compose_run(["+recipe=dpo", f"model.path={tmp_path}"]).config.stages.dpo.learning_rate == 1e-6


def test_a_users_recipe_for_a_model_of_ones_own_gets_field_standard_settings_too(tmp_path):
    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("# @package _global_\n# Mine.\ndefaults: [dpo, _self_]\nmodel: {path: /models/qwen}\n")
    config = compose_run(["+recipe=mine"], tmp_path).config
    assert config.stages.dpo.policy == "/models/qwen"
    assert config.stages.dpo.learning_rate == DPOStage().learning_rate


def test_own_data_is_never_mixed_with_embedded_rows_unless_asked_for():
    data = compose_run(["+recipe=sft_dpo", "data.preferences=pairs.jsonl"]).config.data
    assert (data.demonstrations, data.preferences, data.prompts, data.text) == ("pairs.jsonl",) * 3 + (None,)
    data = compose_run(["+recipe=sft_dpo", "data=tiny", "data.preferences=pairs.jsonl"]).config.data
    assert (data.demonstrations, data.preferences) == ("tiny:demonstrations", "pairs.jsonl")


def test_hh_rlhf_feeds_every_stage_from_one_slot():
    data = compose_run(["+recipe=sft_dpo", "data=hh_rlhf", "data.preferences=test.jsonl.gz"]).config.data
    assert (data.demonstrations, data.preferences, data.prompts) == ("test.jsonl.gz",) * 3
    assert compose_run(["+recipe=dpo", "data=hh_rlhf"]).config.data.preferences == "Anthropic/hh-rlhf"


def test_a_slot_can_be_a_list_of_sources():
    config = compose_run(["+recipe=dpo", "data.preferences=[{path: a.jsonl, take: 3}, b.jsonl]"]).config
    assert config.data.preferences == [{"path": "a.jsonl", "take": 3}, "b.jsonl"]


def test_a_model_to_evaluate_is_added_with_or_without_a_plus():
    for plus in ("", "+"):
        models = compose_run(["+recipe=sft_dpo", f"{plus}stages.evaluate.models.mine=/x"]).config.stages.evaluate.models
        assert models["mine"] == "/x" and len(models) == 4


def test_the_cache_folder_is_the_environments(monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", "/somewhere")
    assert compose_run(["+recipe=dpo"]).config.cache_dir == "/somewhere"
    monkeypatch.delenv("ALIGN_CACHE")
    assert compose_run(["+recipe=dpo"]).config.cache_dir == "~/.cache/align"
