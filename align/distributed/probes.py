"""What ranks ask each other before they train: who is there, whose clock is off, does a sum come through, how fast.

All of it goes through a store of its own at MASTER_ADDR:MASTER_PORT, so a rank that is silent can be named; the process
group is made last, and only for the sum. Every wait has a deadline.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

POLL_SECONDS = 0.05
PINGS = 3
BYTES = {"gloo": 16 * 2**20, "nccl": 256 * 2**20}
"""Size of the sum whose time is taken."""
ROUNDS = 3


class Silent(RuntimeError):
    """A deadline has passed without an answer."""


@dataclass
class Meeting:
    """The store that all ranks of a launch share."""

    store: dist.Store
    rank: int
    world_size: int

    def tell(self, key: str, value: Any) -> None:
        """Leave a JSON value for whoever asks."""
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, seconds: float) -> Any:
        """The value under a key. Raises: Silent if nobody has told it in that time."""
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return json.loads(self.store.get(key))
        # The deadline, or a store that went with rank 0.
        except RuntimeError as error:
            raise Silent(f"nothing heard of {key} for {seconds:.0f} s") from error

    def hear_all(self, key: str, seconds: float, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """rank -> what it told under `<key>/<rank>`, of those that did so in time."""
        waiting = list(range(self.world_size) if ranks is None else ranks)
        deadline = time.monotonic() + seconds
        heard: dict[int, Any] = {}
        while waiting:
            for rank in [rank for rank in waiting if self._is_told(f"{key}/{rank}")]:
                heard[rank] = json.loads(self.store.get(f"{key}/{rank}"))
                waiting.remove(rank)
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS if waiting else 0)
        return heard

    def _is_told(self, key: str) -> bool:
        return self.store.check([key])


def meet(seconds: float) -> Meeting:
    """Join the store of the launch by the launcher's variables; rank 0 opens it, or torchrun's agent has.

    Raises: Silent if nobody answers at MASTER_ADDR:MASTER_PORT in that time.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank > 0:
        _wait_for_port(address, port, seconds)
    try:
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0 and not of_agent,
            timeout=timedelta(seconds=seconds),
            # Else rank 0 waits inside for every rank, and cannot say which did not come.
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        raise Silent(f"{address}:{port} does not answer ({_first_line(error)})") from error
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Meeting(dist.PrefixStore(f"doctor/{attempt}", store), rank, world_size)


def _wait_for_port(address: str, port: int, seconds: float) -> None:
    """Try until somebody listens there: TCPStore would print a page of C++ for each try. Raises: Silent."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=seconds).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or str(error)
                raise Silent(f"{address}:{port} does not answer for {seconds:.0f} s ({reason})") from error
        time.sleep(POLL_SECONDS)


def clock_offsets(meeting: Meeting, seconds: float, now: Callable[[], float] = time.time) -> dict[int, float]:
    """rank -> seconds by which its clock is ahead of rank 0's, to within half a round trip; for rank 0.

    Every other rank calls `answer_clock` meanwhile. A rank that does not answer is left out.
    """
    offsets: dict[int, float] = {}
    for rank in range(1, meeting.world_size):
        best = float("inf")
        for ping in range(PINGS):
            sent = now()
            meeting.tell(f"ping/{rank}/{ping}", sent)
            try:
                theirs = meeting.hear(f"pong/{rank}/{ping}", seconds)
            except Silent:
                break
            received = now()
            # The quickest of the round trips says it best.
            if received - sent < best:
                best, offsets[rank] = received - sent, theirs - (sent + received) / 2
    return offsets


def answer_clock(meeting: Meeting, seconds: float, now: Callable[[], float] = time.time) -> None:
    """The other side of `clock_offsets`. Raises: Silent."""
    for ping in range(PINGS):
        meeting.hear(f"ping/{meeting.rank}/{ping}", seconds)
        meeting.tell(f"pong/{meeting.rank}/{ping}", now())


def sum_over_ranks(meeting: Meeting, backend: str, device: str, seconds: float) -> dict[str, Any]:
    """Make a process group, sum over it, take the time: {bytes, seconds, bus_bytes_per_second}. On every rank.

    Bus bandwidth is 2 (n - 1) / n x bytes / time, as NVIDIA's nccl-tests define it. Raises: Silent or RuntimeError if
    the group or a sum does not come about in that time, or the sum is wrong.
    """
    ranks, deadline = meeting.world_size, time.monotonic() + seconds
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", meeting.store),
        rank=meeting.rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )
    small = torch.full((1024,), float(meeting.rank + 1), device=device)
    _sum(small, deadline)
    if not bool((small == ranks * (ranks + 1) / 2).all()):
        raise RuntimeError(f"the sum of 1 to {ranks} came out as {small[0].item():g}: the transport corrupts data")
    size = BYTES[backend]
    large = torch.zeros(size // 4, device=device)
    _sum(large, deadline)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        _sum(large, deadline)
        times.append(time.perf_counter() - began)
    best = min(times)
    return {"bytes": size, "seconds": best, "bus_bytes_per_second": 2 * (ranks - 1) / ranks * size / best}


def _sum(tensor: torch.Tensor, deadline: float) -> None:
    """All-reduce in place. NCCL's own wait blocks for good, so it is asked again and again."""
    work = dist.all_reduce(tensor, async_op=True)
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise Silent("the sum over all ranks did not come through")
        time.sleep(0.0002)
    work.wait()
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class Watched:
    """A call in a thread of its own, so that whoever waits for it may stop waiting.

    A call that hangs is left behind: the process has to end with os._exit to get rid of it.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._value, self._error = call, None, None
        self._done = threading.Event()
        self.began_at = time.monotonic()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        self._done.set()

    @property
    def is_over(self) -> bool:
        return self._done.is_set()

    def result(self, seconds: float) -> Any:
        """What the call returned or raised. Raises: Silent if it is not over that long after it began."""
        if not self._done.wait(max(0.0, self.began_at + seconds - time.monotonic())):
            raise Silent(f"no answer for {seconds:.0f} s")
        if self._error is not None:
            raise self._error
        return self._value


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
