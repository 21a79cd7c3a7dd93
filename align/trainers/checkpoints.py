"""Checkpoints that can be trusted: sealed once complete, checked before they are taken up again."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from transformers import Trainer, TrainerCallback

from align.artifacts import read_json, write_json
from align.distributed import elastic, runtime

SEAL = "sealed.json"
DIGESTS = "digests-{rank}.json"
"""Written after the seal, by a thread of each rank: xxh3 of the files that fell to it."""
CHUNK_BYTES = 1 << 22


class SealCheckpoint(TrainerCallback):
    """After every save: the names and sizes of all its files, written when every rank has written its own.

    Digests come later, from a thread that reads the files back while training goes on, each rank its share.
    """

    def __init__(self, main: bool, identity: dict) -> None:
        self.main, self.identity = main, identity
        self._hashing: threading.Thread | None = None

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._wait()
        runtime.barrier()
        if self.main:
            seal(checkpoint, self.identity)
        runtime.barrier()
        self._hashing = threading.Thread(target=write_digests, args=(checkpoint, *_place()), daemon=True)
        self._hashing.start()

    def on_step_end(self, args, state, control, **kwargs):
        # The Trainer removes the folder that was written to longest ago, so an older one must be at rest.
        if control.should_save:
            self._wait()

    def on_train_end(self, args, state, control, **kwargs):
        self._wait()

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.join()
            self._hashing = None


class MendElastic(TrainerCallback):
    """After a ZeRO checkpoint of other ranks was loaded: what DeepSpeed got wrong is put right, the copy removed."""

    def __init__(self, trainer: Trainer, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        elastic.mend_optimizer(self.trainer.deepspeed.optimizer.optimizer, self.trainer.optimizer_settings)
        runtime.barrier()
        if self.trainer.accelerator.is_main_process:
            elastic.remove_universal(self.checkpoint)


def seal(checkpoint: Path, identity: dict) -> None:
    """Vouch for a checkpoint as it is now; `identity` is what must be equal to resume from it."""
    for stale in (checkpoint / SEAL, *checkpoint.glob(DIGESTS.format(rank="*"))):
        stale.unlink(missing_ok=True)
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()}
    write_json(checkpoint / SEAL, {"identity": identity, "files": files})


def write_digests(checkpoint: Path, rank: int, world_size: int) -> None:
    """Write the digests of this rank's share of a sealed checkpoint; none if it is removed meanwhile."""
    content = _sealed_content(checkpoint)
    if content is None:
        return
    try:
        digests = {name: digest(checkpoint / name) for name in _share(content["files"], rank, world_size)}
        write_json(checkpoint / DIGESTS.format(rank=rank), digests)
    except OSError:
        # Removed because newer ones are there, or the disk is full: then its sizes vouch for it.
        return


def _share(files: dict[str, int], rank: int, world_size: int) -> list[str]:
    """The files that fall to a rank, large and small ones evenly."""
    return sorted(files, key=lambda name: (-files[name], name))[rank::world_size]


def _place() -> tuple[int, int]:
    """This rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def digest(file: Path) -> str:
    """xxh3 (128 bits) of a file's bytes: it tells of damage, not of malice, and is as fast as memory."""
    found = xxhash.xxh3_128()
    with open(file, "rb", buffering=0) as source:
        while chunk := source.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def newest_sealed(checkpoints: Path) -> tuple[Path | None, dict, list[str]]:
    """The newest checkpoint whose files have the sizes of its seal, its identity, and a line for each newer one that
    was passed over."""
    passed_over = []
    for checkpoint, identity in _newest_first(checkpoints):
        if identity is not None:
            return checkpoint, identity, passed_over
        passed_over.append(f"{checkpoint}: half-written or damaged, passed over")
    return None, {}, passed_over


def newest_good(checkpoints: Path) -> tuple[Path | None, dict, list[str]]:
    """As `newest_sealed`, and every byte is what was written as far as digests are there. A collective."""
    passed_over = []
    for checkpoint, identity in runtime.from_main(_newest_first(checkpoints)):
        problem = "half-written or damaged"
        if identity is not None:
            damaged = sorted(name for share in runtime.gather(damaged_files(checkpoint)) for name in share)
            if not damaged:
                return checkpoint, identity, passed_over
            problem = f"{damaged[0]} is not what was written"
        passed_over.append(f"{checkpoint}: {problem}, passed over")
    return None, {}, passed_over


def damaged_files(checkpoint: Path) -> list[str]:
    """Of this rank's share of a checkpoint: files whose digest is another than when they were written."""
    known: dict[str, str] = {}
    for file in checkpoint.glob(DIGESTS.format(rank="*")):
        content = _json(file)
        known |= content if isinstance(content, dict) else {}
    sizes = {name: (checkpoint / name).stat().st_size for name in known if (checkpoint / name).is_file()}
    rank, world_size = _place()
    return [name for name in _share(sizes, rank, world_size) if digest(checkpoint / name) != known[name]]


def _newest_first(checkpoints: Path) -> list[tuple[Path, dict | None]]:
    """Every checkpoint with its identity; None where the seal is missing or a file has another size."""
    contents = [(path, _sealed_content(path)) for _, path in sorted(_by_step(checkpoints), reverse=True)]
    return [(path, None if content is None else content["identity"]) for path, content in contents]


def _by_step(checkpoints: Path) -> list[tuple[int, Path]]:
    """Every checkpoint with its step; a folder without a number is none."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in checkpoints.glob("checkpoint-*")]
    return [(int(step), path) for step, path in found if step.isdecimal()]


def _sealed_content(checkpoint: Path) -> dict | None:
    content = _json(checkpoint / SEAL)
    if not isinstance(content, dict) or not {"identity", "files"} <= content.keys():
        return None
    for name, size in content["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return content


def _json(file: Path) -> Any:
    """The content of a file of this library's, None where it is missing or damaged."""
    try:
        return read_json(file)
    except (ValueError, OSError):
        return None


def remove_newer(checkpoints: Path, kept: Path | None) -> None:
    """Delete every checkpoint newer than `kept` (all for None), so that nothing stale is mixed into a new save."""
    for step, checkpoint in _by_step(checkpoints):
        if kept is None or step > checkpoint_step(kept):
            shutil.rmtree(checkpoint)


def checkpoint_step(checkpoint: Path | None) -> int:
    """Optimizer steps done at a checkpoint; 0 for none."""
    return 0 if checkpoint is None else _trainer_state(checkpoint)["global_step"]


def owes_evaluation(checkpoint: Path | None, every: int) -> bool:
    """Whether training was to be judged at this checkpoint and stopped before that; or has not begun."""
    if checkpoint is None:
        return True
    state = _trainer_state(checkpoint)
    if not every or state["global_step"] % every:
        return False
    return not any("eval_loss" in line and line["step"] == state["global_step"] for line in state["log_history"])


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text())
