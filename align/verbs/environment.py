"""What `do=doctor` asks of a machine besides its devices: packages, compiler, shared memory, limits, the launch.

A probe returns one `Line`; it may read files and run small programs, each with a time limit, and changes nothing.
"""

import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import align
from align.config.schema import DeepSpeedConfig, ZeroChoice
from align.verbs.doctor_lines import FAIL, OK, WARN, Line

PROGRAM_SECONDS = 10
PYPROJECT = Path(align.__file__).resolve().parent.parent / "pyproject.toml"
GIB, MIB = 2**30, 2**20
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 1 * GIB
"""Enough for NCCL's and DeepSpeed's buffers on a machine with several ranks; Docker gives 64 MiB."""
STALE_LOCK_SECONDS = 600


def program(*words: str) -> str | None:
    """The standard output of a program; None if it is not there, fails or takes too long."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PROGRAM_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def requirements() -> tuple[list[Requirement], str]:
    """What this library needs for training, and the range of Python: of the checkout, else of the installed package."""
    if PYPROJECT.is_file():
        text = PYPROJECT.read_text(encoding="utf-8")
        block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
        python = re.search(r'^requires-python = "(.*?)"', text, re.MULTILINE)
        if block and python:
            lines = re.findall(r'^\s*"(.*?)",', block.group(1), re.MULTILINE)
            return [Requirement(line) for line in lines], python.group(1)
    needed = [Requirement(line) for line in metadata.requires("align-train") or []]
    return needed, str(metadata.metadata("align-train")["Requires-Python"])


def installed() -> dict[str, str]:
    """Version of each package that this library needs, of Python and of itself; `missing` of one that is not there."""
    versions = {"align": align.__version__, "python": platform.python_version()}
    for needed in requirements()[0]:
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            try:
                versions[needed.name] = metadata.version(needed.name)
            except metadata.PackageNotFoundError:
                versions[needed.name] = "missing"
    return versions


def packages(versions: dict[str, str]) -> Line:
    """Whether what is installed is what this library was made for."""
    needed, python = requirements()
    ranges = {one.name: one.specifier for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})}
    ranges["python"] = SpecifierSet(python)
    missing = [f"{name} {ranges[name]}" for name in ranges if versions.get(name, "missing") == "missing"]
    other = {n: v for n, v in versions.items() if n in ranges and v != "missing" and not _allowed(v, ranges[n])}
    older = [name for name, version in other.items() if _is_older(version, ranges[name])]
    said = ", ".join(f"{name} {versions[name]}" for name in ("align", "python", "torch", "transformers", "trl", "peft"))
    said += ", " + ", ".join(f"{name} {versions[name]}" for name in ("deepspeed", "datasets", "wandb"))
    if missing:
        todo = "pip install " + " ".join(f"'{one.replace(' ', '')}'" for one in missing)
        return Line("packages", FAIL, f"not installed: {', '.join(missing)}", todo, versions)
    if other:
        found = ", ".join(f"{name} {version}, made for {ranges[name]}" for name, version in other.items())
        todo = "pip install " + " ".join(f"'{name}{ranges[name]}'" for name in other if name != "python")
        todo = "use another Python" if list(other) == ["python"] else todo
        return Line("packages", FAIL if older else WARN, found, todo, versions)
    return Line("packages", OK, said, "", versions)


def _allowed(version: str, allowed: SpecifierSet) -> bool:
    return allowed.contains(Version(version), prereleases=True)


def _is_older(version: str, allowed: SpecifierSet) -> bool:
    return any(one.operator in (">=", "~=", ">") and not _allowed(version, SpecifierSet(str(one))) for one in allowed)


def compiler(config: DeepSpeedConfig, ranks: int) -> Line:
    """A C++ compiler and ninja: DeepSpeed compiles an operator when ranks talk over gloo (deepspeed 0.19.8)."""
    wanted = config.mode is ZeroChoice.zero or (config.mode is ZeroChoice.auto and ranks > 1)
    compiler_name = os.environ.get("CXX", "c++")
    missing = [name for name in ("ninja", compiler_name) if program(name, "--version") is None]
    if missing:
        needed = wanted and not torch.cuda.is_available()
        why = "this run needs them" if needed else "DeepSpeed on CPUs needs them"
        names = " and ".join(missing)
        todo = f"put {names} on PATH of every machine (apt install g++, pip install ninja), or deepspeed=none"
        return Line("compiler", FAIL if needed else WARN, f"{names} not found; {why}", todo)
    old = time.time() - STALE_LOCK_SECONDS
    locks = [str(lock) for lock in _extensions().glob("*/*/lock") if lock.stat().st_mtime < old]
    if locks:
        return Line(
            "compiler", FAIL, f"{locks[0]} is left of a build that was killed; DeepSpeed waits for it without end",
            f"rm {' '.join(locks)}",
        )  # fmt: skip
    built = sorted(file.parent.name for file in _extensions().glob("*/*/*.so"))
    return Line("compiler", OK, f"ninja and {compiler_name}; built already: {', '.join(built) or 'nothing'}")


def _extensions() -> Path:
    """Where torch keeps compiled operators."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()


