"""The commands of the README, under the real launchers."""

import subprocess

import pytest

from align.artifacts import read_manifest
from tests.chain.runs import environment
from tests.launching import deepspeed, slow, torchrun

FEW_STEPS = (
    "stages.sft.max_steps=2", "stages.dpo.max_steps=2", "stages.evaluate.max_prompts=2", "stages.evaluate.kl_prompts=0",
    "stages.evaluate.max_pairs=0", "stages.evaluate.max_texts=0",
)  # fmt: skip
LAUNCHERS = {
    "deepspeed": [*deepspeed("--no_local_rank", "--module"), "align"],
    # Without the flag the launcher passes --local_rank=N, which is dropped at the door.
    "deepspeed with local_rank": [*deepspeed("--module"), "align"],
    "torchrun": [*torchrun(), "-m", "align"],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("launcher", "zero"),
    [("deepspeed", "zero3"), pytest.param("deepspeed with local_rank", "zero2", marks=slow), ("torchrun", "none")],
)
def test_a_chain_runs_on_two_ranks_under(launcher, zero, tmp_path):
    done = subprocess.run(
        [*LAUNCHERS[launcher], "+recipe=sft_dpo", f"deepspeed={zero}", *FEW_STEPS],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("complete in runs/sft_dpo") == 1
    manifest = read_manifest(tmp_path / "runs/sft_dpo/dpo")
    assert manifest.world_size == 2
    assert manifest.zero_stage == (None if zero == "none" else int(zero[-1]))
    assert manifest.steps == 2
