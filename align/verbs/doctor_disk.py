"""What `do=doctor` asks of the run folder: room for all the run writes, and a checkpoint written and read again."""

import os
import shutil
import socket
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from align import artifacts
from align.config.errors import UserError
from align.config.schema import Advantage, PeftMethod, PPOStage, RunConfig, StageConfig, ZeroChoice
from align.distributed.memory import Sharding, checkpoint_bytes, form_of
from align.distributed.runtime import launched_world_size
from align.models.load import use_bf16
from align.models.shape import shape_of
from align.stages.rows import starting_model, trained_stages
from align.verbs.doctor_lines import FAIL, OK, WARN, Line

MIB, GIB = 2**20, 2**30
PROBE_BYTES = 16 * MIB
SPARE = 1.2
"""Free space below need times this is said."""
CACHE_BYTES = 64 * MIB
SLOW_BYTES_PER_SECOND = 20 * MIB
SKEW_SECONDS = 5.0
"""Clocks further apart make time stamps of logs and files misleading."""


def disk(config: RunConfig, run_dir: Path) -> Line:
    """Free space of the run folder against the checkpoints and models that the run will write there."""
    free = shutil.disk_usage(existing(run_dir)).free
    try:
        need = needed_bytes(config, run_dir)
    except UserError:
        return Line("disk", OK, f"{run_dir}: {_size(free)} free; the need is not known without the model's config")
    found = f"{run_dir}: {_size(free)} free, the run needs about {_size(need)}"
    todo = "free some space, use another run_dir, or keep fewer checkpoints (stages.*.keep_checkpoints, save_every)"
    level = FAIL if free < need else WARN if free < SPARE * need else OK
    return Line("disk", level, found, todo, {"free_bytes": free, "needed_bytes": round(need)})


def needed_bytes(config: RunConfig, run_dir: Path) -> float:
    """The most that the run will have on disk at a time, from the models' configs alone (meta device).

    A checkpoint goes when the stage is complete, its models stay. Stages that are complete need nothing more.
    """
    bf16 = use_bf16(config.precision, "cuda" if torch.cuda.is_available() else "cpu")
    adapters = config.peft.method is not PeftMethod.none
    sharding = _sharding(config)
    form = form_of(bf16=bf16, deepspeed=sharding.stage is not None, adapters=adapters)
    kept = peak = 0.0
    for name in trained_stages(config):
        if artifacts.read_manifest(run_dir / name) is not None:
            continue
        stage: StageConfig = getattr(config.stages, name)
        shape = shape_of(starting_model(config, name), config.model, config.peft)
        saved, together = _models(stage)
        one = checkpoint_bytes(shape.trained * together, shape.frozen, sharding, form, adapters=adapters)
        # While one more is written, those that are kept are still there.
        checkpoints = one * (stage.keep_checkpoints + 1) if stage.save_every else 0
        models = saved * (shape.parameters + shape.adapter) * (2 if bf16 else 4)
        peak = max(peak, kept + models + checkpoints)
        kept += models
    return max(peak, kept)


def _models(stage: StageConfig) -> tuple[int, int]:
    """Models that a stage saves at its end, and those that it trains together; a value model counts as a policy."""
    if not isinstance(stage, PPOStage):
        return 1, 1
    together = 2 if stage.advantage is Advantage.gae else 1
    return together + (stage.ema_decay > 0), together


def _sharding(config: RunConfig) -> Sharding:
    """How states are spread, as far as a checkpoint's size depends on it: with ZeRO or without."""
    ranks = launched_world_size()
    zero = config.deepspeed.mode is ZeroChoice.zero or (config.deepspeed.mode is ZeroChoice.auto and ranks > 1)
    return Sharding(config.deepspeed.stage if zero else None, False, ranks)


def cache(config: RunConfig) -> Line:
    """Whether the folder of tokenised rows takes files."""
    folder = Path(config.cache_dir).expanduser()
    file = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"0" * 4096)
        file.unlink()
    except OSError as error:
        return Line(
            "cache", FAIL, f"cache_dir={folder}: {error.strerror}", "set cache_dir or ALIGN_CACHE to another folder"
        )
    free = shutil.disk_usage(folder).free
    level = WARN if free < CACHE_BYTES else OK
    return Line("cache", level, f"cache_dir={folder}: {_size(free)} free", "free some space, or use another cache_dir")


def checkpoint(run_dir: Path) -> Line:
    """Write a small checkpoint into the run folder as a run does, read it again, compare, and remove it."""
    folder = run_dir / f".doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        size = int(min(PROBE_BYTES, shutil.disk_usage(folder).free / 8))
        written, read = _write_and_read(folder, max(size, 4096))
    except OSError as error:
        return Line(
            "checkpoint", FAIL, f"{run_dir}: cannot be written: {error.strerror or error}", "use another run_dir"
        )
    # A full disk is no OSError to torch and safetensors.
    except Exception as error:
        return Line(
            "checkpoint", FAIL, f"{run_dir}: {str(error).splitlines()[0]}", "free some space, or use another run_dir"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = f"written at {written / MIB:,.0f} MiB/s, read at {read / MIB:,.0f} MiB/s, equal"
    if written < SLOW_BYTES_PER_SECOND and size == PROBE_BYTES:
        return Line(
            "checkpoint", WARN, f"{run_dir}: {found}", "a faster disk for run_dir, or a larger stages.*.save_every"
        )
    return Line("checkpoint", OK, found)


def _write_and_read(folder: Path, size: int) -> tuple[float, float]:
    """Half of it as weights, half as optimizer states; returns bytes a second of writing and of reading.

    Raises: RuntimeError if another tensor comes back than was written.
    """
    weights = {"weight": torch.randn(size // 8, generator=torch.Generator().manual_seed(7))}
    states = {"exp_avg": torch.randn(size // 8, generator=torch.Generator().manual_seed(8)), "step": 1}
    began = time.perf_counter()
    save_file(weights, folder / "model.safetensors")
    torch.save(states, folder / "optimizer.pt")
    for path in (folder / "model.safetensors", folder / "optimizer.pt", folder):
        _sync(path)
    wrote = time.perf_counter()
    weights_again = load_file(folder / "model.safetensors")
    states_again = torch.load(folder / "optimizer.pt", weights_only=True)
    done = time.perf_counter()
    same = torch.equal(weights["weight"], weights_again["weight"])
    if not same or not torch.equal(states["exp_avg"], states_again["exp_avg"]):
        raise RuntimeError("what was read is not what was written; do not trust this disk")
    return size / (wrote - began), size / (done - wrote)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_clock(run_dir: Path, now=time.time) -> Line:
    """The clock of the file system of the run folder (another machine's, if it is shared) against this machine's."""
    folder = existing(run_dir)
    file = folder / f".doctor-clock-{socket.gethostname()}-{os.getpid()}"
    before = now()
    try:
        file.write_text("")
        stamp = file.stat().st_mtime
        file.unlink()
    except OSError:
        return Line("clock", OK, "no file can be written to compare clocks with, see the line `checkpoint`")
    # The stamp is of a tick before or within.
    skew = max(before - stamp, stamp - now(), 0.0)
    found = f"{skew:.1f} s from the clock of {folder}" if skew > 0.1 else "the clock of the run folder is this one's"
    if skew > SKEW_SECONDS:
        return Line(
            "clock",
            WARN,
            found,
            "set the clocks of this machine and of the file server (NTP: timedatectl set-ntp true)",
        )
    return Line("clock", OK, found)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _size(number: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1024:.0f} KiB"
