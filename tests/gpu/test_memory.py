"""The estimate of a run's memory against the most that it really allocated on a GPU. Needs a GPU with 8 GiB or more.

A model of some 100 M parameters is made here, so nothing is downloaded. Not counted in the estimate are the libraries'
own workspaces, which `torch.cuda.max_memory_allocated` has in part: they are small beside 1 GiB of tensors.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.config.store import compose_run
from align.distributed.memory import GIB, Sharding
from align.models.load import load_tokenizer
from align.stages.longest import rows_of
from align.stages.needs import Setup, Target, worst
from align.stages.rows import load_template, tokenised
from tests.conftest import REPO

pytestmark = pytest.mark.gpu

# Runs a command line and leaves the peak of this rank in a file.
MEASURED = """\
import json, sys
import torch
from align.cli import main
code = main(sys.argv[2:])
json.dump(torch.cuda.max_memory_allocated(), open(sys.argv[1], "w"))
sys.exit(code)
"""

OPTIONS = {
    "none": Sharding(None, False, 1),
    "zero1": Sharding(1, False, 1),
    "zero2": Sharding(2, False, 1),
    "zero3": Sharding(3, False, 1),
}
STAGES = {
    "sft": ["stages.sft.micro_batch_size=4", "stages.sft.batch_size=8", "stages.sft.max_tokens=1024"],
    "dpo": ["stages.dpo.micro_batch_size=16", "stages.dpo.batch_size=32"],
    "dpo checkpointed": ["stages.dpo.micro_batch_size=32", "stages.dpo.activation_checkpointing=true"],
    "reward": ["stages.reward.micro_batch_size=16", "stages.reward.batch_size=32"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama of about 110 M parameters with the tokenizer of the embedded model."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer("tiny-sft", compose_run(["+recipe=sft"], None).config.model, None)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("case", list(STAGES))
def test_the_estimate_is_within_15_percent_of_the_peak(case, option, model, tmp_path):
    stage = case.split()[0]
    overrides = [
        f"+recipe={stage}", f"run=[{stage}]", f"model.path={model}", "data=tiny", f"deepspeed={option}",
        f"run_dir={tmp_path}/run", f"stages.{stage}.max_steps=16", f"stages.{stage}.save_every=0",
        "data.held_out_fraction=0", "precision=bf16", *STAGES[case],
    ]  # fmt: skip
    if "batch_size=" not in " ".join(STAGES[case]).replace("micro_batch_size=", ""):
        overrides.append(f"stages.{stage}.batch_size=32")
    measured = measure(overrides, tmp_path)
    config = compose_run(overrides, None).config
    settings = getattr(config.stages, stage)
    prepared = tokenised(config, stage, load_template(config, settings.policy), lambda done, total: None)
    setup = Setup(config, stage, rows_of(settings, prepared), Target(1, 80 * GIB, None, cuda=True, bf16=True))
    counted = worst(setup, OPTIONS[option]).peak
    assert counted == pytest.approx(measured, rel=0.15), f"{counted / GIB:.2f} of {measured / GIB:.2f} GiB"


def measure(overrides: list[str], folder: Path) -> int:
    """Peak bytes allocated in a process of its own."""
    out = folder / "peak.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(REPO), "MASTER_PORT": port, "ALIGN_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", MEASURED, str(out), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())
