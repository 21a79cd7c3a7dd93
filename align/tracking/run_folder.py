"""A run folder as it lies there: its complete stages in the order in which one takes from another. For reports."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from align import artifacts
from align.artifacts import Manifest
from align.config.errors import UserError
from align.tracking.local import read_metrics

MODEL_FOLDERS = ("policy", "model", "reward_model", "value", "policy_ema")
"""Outputs of stages that are models, the most wanted first."""


@dataclass(frozen=True)
class StageFolder:
    """A complete stage: what it was and what it left."""

    name: str
    folder: Path
    manifest: Manifest
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, oldest first."""
    samples: list[dict[str, Any]]
    scores: dict[str, Any]
    config: dict[str, Any]
    """Of the whole run that this stage was part of, resolved."""
    command: str | None
    """The command line of the launch that completed it, if it was written down."""
    pages: list[str]
    """HTML pages among its outputs."""

    def models(self) -> list[str]:
        """Folders of models that it left."""
        tops = {PurePosixPath(output["path"]).parts[0] for output in self.manifest.outputs}
        return [name for name in MODEL_FOLDERS if name in tops]


@dataclass(frozen=True)
class RunFolder:
    """A run: its folder, and its complete stages in order."""

    folder: Path
    stages: list[StageFolder]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.stages[-1].config.get("name") or self.folder.name)

    @property
    def evaluated(self) -> StageFolder | None:
        """The stage that compared models on the same prompts, if there is one."""
        return next((stage for stage in self.stages if stage.name == "evaluate"), None)

    @property
    def classified(self) -> StageFolder | None:
        """The stage that put label words to held-out texts, if there is one."""
        return next((stage for stage in self.stages if stage.name == "classify"), None)

    @property
    def trained(self) -> list[StageFolder]:
        return [stage for stage in self.stages if stage.manifest.steps]


def read_run(folder: Path) -> RunFolder:
    """Raises: UserError if there is no complete stage in it."""
    manifests = sorted(folder.glob(f"*/{artifacts.MANIFEST}")) if folder.is_dir() else []
    if not manifests:
        raise UserError(f"{folder}: no complete stage here (no */{artifacts.MANIFEST}); run the chain first")
    return RunFolder(folder, in_order([_read_stage(path.parent) for path in manifests]))


def _read_stage(folder: Path) -> StageFolder:
    manifest = artifacts.read_manifest(folder)
    assert manifest is not None
    started = artifacts.read_json(folder / artifacts.STARTED) or {}
    scores = artifacts.read_json(folder / "scores.json")
    pages = [output["path"] for output in manifest.outputs if output["path"].endswith(".html")]
    return StageFolder(
        manifest.stage, folder, manifest, read_metrics(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl"),
        scores if isinstance(scores, dict) else {}, _config(folder / "config.yaml"), started.get("command"), pages,
    )  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where there is no such file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [json.loads(line) for line in file if line.strip()]


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def in_order(stages: Sequence[StageFolder]) -> list[StageFolder]:
    """Each stage after those whose outputs it takes in; else in the order in which they were completed."""
    waiting = sorted(stages, key=lambda stage: (stage.folder / artifacts.MANIFEST).stat().st_mtime_ns)
    ordered: list[StageFolder] = []
    while waiting:
        names = {stage.name for stage in waiting}
        ready = [stage for stage in waiting if not (sources_of(stage) - {stage.name}) & names]
        # Folders put together by hand may go round in a circle.
        following = (ready or waiting)[0]
        ordered.append(following)
        waiting.remove(following)
    return ordered


def sources_of(stage: StageFolder) -> set[str]:
    """Names of stages of the same run whose outputs a stage took in."""
    places = (place_in_run(entry["path"], stage.config) for entry in stage.manifest.inputs)
    return {place[0] for place in places if place}


def place_in_run(path: str, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(stage, output) of an input that an earlier stage of the same run wrote, or None: compares paths as they were
    written, so that a run folder may be moved."""
    parts, base = PurePosixPath(path).parts, PurePosixPath(str(config.get("run_dir", ""))).parts
    if not base or parts[: len(base)] != base or len(parts) < len(base) + 2:
        return None
    return parts[len(base)], "/".join(parts[len(base) + 1 :])
