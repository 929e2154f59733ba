"""Interleaved timing: what is compared runs in turns, so that drift hits all alike."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0], len(values))
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))

    @property
    def iqr(self) -> float:
        return self.q3 - self.q1

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


#: "wall", or "cpu": what this process spent, for machines that others use at the same time
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def once(function: Callable[[], Any], number: int = 1, clock: str = "wall") -> float:
    """Seconds per call, over ``number`` calls."""
    now = CLOCKS[clock]
    start = now()
    for _ in range(number):
        function()
    return (now() - start) / number


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    cap: float,
    least: int = 5,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds per call of each function, one entry a round.

    A round times every function once, in alternating order (a, b, then b, a, …); short functions
    run several times per entry (about 2 ms). Two warm-up calls each are thrown away.

    Args:
        functions: what to compare, by name.
        repeats: rounds wanted.
        cap: seconds after which no new round starts, once ``least`` are done.
        least: rounds done in any case.
        clock: a name in ``CLOCKS``.
    """
    names = list(functions)
    numbers = {}
    for name in names:
        functions[name]()
        numbers[name] = max(1, min(500, round(0.002 / max(once(functions[name]), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for number in range(repeats):
            if number >= least and time.perf_counter() - start > cap:
                break
            for name in names if number % 2 == 0 else reversed(names):
                times[name].append(once(functions[name], numbers[name], clock))
    finally:
        if enabled:
            gc.enable()
    return times


def environment() -> dict[str, Any]:
    """What the numbers depend on: processor, versions, threads, load when the run started."""
    import torch
    import transformers

    import tokprune

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokprune": tokprune.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def milliseconds(seconds: float) -> str:
    """Three significant digits, never in powers of ten."""
    value = 1000 * seconds
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
