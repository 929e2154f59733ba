"""Interleaved timing: what is compared runs in turns, so that drift hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

#: "wall", or "cpu": what this process spent, for machines that others use at the same time
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


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


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has done everything it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not again inside the block."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def set_aside() -> Iterator[None]:
    """Collections inside the block look past the objects that are alive now. Those of the imported
    libraries alone cost a fifth of a second each time, many times a bench."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def once(
    function: Callable[[], Any],
    number: int = 1,
    clock: str = "wall",
    device: torch.device | None = None,
) -> float:
    """Seconds per call, over ``number`` calls. ``device``: synchronised before the clock is read,
    at the start and at the end (never between the calls)."""
    now = CLOCKS[clock]
    if device is not None:
        synchronise(device)
    start = now()
    for _ in range(number):
        function()
    if device is not None:
        synchronise(device)
    return (now() - start) / number


def turns(names: Sequence[str], number: int) -> list[str]:
    """Order of a round: as given in even rounds, reversed in odd ones."""
    return list(names) if number % 2 == 0 else list(reversed(names))


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    cap: float,
    least: int = 5,
    clock: str = "wall",
    device: torch.device | None = None,
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
        device: synchronised at both ends of an entry; None: nothing to wait for.
    """
    names = list(functions)
    numbers = {}
    for name in names:
        functions[name]()
        numbers[name] = max(
            1, min(500, round(0.002 / max(once(functions[name], device=device), 1e-7)))
        )
    times: dict[str, list[float]] = {name: [] for name in names}
    with no_garbage_collection():
        start = time.perf_counter()
        for number in range(repeats):
            if number >= least and time.perf_counter() - start > cap:
                break
            for name in turns(names, number):
                times[name].append(once(functions[name], numbers[name], clock, device))
    return times


def milliseconds(seconds: float) -> str:
    """Three significant digits, never in powers of ten."""
    value = 1000 * seconds
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
