"""One rank of a launch that meets, all-reduces 20 times a second, and comes to harm; prints what became of it.

Call: watched_ranks.py HARM TIMEOUT FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Rank 1 is the one to
whom HARM happens after a few rounds. A file `FOLDER/<rank>` is made with the first round.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from align import cli
from align.config.errors import RankLost, Stopped, UserError
from align.distributed import runtime

ROUNDS = 40


def harm(kind: str) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "asleep":
        time.sleep(3600)
    elif kind == "refused":
        raise UserError("row 7 is empty; mend it")
    elif kind == "told":
        raise Stopped("stopped by SIGTERM")
    else:
        assert kind in ("none", "rank 0 killed", "all refused"), kind


def work(kind: str, timeout: float, folder: Path) -> None:
    rank = runtime.launched_rank()
    with runtime.watched(timeout):
        if kind == "late" and rank == 1:
            # Longer than the timeout, and alive all the while: rows are being tokenised, say.
            time.sleep(1.5 * timeout)
        runtime.start(deepspeed=False, timeout_seconds=timeout)
        for round in range(ROUNDS):
            dist.all_reduce(torch.ones(1))
            (folder / str(rank)).touch()
            time.sleep(0.05)
            if round == 10 and rank == 1 and kind != "late":
                harm(kind)
            if round == 10 and rank == 0 and kind == "rank 0 killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if round == 10 and kind == "all refused":
                time.sleep(2.0 * rank)
                raise UserError("row 7 is empty; mend it")
    runtime.stop()


def main(kind: str, timeout: float, folder: Path) -> int:
    try:
        work(kind, timeout, folder)
    except RankLost as lost:
        print(f"lost: {lost}")
        return lost.exit_code
    except (Stopped, UserError) as end:
        print(f"{type(end).__name__}: {end}")
        return cli.USER_ERROR if isinstance(end, UserError) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])))
