"""Energy of an answer, from the counter that NVIDIA's driver keeps of a whole GPU.

The counter runs in millijoules since the driver was loaded and is renewed many times a second, so
answers are repeated until they have lasted :data:`LEAST_SECONDS`. It counts the board with all that
runs on it, its idle power too; nothing is taken off. Where there is no such counter there is no
number, and a reason instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from tokprune.bench.clock import synchronise

#: shortest time over which a difference of the counter is believed
LEAST_SECONDS = 1.0
SOURCE = "NVML's total energy counter of the whole GPU"


def energy_per_answer(answer: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Joules that the GPU took for one call of ``answer``, the mean over its repetitions.

    Args:
        answer: makes one answer for the whole batch on ``device``.
        device: where the model is.

    Returns:
        JSON types: ``joules`` per call, ``answers`` and ``seconds`` of the measurement, ``source``;
        or ``joules`` None and ``reason``.
    """
    counter = _counter(device)
    if isinstance(counter, str):
        return {"joules": None, "reason": counter}
    synchronise(device)
    answers, start, before = 0, time.perf_counter(), counter()
    while not answers or time.perf_counter() - start < LEAST_SECONDS:
        answer()
        synchronise(device)
        answers += 1
    seconds, joules = time.perf_counter() - start, (counter() - before) / 1000
    return {
        "joules": joules / answers, "answers": answers, "seconds": seconds, "source": SOURCE,
    }  # fmt: skip


def _counter(device: torch.device) -> Callable[[], int] | str:
    """A function that reads the counter in millijoules, or why there is none."""
    if device.type != "cuda":
        return f"no energy counter is read on {device.type}"
    try:
        import pynvml
    except ImportError:
        return "NVML's Python bindings are not installed: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        # by its own number: what torch calls cuda:0 need not be NVML's first
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return f"NVML has no energy counter of this GPU: {error}"
    return lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
