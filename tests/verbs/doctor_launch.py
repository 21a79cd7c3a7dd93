"""Starts the ranks of several launches of `do=doctor`, each with a fault of its own, as processes that talk over gloo.

`python doctor_launch.py FOLDER NAME...`: libraries are imported once, then every rank is forked from here. Rank r of
launch NAME leaves FOLDER/NAME/rank<r>.txt (what it printed) and FOLDER/NAME/rank<r>.code (its exit code).
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from align.chain import check_chain
from align.config.store import compose_run
from align.verbs import doctor, doctor_ranks

RANKS = 2
Fault = Callable[[int], dict]
"""rank -> {overrides, now}: what is different on it. It may change the process, which is the rank's own."""


def none(rank: int) -> dict:
    return {}


def version(rank: int) -> dict:
    """Rank 1 finds another datasketch, whose version is in the range that is asked for."""
    if rank == 1:
        folder = Path("other/datasketch-2.77.0.dist-info")
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: datasketch\nVersion: 2.77.0\n")
        sys.path.insert(0, str(folder.parent.absolute()))
    return {}


def config(rank: int) -> dict:
    return {"overrides": ["stages.sft.learning_rate=0.123"] if rank == 1 else []}


def data(rank: int) -> dict:
    """Both ranks name the same path; what is there differs, as on two machines."""
    folder = Path(f"machine{rank}")
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * (1 + rank))
    os.chdir(folder)
    return {"overrides": ["data.demonstrations=rows.jsonl", f"run_dir={Path.cwd().parent}/runs"]}


def folder(rank: int) -> dict:
    """The run folder is one of each rank's machine."""
    place = Path(f"machine{rank}")
    place.mkdir()
    os.chdir(place)
    return {}


def clock(rank: int) -> dict:
    return {"now": lambda: time.time() + 300 * rank}


def absent(rank: int) -> dict:
    if rank == 1:
        os._exit(0)
    return {"overrides": ["deepspeed.timeout_seconds=2"]}


def without_rank_0(rank: int) -> dict:
    if rank == 0:
        os._exit(0)
    return {"overrides": ["deepspeed.timeout_seconds=2"]}


def silent(rank: int) -> dict:
    """Rank 1 reports, then stops in the sum."""
    doctor_ranks.STEP_SECONDS = 3.0
    if rank == 1:
        doctor_ranks.all_reduce = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    return {"overrides": ["deepspeed.timeout_seconds=2"]}


FAULTS: dict[str, Fault] = {
    fault.__name__: fault for fault in (none, version, config, data, folder, clock, absent, without_rank_0, silent)
}


def run_rank(name: str, rank: int, port: int) -> int:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    settings = FAULTS[name](rank)
    overrides = ["+recipe=sft", "do=doctor", *settings.get("overrides", [])]
    return doctor.run_doctor(compose_run(overrides).config, check_chain, settings.get("now", time.time))


def fork_rank(place: Path, name: str, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        output = os.open(place / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(place)
        code = run_rank(name, rank, port)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(root: Path, name: str) -> None:
    """All ranks of one launch, to their end; a stopped one is killed when the others are done."""
    place, port = root / name, free_port()
    place.mkdir()
    children = [fork_rank(place, name, rank, port) for rank in range(RANKS)]
    for rank, child in enumerate(children):
        if name == "silent" and rank == 1:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        (place / f"rank{rank}.code").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        launch(Path(sys.argv[1]).absolute(), wanted)
