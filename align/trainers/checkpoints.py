"""Checkpoints that can be trusted: sealed once complete, checked before they are taken up again."""

import json
import shutil
from pathlib import Path

from transformers import TrainerCallback

from align.artifacts import read_json, write_json
from align.distributed import runtime

SEAL = "sealed.json"


class SealCheckpoint(TrainerCallback):
    """After every save: the names and sizes of all its files, written when every rank has written its own."""

    def __init__(self, main: bool, identity: dict) -> None:
        self.main, self.identity = main, identity

    def on_save(self, args, state, control, **kwargs):
        runtime.barrier()
        if self.main:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.identity)
        runtime.barrier()


def seal(checkpoint: Path, identity: dict) -> None:
    """Vouch for a checkpoint as it is now; `identity` is what must be equal to resume from it."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()}
    write_json(checkpoint / SEAL, {"identity": identity, "files": files})


def newest_sealed(checkpoints: Path) -> tuple[Path | None, dict, list[str]]:
    """The newest checkpoint whose seal holds, its identity, and a line for each newer one that was passed over."""
    passed_over = []
    for _, checkpoint in sorted(_by_step(checkpoints), reverse=True):
        content = _sealed_content(checkpoint)
        if content is not None:
            return checkpoint, content["identity"], passed_over
        passed_over.append(f"{checkpoint}: half-written or damaged, passed over")
    return None, {}, passed_over


def _by_step(checkpoints: Path) -> list[tuple[int, Path]]:
    """Every checkpoint with its step; a folder without a number is none."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in checkpoints.glob("checkpoint-*")]
    return [(int(step), path) for step, path in found if step.isdecimal()]


def _sealed_content(checkpoint: Path) -> dict | None:
    try:
        content = read_json(checkpoint / SEAL)
    except (ValueError, OSError):
        return None
    if not isinstance(content, dict) or not {"identity", "files"} <= content.keys():
        return None
    for name, size in content["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return content


def remove_newer(checkpoints: Path, kept: Path | None) -> None:
    """Delete every checkpoint newer than `kept` (all for None), so that nothing stale is mixed into a new save."""
    for step, checkpoint in _by_step(checkpoints):
        if kept is None or step > checkpoint_step(kept):
            shutil.rmtree(checkpoint)


def checkpoint_step(checkpoint: Path | None) -> int:
    """Optimizer steps done at a checkpoint; 0 for none."""
    if checkpoint is None:
        return 0
    return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
