"""Run folders written by hand, with known figures: an SFT and a DPO stage and an evaluation of both."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from align.artifacts import Manifest, digest_of_output, digest_value

BASE, ROWS, PAIRS = "b" * 64, "d" * 64, "e" * 64
RUN_DIR = "runs/hand"
"""Where the run lay when it was made; its folder may have been moved since."""

SFT = {"before/loss": 2.0, "after/loss": 0.5}
DPO = {"before/loss": 0.693, "after/loss": 0.25, "before/rewards/accuracies": 0.5, "after/rewards/accuracies": 0.9}
ORACLE = {
    "oracle/base/helpful_accuracy": 0.25,
    "oracle/base/unsafe_complied": 0.75,
    "oracle/dpo/helpful_accuracy": 0.875,
    "oracle/dpo/unsafe_complied": 0.125,
}


def outputs(stage: str, *paths: str) -> list[dict[str, Any]]:
    """Signed files, their digests made of the stage's name and theirs."""
    return [{"path": p, "sha256": hashlib.sha256(f"{stage}/{p}".encode()).hexdigest(), "bytes": 1} for p in paths]


def policy_digest(stage: str) -> str:
    """Digest of the policy of a stage, as the next stage names it."""
    return digest_of_output(outputs(stage, "policy/model.safetensors", "policy/README.md"), "policy") or ""


def entry(name: str, path: str, digest: str) -> dict[str, str]:
    """An input of a manifest."""
    return {"name": name, "path": path, "digest": digest}


def write_stage(folder: Path, stage: str, inputs: list[dict[str, str]], **given: Any) -> None:
    """A complete stage. given: fields of the manifest, and `lines`, `samples`, `scores`, `settings`, `command`."""
    extra = {name: given.pop(name, None) for name in ("lines", "samples", "scores", "settings", "command")}
    settings = extra["settings"] or {"seed": 7}
    record = {"stages": {stage: settings}}
    given = {"packages": {"torch": "2.13.0"}, "config_digest": digest_value(record), **given}
    manifest = Manifest(stage=stage, config=record, inputs=inputs, **given)
    folder.mkdir(parents=True)
    config = {"name": "hand", "run": ["sft", "dpo", "evaluate"], "run_dir": RUN_DIR, "stages": {stage: settings}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "started.json").write_text(json.dumps({"config": record, "command": extra["command"]}))
    for file in ("metrics", "samples"):
        kept = extra["lines" if file == "metrics" else file]
        if kept:
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    if extra["scores"]:
        (folder / "scores.json").write_text(json.dumps(extra["scores"]))
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))


def losses(steps: int, start: float) -> list[dict[str, Any]]:
    """Logged steps whose loss falls to nothing, judged before and after."""
    lines = [{"step": n, "loss": start * (1 - n / steps), "tokens_per_second": 100.0 * n} for n in range(1, steps + 1)]
    return [{"step": 0, "eval_loss": start}, *lines, {"step": steps, "eval_loss": start / 4}]


def write_sft(run: Path, **given: Any) -> None:
    inputs = [entry("policy", "tiny-base", BASE), entry("data.demonstrations", "rows.jsonl", ROWS)]
    rows = {"read": 1200, "kept": 1000, "held_out": 50, "dropped": {"too_long": 149, "empty": 1}}
    told = {
        "steps": 10,
        "metrics": SFT,
        "memory": {"planned_bytes": 1.5 * 2**30, "peak_bytes": 2.0**30, "host_bytes": 2.0 * 2**30},
        "rows": rows,
        "lines": losses(10, 2.0),
        "command": "python -m align +recipe=hand",
    }
    made = outputs("sft", "policy/model.safetensors", "policy/README.md")
    write_stage(run / "sft", "sft", inputs, **{"outputs": made, **told, **given})


def write_dpo(run: Path, **given: Any) -> None:
    inputs = [
        entry("policy", f"{RUN_DIR}/sft/policy", policy_digest("sft")),
        entry("data.preferences", "pairs.jsonl", PAIRS),
    ]
    rows = {"read": 500, "kept": 500, "held_out": 20, "dropped": {}}
    told = {
        "steps": 20,
        "metrics": DPO,
        "rows": rows,
        "lines": losses(20, 0.7),
        "command": "python -m align +recipe=hand",
    }
    settings = {"seed": 7, "beta": 0.1, "policy": f"{RUN_DIR}/sft/policy"}
    made = outputs("dpo", "policy/model.safetensors", "policy/README.md")
    write_stage(run / "dpo", "dpo", inputs, **{"outputs": made, "settings": settings, **told, **given})


def write_evaluate(run: Path, **given: Any) -> None:
    models = ("sft", "dpo")
    inputs = [entry(name, f"{RUN_DIR}/{name}/policy", policy_digest(name)) for name in models]
    samples = [
        {"prompt": [{"role": "user", "content": "Who?"}], "replies": {"base": "Same.", "dpo": "Same."}},
        {
            "prompt": [{"role": "user", "content": "Where?"}],
            "replies": {"base": "Nowhere.", "dpo": "<b>Here</b> & now."},
        },
    ]
    told = {
        "metrics": ORACLE,
        "rows": {"read": 2, "kept": 2, "dropped": {}},
        "samples": samples,
        "scores": {"prompts": 2},
    }
    write_stage(run / "evaluate", "evaluate", inputs, **{**told, **given})


def hand_run(run: Path, **evaluated: Any) -> Path:
    """The whole chain."""
    write_sft(run)
    write_dpo(run)
    write_evaluate(run, **evaluated)
    return run
