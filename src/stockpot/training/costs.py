"""What training costs: peak memory of a stretch of work, and what is held after it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

__all__ = ["PeakMemory", "resident_memory"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def resident_memory() -> int:
    """Bytes of host memory that this process holds now, its libraries included."""
    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Peak memory in bytes from ``start()`` to ``stop()``.

    On a GPU: what PyTorch had allocated there. On a CPU: resident memory of the process, its
    libraries included; where the system cannot reset its mark (not Linux), the peak since the
    process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        """Forget earlier peaks."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _CLEAR_REFS.write_text("5")  # proc(5): resets the resident set's high-water mark
        except OSError:
            pass

    def stop(self) -> int:
        """The peak since ``start()``."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        try:
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
