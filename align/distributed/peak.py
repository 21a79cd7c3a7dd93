"""The most memory that this process took since a moment: of its GPU as torch counts it, and of the machine.

https://man7.org/linux/man-pages/man5/proc_pid_status.5.html (VmRSS, VmHWM), proc_pid_clear_refs.5 (5 resets VmHWM).
"""

import contextlib
import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Counts from when it was made. Bytes; where the system does not tell, 0."""

    device: str
    before: float
    """Main memory that the process had then: Python, libraries and what earlier stages left."""

    @classmethod
    def begin(cls, device: str) -> "Peak":
        """Start counting anew; of other counters of this process too."""
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        _give_back()
        try:
            RESET.write_text("5")
        except OSError:  # then the peak is that of the whole process
            pass
        return cls(device, _status("VmRSS"))

    def taken(self) -> dict[str, float]:
        """`peak_bytes` that tensors took of the device (on a CPU: what main memory grew by), `host_bytes` of
        the process, at most."""
        host = _status("VmHWM")
        if self.device.startswith("cuda"):
            return {"peak_bytes": float(torch.cuda.max_memory_allocated(self.device)), "host_bytes": host}
        return {"peak_bytes": max(host - self.before, 0.0), "host_bytes": host}


def _give_back() -> None:
    """Have the C library return what was freed, so that memory which is taken again counts; elsewhere than glibc no."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(name: str) -> float:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0.0)
