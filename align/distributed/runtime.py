"""Which rank this is, and the few collectives the library needs; every one of them is a no-op on one rank."""

import gc
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from align.config.errors import Stopped
from align.distributed.watch import Watch

_WATCH: Watch | None = None
"""A process is one rank of one launch."""
_KEEP_GROUP = False
"""Set by `one_group`."""


@dataclass(frozen=True)
class Runtime:
    """This process among its peers. `device` is where its model lives."""

    rank: int
    world_size: int
    local_rank: int
    device: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launched_world_size() -> int:
    """Ranks that a launcher (deepspeed, torchrun, srun with the usual variables) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_local_rank() -> int:
    """This process among those of its machine; known before any process group is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_rank() -> int:
    """This process among all that a launcher started."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def watched(timeout_seconds: float) -> Iterator[None]:
    """Inside, the ranks of a launch know of each other: none waits for one that is dead, cut off or has failed.

    Raises: RankLost in place of what a collective says then; at the start if rank 0 cannot be reached in time.
    """
    watch = _meet(timeout_seconds)
    if watch is None:
        yield
        return
    reason = "done"
    try:
        yield
    except Exception as error:
        reason = "failed"
        if (cause := watch.explain(error)) is error:
            raise
        raise cause from error
    except BaseException as error:
        reason = f"{error}" if isinstance(error, Stopped) else "interrupted"
        raise
    finally:
        watch.leave(reason)


def _meet(timeout_seconds: float) -> Watch | None:
    """Make this rank known to the others of the launch, once; None for a rank alone."""
    global _WATCH
    if launched_world_size() > 1 and (_WATCH is None or _WATCH.has_left):
        # A process may run several chains, one after another.
        number = 0 if _WATCH is None else _WATCH.number + 1
        _WATCH = Watch(launched_rank(), launched_world_size(), timeout_seconds, number=number)
    return _WATCH


def start(*, deepspeed: bool, timeout_seconds: int) -> Runtime:
    """Join the process group if there is anything to join: several ranks, or DeepSpeed on one.

    Must come before TrainingArguments: with `use_cpu=True` accelerate never starts DeepSpeed's process group, and
    ZeRO-3 then sees a world of one (transformers 5.23, deepspeed 0.19.8, seen 2026-11).
    Waits for a rank that is busy as long as it takes. Raises: RankLost for one that has not started within
    timeout_seconds, or is gone.
    """
    world_size = launched_world_size()
    local_rank = launched_local_rank()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if (world_size > 1 or deepspeed) and not dist.is_initialized():
        if (watch := _meet(timeout_seconds)) is not None:
            watch.arrive()
            timeout_seconds = watch.patience_seconds
        _join(deepspeed, "nccl" if cuda else "gloo", timedelta(seconds=timeout_seconds))
    elif deepspeed and dist.is_initialized():
        # An earlier chain of this process may have joined without DeepSpeed, which takes the group that is there.
        _join(deepspeed, "nccl" if cuda else "gloo", timedelta(seconds=timeout_seconds))
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Runtime(rank, world_size, local_rank, f"cuda:{local_rank}" if cuda else "cpu")


def _join(deepspeed: bool, backend: str, timeout: timedelta) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    # A shell of ssh has no PATH of the environment, whose ninja compiles what DeepSpeed needs on a CPU.
    own_programs = os.path.dirname(sys.executable)
    if own_programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{own_programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
    # The groups that DeepSpeed makes take torch's default of 30 minutes unless this is set too.
    dist.distributed_c10d.default_pg_timeout = timeout
    if deepspeed:
        from align.distributed.zero import join_process_group

        join_process_group(backend, timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def _free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def one_group() -> Iterator[None]:
    """Inside, all chains of this process share one process group: DeepSpeed keeps handles of its first one for good."""
    global _KEEP_GROUP
    _KEEP_GROUP = True
    try:
        yield
    finally:
        _KEEP_GROUP = False
        stop()


def stop() -> None:
    """Leave the process group; a rank that exits without it may abort after its last line."""
    if dist.is_initialized() and not _KEEP_GROUP:
        dist.destroy_process_group()
    if _WATCH is not None:
        _WATCH.leave()


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def from_main(value: Any) -> Any:
    """What rank 0 holds, on every rank (pickled)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank (pickled)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def free_memory() -> None:
    """Give what nothing holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
