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
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    passed_over = []
    for checkpoint in found:
        content = _sealed_content(checkpoint)
        if content is not None:
            return checkpoint, content["identity"], passed_over
        passed_over.append(f"{checkpoint}: half-written or damaged, passed over")
    return None, {}, passed_over


def _sealed_content(checkpoint: Path) -> dict | None:
    try:
        content = read_json(checkpoint / SEAL)
    except (ValueError, OSError):
        return None
    if content is None:
        return None
    for name, size in content["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return content


def remove_newer(checkpoints: Path, kept: Path | None) -> None:
    """Delete every checkpoint newer than `kept` (all for None), so that nothing stale is mixed into a new save."""
    limit = int(kept.name.split("-")[1]) if kept else -1
    for checkpoint in checkpoints.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > limit:
            shutil.rmtree(checkpoint)


def checkpoint_step(checkpoint: Path | None) -> int:
    """Optimizer steps done at a checkpoint; 0 for none."""
    if checkpoint is None:
        return 0
    return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
