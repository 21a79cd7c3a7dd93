"""A ZeRO checkpoint for another number of ranks: DeepSpeed's universal format, and what its loading gets wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from align.config.errors import UserError

SUFFIX = "_universal"
LATEST = "latest_universal"
LOAD = {"checkpoint": {"load_universal": True}}
"""To be joined to DeepSpeed's dictionary."""
MOST_WORKERS = 8


def make_universal(checkpoint: Path) -> None:
    """Write the checkpoint once more with whole parameters and moments, which any number of ranks can take up.

    It takes as much disk as the optimizer's states. Call it on one rank. Raises: UserError with DeepSpeed's last words.
    """
    remove_universal(checkpoint)
    folder = checkpoint / (checkpoint / "latest").read_text().strip()
    workers = str(max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2)))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder), "--output_folder", f"{folder}{SUFFIX}"]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    # A process of its own: it prints, and it forks, which this one with its threads must not.
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (checkpoint / LATEST).is_file():
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        remove_universal(checkpoint)
        raise UserError(
            f"{checkpoint}: cannot be made fit for another number of ranks ({last[0]}); use as many as before"
        )


def remove_universal(checkpoint: Path) -> None:
    """Take away what `make_universal` wrote, finished or not."""
    (checkpoint / LATEST).unlink(missing_ok=True)
    for folder in checkpoint.glob(f"*{SUFFIX}"):
        shutil.rmtree(folder)


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Settings of each group of parameters, such as weight decay."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def mend_optimizer(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """Put right what deepspeed 0.19.8 gets wrong of a universal checkpoint under ZeRO-3.

    All groups get the settings of the first, and one tensor for their count of steps, which each group then raises:
    Adam corrects its moments as if it were further on. The learning rate is left to the schedule.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update({name: value for name, value in own.items() if name != "lr"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
