"""Base + adapter is two inputs: a base that changed under an adapter is noticed like any other."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align import artifacts
from align.chain import run_chain
from align.config.errors import UserError
from align.config.store import compose_run
from align.models.load import resolve_model
from align.stages.session import input_digests
from align.stages.speakers import local_name
from tests.stages.runs import run

KINDS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(resolve_model("tiny-base"), folder)
    return folder


def changed(base: Path) -> None:
    """Other weights under the same name."""
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def adapter_on(base: Path, kind: str) -> Path:
    """Base + adapter as PEFT leaves it, without a manifest beside it."""
    folder = base.parent / "mine" / kind
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    get_peft_model(model, KINDS[kind]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_that_took_base_and_adapter_is_refused_once_the_base_has_changed(kind, base, tmp_path):
    mine = adapter_on(base, kind)
    words = [
        "+recipe=evaluate", f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache", "precision=fp32",
        f"+stages.evaluate.models.mine={mine}", "stages.evaluate.max_prompts=4", "stages.evaluate.max_new_tokens=4",
        "stages.evaluate.kl_prompts=0", "stages.evaluate.max_pairs=0", "stages.evaluate.max_texts=0",
    ]  # fmt: skip
    (first,) = run_chain(compose_run(words).config)
    paths = {entry["name"]: entry["path"] for entry in first.inputs}
    assert paths["mine"] == str(mine) and paths["mine.base"] == str(base)
    asked = local_name(str(mine))
    (again,) = run_chain(compose_run(words).config)
    assert again == first and local_name(str(mine)) == asked
    changed(base)
    with pytest.raises(UserError, match=rf"was made from other inputs: {base} changed since"):
        run_chain(compose_run(words).config)
    assert local_name(str(mine)) != asked, "answers in the journal are another model's"


def test_an_adapter_that_a_stage_trained_is_taken_by_no_later_stage_on_a_changed_base(base, tmp_path):
    run(tmp_path, "run=[sft]", "peft=lora", "peft.keep_adapter=true", "stages.sft.max_steps=1", f"model.path={base}")
    policy = tmp_path / "run/sft/policy"
    found = input_digests(str(policy), "mine")
    assert [entry["name"] for entry in found] == ["mine", "mine.base"]
    assert found[1]["digest"] == artifacts.digest_model(base)
    changed(base)
    with pytest.raises(UserError, match=rf"its base {base} is not what it was trained on any more"):
        input_digests(str(policy), "mine")


def test_files_of_a_model_are_read_once_by_a_process_and_again_if_written_since(base, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr(artifacts, "digest_file", lambda path: read.append(path) or str(path.read_bytes()[-8:]))
    first = artifacts.digest_model(base)
    files = len(read)
    assert artifacts.digest_model(base) == first and len(read) == files > 1
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert artifacts.digest_model(base) != first and read[files:] == [weights]
