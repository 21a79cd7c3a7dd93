"""What stages take in and leave, as wandb artifacts: one a digest, so that the lineage graph joins the stages.

An artifact is named for the digest of what it stands for (`model-0123456789ab`). The stage that wrote a policy and the
stage that starts from it both know its digest, so both name the same artifact. It holds the digest and no more, unless
weights are asked for. An offline run can log artifacts but not use them (wandb 0.31); its inputs are in its config.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from align.artifacts import Manifest, digest_of_output
from align.tracking.progress import say
from align.tracking.run_folder import MODEL_FOLDERS

NAME_DIGITS = 12
ROWS = ("data.", "task", "instructions", "constitution")
"""How the names of inputs begin that are no models."""
DATASETS = ("demonstrations.jsonl", "preferences.jsonl", "unpaired.jsonl", "scores.jsonl")
"""Outputs of stages that another stage may read as rows."""


def kind_of(entry: Mapping[str, str]) -> str:
    """model | dataset | code, of an input of a manifest."""
    if entry["name"].startswith(ROWS):
        return "dataset"
    return "code" if re.fullmatch(r"[\w.]+:\w+", entry["path"]) else "model"


def name_of(kind: str, digest: str) -> str:
    """The name that everyone gives to the artifact of this digest; wandb allows letters, digits, `-`, `_` and `.`."""
    short = digest if digest.startswith("hub:") else digest[:NAME_DIGITS]
    return f"{kind}-" + re.sub(r"[^\w.-]+", "-", short)


def use_inputs(wandb: ModuleType, run: Any, inputs: Iterable[Mapping[str, str]]) -> None:
    """Mark what the run takes in: the artifact that an earlier stage has logged, or one made here. For online runs.

    A server that refuses costs the graph, not the training: it is said once.
    """
    seen: set[str] = set()
    for entry in inputs:
        kind, name = kind_of(entry), name_of(kind_of(entry), entry["digest"])
        if name in seen:
            continue
        seen.add(name)
        try:
            _use(wandb, run, kind, name, entry)
        except (wandb.errors.Error, ValueError, OSError) as error:
            say(f"wandb: WARN inputs are not in the lineage graph: {str(error).splitlines()[0]}")
            return


def _use(wandb: ModuleType, run: Any, kind: str, name: str, entry: Mapping[str, str]) -> None:
    try:
        run.use_artifact(f"{name}:latest", type=kind)
    except (wandb.errors.CommError, ValueError):
        run.use_artifact(_made(wandb, kind, entry["digest"], {"name": entry["name"], "path": entry["path"]}), type=kind)


def log_outputs(wandb: ModuleType, run: Any, manifest: Manifest, stage_dir: Path, *, upload: bool) -> None:
    """Log the models and rows that a stage has left, by digest; with `upload` the weights themselves as well."""
    for folder in MODEL_FOLDERS:
        _log(wandb, run, manifest, "model", folder, stage_dir / folder if upload else None)
    for file in DATASETS:
        _log(wandb, run, manifest, "dataset", file, None)


def log_config(wandb: ModuleType, run: Any, config: Mapping[str, Any], digest: str) -> None:
    """Log the resolved config, which holds no secrets any more, as an artifact of its digest."""
    artifact = wandb.Artifact(name_of("config", digest), type="config", metadata={"digest": digest})
    with artifact.new_file("config.json") as file:
        json.dump(config, file, indent=2, default=str)
    run.log_artifact(artifact)


def _log(wandb: ModuleType, run: Any, manifest: Manifest, kind: str, output: str, folder: Path | None) -> None:
    digest = digest_of_output(manifest.outputs, output)
    if digest is None:
        return
    told = {"stage": manifest.stage, "output": output, "rows": manifest.rows, "figures": manifest.metrics}
    artifact = _made(wandb, kind, digest, told | {"config_digest": manifest.config_digest})
    if folder is not None:
        artifact.add_dir(str(folder))
    run.log_artifact(artifact, aliases=["latest", manifest.stage])


def _made(wandb: ModuleType, kind: str, digest: str, metadata: Mapping[str, Any]) -> Any:
    artifact = wandb.Artifact(name_of(kind, digest), type=kind, metadata={"digest": digest, **metadata})
    # The content decides the version, so it is the same whoever makes it.
    with artifact.new_file("digest.json") as file:
        json.dump({"sha256": digest}, file)
    return artifact
