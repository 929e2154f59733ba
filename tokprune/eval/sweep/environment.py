"""What numbers of a run depend on beside the model: versions, processor, threads."""

from __future__ import annotations

import platform
from typing import Any

from tokprune.bench.environment import cpu_name


def environment(device: Any) -> dict[str, Any]:
    """Versions, device and processor, for run.json and latency.json."""
    import torch
    import transformers

    import tokprune

    name = str(device)
    if getattr(device, "type", "cpu") == "cuda":
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokprune": tokprune.__version__,
        "device": name,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def runtime(device: Any) -> dict[str, str]:
    """The part of it that can change an answer."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(getattr(device, "type", device)),
    }
