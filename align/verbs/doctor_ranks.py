"""What `do=doctor` asks of the ranks of a launch: all there, all alike, clocks together, a sum that comes through."""

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from align.distributed.probes import Meeting, Watched, answer_clock, clock_offsets, sum_over_ranks
from align.verbs.doctor_disk import SKEW_SECONDS
from align.verbs.doctor_lines import FAIL, OK, WARN, Line
from align.verbs.environment import MIB, local_ranks, program

STEP_SECONDS = 15.0
"""For a short answer of a rank that is there."""
SUM_SECONDS = 30.0
SLOW_NCCL = 2e9
"""Bytes a second below which NCCL is slower than a PCIe link."""
MOST_NAMED = 4

Facts = Mapping[int, dict[str, Any]]


def silent_line(missing: list[int], hosts: dict[int, str], seconds: float, ranks: int) -> Line:
    """The ranks that never came, or came and then fell silent, with the machine of each as far as it can be told."""
    names = ", ".join(f"rank {rank} ({hosts.get(rank) or _host_of(rank, hosts)})" for rank in missing)
    found = f"silent for {seconds:.0f} s: {names}; the other {ranks - len(missing)} of {ranks} answer"
    todo = (
        "look at that machine: is the process started and alive, is MASTER_ADDR reachable from there, same port free?"
    )
    return Line("ranks", FAIL, found, todo, {"silent": missing})


