"""Peak memory of a piece of work, above what was held when it began (weights and inputs).

On CUDA this is exact: the allocator's own high-water mark. On a CPU it is the growth of the
process's resident memory, as the kernel counts it: tensors, scratch space of libraries, and the
allocator's rounding. Memory that earlier work left in the allocator's free lists is handed back
first, where the C library can do that (glibc), or it would hide the growth.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokprune.bench.clock import synchronise

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_SAMPLE_SECONDS = 0.002


@dataclass(frozen=True)
class Peak:
    """``bytes`` above the start; ``source``: where the number comes from."""

    bytes: int
    source: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def peak_memory(function: Callable[[], Any], device: torch.device) -> Peak:
    """Run ``function`` and say how much memory it took at most.

    Once on CUDA, where the number is exact; else three times, for the median: how an allocator
    rounds and reuses differs from run to run.
    """
    runs = 1 if device.type == "cuda" else 3
    peaks = sorted((_peak(function, device) for _ in range(runs)), key=lambda peak: peak.bytes)
    return peaks[runs // 2]


def _peak(function: Callable[[], Any], device: torch.device) -> Peak:
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronise(device)
        return Peak(
            torch.cuda.max_memory_allocated(device) - before, "CUDA allocator's high-water mark"
        )
    _trim()
    before = _resident()
    if _reset_mark():
        function()
        synchronise(device)
        return Peak(max(0, _field("VmHWM:") - before), "resident memory, kernel's high-water mark")
    with _Sampler() as sampler:
        function()
        synchronise(device)
    return Peak(
        max(0, sampler.highest - before),
        f"resident memory, sampled every {1000 * _SAMPLE_SECONDS:.0f} ms",
    )


def _trim() -> None:
    """Hand free heap memory back to the system (glibc; elsewhere nothing)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _reset_mark() -> bool:
    """Set Linux's high-water mark of resident memory back to the present."""
    try:
        _CLEAR.write_text("5")
        return _field("VmHWM:") > 0
    except (OSError, ValueError):
        return False


def _field(name: str) -> int:
    """Bytes of a line of ``/proc/self/status`` (given there in kB)."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise ValueError(f"{_STATUS} has no {name}")


class _Sampler:
    """Highest resident memory seen by a thread that looks again and again."""

    def __enter__(self) -> _Sampler:
        self.highest = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.highest = max(self.highest, _resident())

    def _look(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.highest = max(self.highest, _resident())
