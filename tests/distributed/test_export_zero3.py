"""An adapter that was trained under ZeRO-3, merged and exported at the end of the same launch."""

import subprocess

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from align.artifacts import read_json, read_manifest
from align.models.load import resolve_model
from tests.chain.runs import environment
from tests.launching import deepspeed, slow


@slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kept", ["true", "false"])
def test_an_adapter_of_a_zero3_run_is_merged_as_peft_does(kept, tmp_path):
    stages = ["stage=[export]", "run=[sft,export]", "stages.sft.max_steps=3", "stages.sft.learning_rate=1e-2"]
    done = subprocess.run(
        [
            *deepspeed("--no_local_rank", "--module"), "align", "+recipe=sft", "deepspeed=zero3", "precision=fp32",
            "peft=lora", f"peft.keep_adapter={kept}", *stages, "stages.export.policy=runs/sft/sft/policy",
            "stages.export.dtype=fp32", "stages.export.max_prompts=3",
        ],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert read_manifest(tmp_path / "runs/sft/sft").zero_stage == 3
    base = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-base"), dtype=torch.float32)
    alone = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, str(tmp_path / "runs/sft/sft/adapter")).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/sft/export/model", dtype="auto").state_dict()
    assert all((found[name] - tensor).abs().max() < 1e-6 for name, tensor in merged.items())
    assert max((found[name] - tensor).abs().max() for name, tensor in alone.items()) > 1e-3
    compared = read_json(tmp_path / "runs/sft/export/verification.json")["compared"]
    assert compared["merged in memory"]["largest"] < 1e-3 and not compared["merged in memory"]["fault"]
