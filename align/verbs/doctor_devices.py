"""What `do=doctor` asks about devices: which there are, whether the driver fits, and how they reach each other."""

import os
import re
import socket
from pathlib import Path

import torch

from align.verbs.doctor_lines import FAIL, OK, WARN, Line
from align.verbs.environment import GIB, program

TAKEN_SHARE = 0.1
"""Share of a GPU's memory that others may hold before it is said."""
DRIVER_FIELDS = "driver_version,ecc.errors.uncorrected.volatile.total"


def devices(local_ranks: int) -> Line:
    """What this machine computes with, against the ranks that it is given."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not gpus:
        if listed := program("nvidia-smi", "-L"):
            return Line(
                "devices", FAIL, f"{len(listed.splitlines())} GPUs, but torch {torch.__version__} cannot use them",
                "see the line `driver`; else install a torch built for CUDA, and look at CUDA_VISIBLE_DEVICES",
            )  # fmt: skip
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Line("devices", OK, f"no GPU; {cores} CPU cores, {memory / GIB:.0f} GiB of memory")
    names = sorted({f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus})
    found = f"{len(gpus)} x {', '.join(names)}"
    if local_ranks > len(gpus):
        return Line("devices", FAIL, f"{local_ranks} ranks here for {found}", "start as many ranks as there are GPUs")
    taken = [i for i in range(len(gpus)) if _taken(i) > TAKEN_SHARE]
    if taken:
        return Line(
            "devices", WARN, f"{found}; others hold memory of GPU {', '.join(map(str, taken))}",
            "look at nvidia-smi; end what runs there, or choose with CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    if len(names) > 1:
        return Line("devices", WARN, found, "the slowest sets the pace, the smallest the memory; use GPUs of one kind")
    return Line("devices", OK, found)


def _taken(index: int) -> float:
    free, total = torch.cuda.mem_get_info(index)
    return 1 - free / total


def driver() -> Line:
    """The NVIDIA driver against the CUDA that torch was built for."""
    listed = program("nvidia-smi", f"--query-gpu={DRIVER_FIELDS}", "--format=csv,noheader")
    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    built = f"torch {torch.__version__} {cuda}"
    if listed is None:
        if torch.version.cuda is None:
            return Line("driver", OK, f"no NVIDIA driver; {built}")
        todo = "on a machine with GPUs: install or restart the driver"
        return Line("driver", WARN, f"no NVIDIA driver answers; {built}", todo)
    rows = [[cell.strip() for cell in row.split(",")] for row in listed.splitlines() if row.strip()]
    found = f"NVIDIA driver {rows[0][0]}; {built}"
    if not torch.cuda.is_available():
        todo = "install a torch built for the CUDA that the first line of nvidia-smi shows, or a newer driver"
        return Line("driver", FAIL, found, todo)
    broken = [str(index) for index, row in enumerate(rows) if row[-1].isdigit() and int(row[-1]) > 0]
    if broken:
        found += f"; uncorrected memory errors on GPU {', '.join(broken)}"
        return Line("driver", FAIL, found, "leave it out with CUDA_VISIBLE_DEVICES, and have it looked at")
    return Line("driver", OK, found)


def interconnect(ranks: int) -> Line:
    """How ranks reach each other: links between the GPUs of this machine and NCCL, or gloo."""
    if not torch.cuda.is_available():
        return _gloo(ranks)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    topology = program("nvidia-smi", "topo", "-m") or ""
    links = gpu_links(topology)
    infiniband = [entry.name for entry in sorted(Path("/sys/class/infiniband").glob("*"))]
    words = ", ".join(f"{link} x {links.count(link)}" for link in sorted(set(links))) or "one GPU"
    found = f"NCCL {nccl}; {words}; " + (f"InfiniBand {', '.join(infiniband)}" if infiniband else "no InfiniBand")
    switched_off = [n for n in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE") if os.environ.get(n) == "1"]
    if switched_off:
        todo = f"unset {' '.join(switched_off)} unless this machine needs it"
        return Line("interconnect", WARN, f"{found}; {', '.join(switched_off)}=1", todo, topology)
    if "SYS" in links:
        todo = "GPUs that meet only across sockets are slow for ZeRO-3; keep a job on GPUs that share a switch"
        return Line("interconnect", WARN, found, todo, topology)
    return Line("interconnect", OK, found, "", topology)


def gpu_links(topology: str) -> list[str]:
    """The link of each pair of GPUs in `nvidia-smi topo -m`: NV18, PIX, PXB, PHB, NODE or SYS (across sockets)."""
    rows = [row.split() for row in topology.splitlines() if re.match(r"GPU\d+\s", row)]
    return [row[1 + other] for index, row in enumerate(rows) for other in range(index)]


def _gloo(ranks: int) -> Line:
    wanted, there = os.environ.get("GLOO_SOCKET_IFNAME"), [name for _, name in socket.if_nameindex()]
    if wanted and any(name not in there for name in wanted.split(",")):
        todo = f"GLOO_SOCKET_IFNAME takes a whole name: {', '.join(there)}"
        return Line("interconnect", FAIL, f"gloo, GLOO_SOCKET_IFNAME={wanted} is no interface of this machine", todo)
    return Line("interconnect", OK, f"gloo{f' over {wanted}' if wanted else ''}" + (", one rank" if ranks == 1 else ""))
