"""Makes the shipped models from finished runs: python -m align.world.record STAGE_DIR NAME.

python -m align +recipe=pretrain precision=fp32
python -m align +recipe=sft model.path=runs/pretrain/pretrain/policy precision=fp32
python -m align.world.record runs/pretrain/pretrain base
python -m align.world.record runs/sft/sft sft
python -m align +recipe=sft data.demonstrations=tiny:critiques run_dir=runs/critic precision=fp32 \\
  stages.sft.learning_rate=6e-4
python -m align.world.record runs/critic/sft critic
"""

import json
import shutil
import sys
from pathlib import Path

from align.world import generator
from align.world.build import MODELS

SLOT = {"pretrain": "text", "sft": "demonstrations"}
TINY = "tiny:"


def record(stage_dir: Path, name: str) -> None:
    """Store a stage's policy in bf16 as the embedded model `name`, with what its training looked like beside it."""
    import torch
    from transformers import AutoModelForCausalLM

    manifest = json.loads((stage_dir / "manifest.json").read_text())
    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stage_dir / "policy", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(stage_dir / "policy", dtype=torch.bfloat16).save_pretrained(folder)
    lines = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]
    kind = manifest["config"]["data"][SLOT[manifest["stage"]]].removeprefix(TINY)
    training = {
        f"{kind}_digest": generator.digest(generator.rows(kind)),
        "held_out_loss": manifest["metrics"]["after/loss"],
        "settings": manifest["config"]["stages"][manifest["stage"]],
        "packages": manifest["packages"],
        "losses": [round(line["loss"], 5) for line in lines if "loss" in line],
    }
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    # safetensors writes files that only their owner can read.
    (folder / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2])
