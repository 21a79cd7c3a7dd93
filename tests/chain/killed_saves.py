"""Kills a run in the middle of saves, again and again, then lets it end. Prints what was there and what was taken up.

Call: killed_saves.py FOLDER KILLS RANKS OVERRIDE...   with save_every=1. A start is a fork, which spares the imports.
"""

import json
import os
import random
import re
import signal
import socket
import sys
import time
from pathlib import Path

import align.chain  # noqa: F401 - what every start would import
from align.cli import main

LONGEST_SECONDS = 120
SAVE_SECONDS = 0.25


def start(folder: Path, name: str, ranks: int, overrides: list[str]) -> list[int]:
    """Fork the ranks of a run; returns their process ids."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            log = os.open(folder / f"{name}-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
            code = 1
            try:
                code = main(overrides)
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def sealed(checkpoints: Path) -> int:
    """The newest step that is sealed."""
    steps = [int(seal.parent.name.split("-")[1]) for seal in checkpoints.glob("checkpoint-*/sealed.json")]
    return max(steps, default=0)


def run(folder: Path, kills: int, ranks: int, overrides: list[str]) -> list[dict[str, int]]:
    checkpoints = folder / "run/sft/checkpoints"
    command = [*overrides, f"run_dir={folder / 'run'}"]
    draw, seen = random.Random(20), []
    for number in range(kills):
        before = sealed(checkpoints)
        pids = start(folder, str(number), ranks, command)
        wanted, deadline = checkpoints / f"checkpoint-{before + 2}", time.monotonic() + LONGEST_SECONDS
        while not wanted.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, SAVE_SECONDS))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        found = re.search(r"going on from step (\d+)", (folder / f"{number}-0.log").read_text())
        unsealed = [path for path in checkpoints.glob("checkpoint-*") if not (path / "sealed.json").exists()]
        seen.append({
            "before": before, "taken": int(found.group(1)) if found else 0, "after": sealed(checkpoints),
            "unsealed": len(unsealed),
        })  # fmt: skip
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in start(folder, "last", ranks, command)]
    return [*seen, {"exit_codes": codes}]


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