def shared_memory(local_ranks: int) -> Line:
    """Room in /dev/shm, through which the ranks of a machine hand each other tensors."""
    if not SHARED_MEMORY.is_dir():
        return Line("shared memory", OK, f"no {SHARED_MEMORY} on this system")
    usage = shutil.disk_usage(SHARED_MEMORY)
    found = f"{SHARED_MEMORY}: {usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free"
    if usage.free < SHARED_MEMORY_BYTES and (local_ranks > 1 or usage.free < 16 * MIB):
        todo = "in a container: --shm-size=8g or --ipc=host; else remove what is left in it"
        return Line("shared memory", WARN, found, todo)
    return Line("shared memory", OK, found)


def limits(ranks: int) -> Line:
    """How much a process may open, write and lock."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    needed = 512 + 16 * ranks
    found = f"{_number(files)} open files, file size {_number(size)}, locked memory {_number(locked)}"
    if files != resource.RLIM_INFINITY and files < needed:
        todo = f"ulimit -n {max(needed, 65536)}"
        return Line("limits", WARN, f"{found}; {ranks} ranks want {needed} open files", todo)
    if size != resource.RLIM_INFINITY:
        return Line("limits", WARN, f"{found}; a larger checkpoint would be cut", "ulimit -f unlimited")
    if locked != resource.RLIM_INFINITY and any(Path("/sys/class/infiniband").glob("*")):
        return Line("limits", WARN, f"{found}; InfiniBand needs to lock memory", "ulimit -l unlimited")
    return Line("limits", OK, found)


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def launch(needed: Sequence[str] = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")) -> Line:
    """Whether the launcher's variables go together."""
    ranks, tasks = os.environ.get("WORLD_SIZE"), int(os.environ.get("SLURM_NTASKS", "1"))
    if ranks is None and tasks > 1 and "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
        return Line(
            "launch", FAIL, f"Slurm started {tasks} tasks, but RANK and WORLD_SIZE are not set: each would train alone",
            "start through the srun wrapper of docs/cluster.md",
        )  # fmt: skip
    missing = [name for name in needed if name not in os.environ]
    if ranks is not None and int(ranks) > 1 and missing:
        return Line("launch", FAIL, f"WORLD_SIZE={ranks}, but {', '.join(missing)} not set", "see docs/cluster.md")
    if ranks is None or int(ranks) == 1:
        return Line("launch", OK, "one process")
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return Line("launch", OK, f"{ranks} ranks, meeting at {address}")


def local_ranks() -> int:
    """Ranks of this machine, as the launcher says (torchrun's name for it, then DeepSpeed's)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
