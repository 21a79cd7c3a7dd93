"""A loss that is no number on one of two ranks: all ranks skip the step, under DDP and ZeRO 1 to 3."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from align.tracking.local import read_metrics
from tests.distributed.curves import config
from tests.launching import deepspeed

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
MODES = {
    "ddp": "micro=4",
    "accumulated": "micro=2",
    "zero1": "micro=4,zero=1",
    "zero2": "micro=2,zero=2",
    "zero3": "micro=4,zero=3",
    "zero2_offload": "micro=4,zero=2,offload=cpu",
    "zero1_bf16": "micro=4,zero=1,precision=bf16",
    "zero2_bf16": "micro=4,zero=2,precision=bf16",
    "zero3_bf16": "micro=4,zero=3,precision=bf16",
    "zero3_lora": "micro=4,zero=3,peft=lora",
}
WITHOUT = "zero0"
pytestmark = pytest.mark.skipif(not os.environ.get("ALIGN_SLOW_TESTS"), reason="takes minutes; set ALIGN_SLOW_TESTS=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nonfinite")
    words = [f"{name}:{settings}" for name, settings in {**MODES, WITHOUT: "micro=4,zero=0"}.items()]
    done = subprocess.run(
        [*deepspeed("--no_local_rank"), str(HERE / "nonfinite_ranks.py"), str(folder), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def seen(folder: Path, mode: str) -> dict:
    both = [json.loads((folder / mode / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0] == both[1]
    return both[0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
def test_both_ranks_skip_the_step(folder, mode):
    found = seen(folder, mode)
    weights = found["weights"]
    assert found["error"] == "" and len(weights) == 5 and all(map(math.isfinite, weights))
    assert weights[2] == weights[1], "the step changed the weights"
    assert len({weights[0], weights[1], weights[3], weights[4]}) == 4, "other steps did not"
    lines = [line for line in read_metrics(folder / mode / "dpo/metrics.jsonl") if "eval_loss" not in line]
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 0, 0]
    assert all(math.isfinite(value) for line in lines if "loss" in line for value in line.values())
    [line] = [json.loads(text) for text in (folder / mode / "dpo/nonfinite.jsonl").read_text().splitlines()]
    assert line["step"] == 3 and len(line["rows"]) == config(folder, {}).stages.dpo.batch_size


def test_zero_0_cannot_skip_and_stops_instead(folder):
    found = seen(folder, WITHOUT)
    assert found["error"].startswith("UserError: dpo: step 3: the loss or its gradient is not finite")
    assert "deepspeed.stage=0 cannot skip a step, so nothing is saved from here on" in found["error"]
