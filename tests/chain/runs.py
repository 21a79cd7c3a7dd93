"""Starts `python -m align` as a user would, in a process that can be killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from align.artifacts import read_manifest
from align.tracking.local import read_metrics

REPO = Path(__file__).resolve().parents[2]


def environment(folder: Path, threads: int = 1) -> dict[str, str]:
    """The caller's environment with a cache of the test's own and one thread, so that sums never change order."""
    return {
        **os.environ, "ALIGN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPO),
    }  # fmt: skip


def start(folder: Path, *overrides: str, threads: int = 1) -> subprocess.Popen:
    """`python -m align <overrides>` in `folder`, output kept."""
    return subprocess.Popen(
        [sys.executable, "-m", "align", *overrides],
        cwd=folder,
        env=environment(folder, threads),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, *overrides: str, expect: int = 0, seconds: int = 300, threads: int = 1) -> str:
    """Run to the end; returns what was printed."""
    process = start(folder, *overrides, threads=threads)
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == expect, output
    return output


def kill_when(condition: Callable[[], bool], folder: Path, *overrides: str) -> None:
    """Start, wait until `condition` holds, `kill -9`."""
    process = start(folder, *overrides)
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "the moment to kill it never came"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def logged_step(stage_dir: Path) -> int:
    """The newest step in a stage's metrics.jsonl; -1 before the first."""
    lines = read_metrics(stage_dir / "metrics.jsonl")
    return max((line["step"] for line in lines), default=-1)


def weights(run_dir: Path, stage: str) -> str:
    """sha256 of the stage's weights, as its manifest gives it."""
    manifest = read_manifest(run_dir / stage)
    assert manifest is not None, f"{stage} has no manifest"
    return next(o["sha256"] for o in manifest.outputs if o["path"] == "policy/model.safetensors")