def _host_of(rank: int, hosts: dict[int, str]) -> str:
    """Where a rank that never spoke should be: with its neighbours, or as Slurm lists its nodes."""
    each = local_ranks()
    neighbours = [hosts[other] for other in hosts if other // each == rank // each]
    if neighbours:
        return neighbours[0]
    if "SLURM_JOB_NODELIST" in os.environ:
        nodes = (program("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]) or "").split()
        if rank // each < len(nodes):
            return nodes[rank // each]
    return f"machine {rank // each} of the launch, of which nothing was heard"


def same_packages(facts: Facts, hosts: dict[int, str]) -> Line:
    """Whether every rank has the packages of rank 0."""
    differing = _differing({rank: fact["versions"] for rank, fact in facts.items()})
    if not differing:
        return Line("same packages", OK, f"the same versions and code on {len(facts)} ranks")
    found = _named(differing, hosts, lambda key, other, own: f"{key} {other}, rank 0 has {own}")
    return Line("same packages", FAIL, found, "install the same versions on every machine, or share one environment")


def same_config(facts: Facts, hosts: dict[int, str]) -> Line:
    """Whether every rank was started with the same settings."""
    if len({fact["config_digest"] for fact in facts.values()}) == 1:
        return Line("same config", OK, f"digest {facts[0]['config_digest'][:12]} on {len(facts)} ranks")
    differing = _differing({rank: fact["config"] for rank, fact in facts.items()})
    found = _named(differing, hosts, lambda key, other, own: f"{key} is {_shown(other)}, on rank 0 {_shown(own)}")
    return Line("same config", FAIL, found, "start every machine with the same command line, folders and recipe files")


def _shown(setting: list[str] | None) -> str:
    return "not set" if setting is None else setting[1]


def same_data(facts: Facts, hosts: dict[int, str]) -> Line:
    """Whether every rank reads the same rows and models."""
    differing = _differing({rank: {**fact["data"], **fact["models"]} for rank, fact in facts.items()})
    if not differing:
        count = len(facts[0]["data"]) + len(facts[0]["models"])
        return Line("same data", OK, f"{count} data sources and models are the same on {len(facts)} ranks")
    found = _named(differing, hosts, lambda key, other, own: f"{key} {'is missing' if other is None else 'differs'}")
    return Line("same data", FAIL, found, "copy the files to every machine again, or read them from a shared folder")


def _differing(values: dict[int, dict[str, Any]]) -> dict[int, list[tuple[str, Any, Any]]]:
    """rank -> (key, its value, rank 0's value) wherever they are not equal."""
    own = values[0]
    found = {
        rank: [(key, theirs.get(key), own.get(key)) for key in {**own, **theirs} if theirs.get(key) != own.get(key)]
        for rank, theirs in values.items()
    }
    return {rank: keys for rank, keys in found.items() if keys}


def _named(differing: dict[int, list], hosts: dict[int, str], words: Callable[[str, Any, Any], str]) -> str:
    parts = []
    for rank, keys in list(differing.items())[:MOST_NAMED]:
        more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
        said = ", ".join(words(*key) for key in keys[:MOST_NAMED])
        parts.append(f"rank {rank} ({hosts[rank]}): {said}{more}")
    return "; ".join(parts) + (f"; and {len(differing) - MOST_NAMED} more ranks" if len(differing) > MOST_NAMED else "")


def clocks(meeting: Meeting, hosts: dict[int, str], now: Callable[[], float]) -> Line:
    """How far the clock of each rank is from rank 0's; for rank 0."""
    offsets = clock_offsets(meeting, STEP_SECONDS, now)
    far = {rank: offset for rank, offset in offsets.items() if abs(offset) > SKEW_SECONDS}
    details = {str(rank): round(offset, 3) for rank, offset in offsets.items()}
    if far:
        found = ", ".join(f"rank {rank} ({hosts[rank]}) is {offset:+.1f} s off" for rank, offset in far.items())
        return Line("clocks", WARN, found, "set the clock of that machine (NTP: timedatectl set-ntp true)", details)
    widest = max((abs(offset) for offset in offsets.values()), default=0.0)
    return Line("clocks", OK, f"within {widest:.2f} s of rank 0's", "", details)


def shared_folder(meeting: Meeting, run_dir: Path, hosts: dict[int, str]) -> Line:
    """Whether every rank sees what rank 0 writes into the run folder; for rank 0."""
    file = run_dir / f".doctor-seen-{os.getpid()}"
    try:
        file.write_text("seen")
    except OSError:
        meeting.tell("seen-file", None)
        return Line("run folder", OK, "nothing can be written there to look for, see the line `checkpoint`")
    meeting.tell("seen-file", file.name)
    seen = meeting.hear_all("seen", STEP_SECONDS, range(1, meeting.world_size))
    file.unlink(missing_ok=True)
    blind = [rank for rank in range(1, meeting.world_size) if not seen.get(rank)]
    if blind:
        names = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in blind)
        todo = "put run_dir on a file system that all machines share; sharded checkpoints are useless apart"
        return Line("run folder", FAIL, f"{names} does not see what rank 0 writes to {run_dir}", todo)
    return Line("run folder", OK, f"{run_dir} is the same folder on {meeting.world_size} ranks")


def look_for_file(meeting: Meeting, run_dir: Path) -> None:
    """The other side of `shared_folder`. A file may take a while to show on a network file system."""
    name = meeting.hear("seen-file", STEP_SECONDS)
    deadline = time.monotonic() + STEP_SECONDS / 2
    while name and not (there := (run_dir / name).is_file()) and time.monotonic() < deadline:
        time.sleep(0.2)
    meeting.tell(f"seen/{meeting.rank}", bool(name) and there)


def all_reduce(meeting: Meeting, seconds: float) -> tuple[dict[str, Any], bool]:
    """This rank's part in a sum over all: what came of it, told to the others, and whether it hangs. On every rank."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device, backend = (f"cuda:{local}", "nccl") if cuda else ("cpu", "gloo")

    def add() -> dict[str, Any]:
        if cuda:
            torch.cuda.set_device(local)
        return sum_over_ranks(meeting, backend, device, seconds)

    watched = Watched(add)
    try:
        outcome = watched.result(seconds + 1) | {"backend": backend}
    # Gloo and NCCL raise errors of many kinds, and each of them is the answer.
    except Exception as error:
        outcome = {"error": str(error).strip().split("\n")[0] or type(error).__name__, "backend": backend}
    meeting.tell(f"sum/{meeting.rank}", outcome)
    # A group that has failed may hang when it is taken apart.
    return outcome, "error" in outcome


def all_reduce_line(meeting: Meeting, own: dict[str, Any], hosts: dict[int, str], seconds: float) -> Line:
    """What came of the sum on all ranks, naming those that were silent; for rank 0."""
    answers = {0: own} | meeting.hear_all("sum", STEP_SECONDS)
    silent = [rank for rank in range(meeting.world_size) if rank not in answers]
    failed = {rank: answer["error"] for rank, answer in answers.items() if "error" in answer}
    if silent:
        names = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in silent)
        todo = "look at that process: stopped, swapping, or on a network interface that the others do not reach"
        return Line("all-reduce", FAIL, f"silent for {seconds:.0f} s: {names}", todo, {"silent": silent})
    if failed:
        names = "; ".join(f"rank {rank} ({hosts[rank]}): {said}" for rank, said in list(failed.items())[:MOST_NAMED])
        todo = (
            "all ranks answer over the store, so it is the transport: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, firewall"
        )
        return Line("all-reduce", FAIL, names, todo)
    speed = min(answer["bus_bytes_per_second"] for answer in answers.values())
    found = (
        f"{meeting.world_size} ranks over {own['backend']}: {own['bytes'] / MIB:.0f} MiB in {own['seconds']:.3f} s, "
    )
    found += f"bus bandwidth {speed / 1e9:.2f} GB/s"
    details = {"bus_bytes_per_second": speed, "bytes": own["bytes"], "seconds": own["seconds"]}
    if own["backend"] == "nccl" and speed < SLOW_NCCL:
        todo = "NCCL goes over a slow network: see NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME and the line `interconnect`"
        return Line("all-reduce", WARN, found, todo, details)
    return Line("all-reduce", OK, found, "", details)


def answer_rank_0(meeting: Meeting, run_dir: Path, now: Callable[[], float]) -> None:
    """What every other rank does while rank 0 asks about clocks and the run folder. Raises: Silent."""
    answer_clock(meeting, STEP_SECONDS * meeting.world_size, now)
    look_for_file(meeting, run_dir)


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()
