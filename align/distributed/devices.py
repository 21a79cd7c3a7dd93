"""How much memory there is here: of a GPU, and of the machine."""

import os
from pathlib import Path

import torch

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def main_memory() -> float:
    """Bytes of main memory that this process may have: the machine's, or its container's limit if that is less."""
    found = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in CGROUP_LIMITS:
        try:
            limit = file.read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():
            found = min(found, float(limit))
    return found


def host_share() -> float:
    """Main memory of a rank: the ranks of a machine share it evenly."""
    return main_memory() / max(1, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))))


def device_memory(device: str) -> float:
    """Bytes of memory of the device on which a rank's model lives: `cpu`, or `cuda:N`."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.startswith("cuda") else host_share()
