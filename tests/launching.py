"""Starting ranks: each launch has a port of its own, so that tests may run side by side."""

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def free_port() -> str:
    """One that nobody listens on just now."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def deepspeed(*flags: str, ranks: int = 2) -> list[str]:
    """The launcher, up to what it is to run."""
    return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", free_port(), *flags]


def torchrun(ranks: int = 2) -> list[str]:
    """As `deepspeed`."""
    return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", free_port()]


def run_modes(launcher: list[str], script: Path, folder: Path, modes: dict[str, str]) -> None:
    """`script FOLDER name:settings …` under a launcher, to its end."""
    done = subprocess.run(
        [*launcher, str(script), str(folder), *(f"{name}:{settings}" for name, settings in modes.items())],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


slow = pytest.mark.skipif(not os.environ.get("ALIGN_SLOW_TESTS"), reason="takes long; set ALIGN_SLOW_TESTS=1")
"""Of tests whose claim a quicker one shows in part."""
