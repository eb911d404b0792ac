"""How much memory a block of work takes at most."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import torch


class PeakMemory:
    """The peak memory of a block in MiB: of a CUDA device, else of the process's resident set.

    ``mib`` is there after the block. The kernel's own peak is set back at its start where it lets us (Linux);
    elsewhere the peak is that of the process so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.mib = 0.0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *error: object) -> None:
        self.mib = self._peak() / 2**20

    def _peak(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        status = Path("/proc/self/status")
        if status.is_file():
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            if found:
                return int(found.group(1)) * 1024
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
