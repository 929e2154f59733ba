"""What timings depend on: processor, versions, threads, load when the run started."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def environment(device: Any = None) -> dict[str, Any]:
    """JSON types; with a CUDA ``device`` its name too."""
    import torch
    import transformers

    import tokprune

    place = torch.device("cpu") if device is None else torch.device(device)
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokprune": tokprune.__version__,
    }


def cpu_name() -> str:
    """The processor, as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
