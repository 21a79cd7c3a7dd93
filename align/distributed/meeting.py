"""Where the ranks of a launch meet before any process group: a store of torch at the launcher's address and port."""

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from align.config.errors import RankLost, UserError


def served_by_agent() -> bool:
    """Whether torchrun's first agent serves the store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class MeetingPlace:
    """The launcher's MASTER_ADDR and MASTER_PORT. Torch's own groups meet at the same server, under other names."""

    def __init__(self, who: str, timeout_seconds: float, *, retry_seconds: float, number: int) -> None:
        """who: this rank, for errors. number: of the meetings that this process had before."""
        self.address, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._who, self._timeout, self._retry_seconds = who, timeout_seconds, retry_seconds
        self._names = f"align/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{number}"

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"

    def enter(self, *, serve: bool = False) -> Any:
        """A connection of its own to the store, which one rank serves.

        Raises: RankLost if nothing answers within the timeout; UserError for a port that is taken.
        """
        if not serve:
            self._wait()
        try:
            store = dist.TCPStore(
                self.address, self.port, is_master=serve, timeout=timedelta(seconds=self._timeout),
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except dist.DistNetworkError as error:
            if serve and "EADDRINUSE" in str(error):
                raise UserError(f"port {self} is taken, perhaps by another run; use another --master_port") from error
            raise
        return dist.PrefixStore(self._names, store)

    def probe(self) -> OSError | None:
        """What is wrong with the way there; None if somebody listens."""
        try:
            socket.create_connection((self.address, self.port), timeout=max(1.0, self._retry_seconds)).close()
        except OSError as error:
            return error
        return None

    def _wait(self) -> None:
        deadline = time.monotonic() + self._timeout
        while (problem := self.probe()) is not None:
            if time.monotonic() > deadline:
                raise RankLost(
                    f"{self._who} on {socket.gethostname()} has not reached rank 0 at {self} in {self._timeout:.0f} s "
                    f"({problem}); look whether that node has started, and at the network to it"
                )
            time.sleep(min(0.2, self._retry_seconds))


def is_running(pid: int) -> bool:
    """Whether a process of this machine is there and not a corpse that its parent has not buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def ranks_text(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0, 8-15`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    words = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


def innermost_line(thread: int | None) -> str:
    """The innermost line of this library that a thread is in: `align/trainers/ppo.py:210`."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    home = str(Path(__file__).parents[2])
    while frame is not None:
        file = frame.f_code.co_filename
        own = file.startswith(home) and "/.venv/" not in file
        if own and not file.endswith(("runtime.py", "watch.py", "meeting.py")):
            return f"{os.path.relpath(file, home)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
