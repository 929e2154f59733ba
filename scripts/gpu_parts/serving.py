"""Part (d): requests per second in vLLM, with pruning and without, where vLLM is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_parts.journal import ROOT, Journal, Skipped

#: of LLaVA-1.5-7B's shape; those of a rehearsal
OPTIONS = ("--random", "32x4096", "--dtype", "bfloat16", "--rounds", "2")
SMALL = ("--concurrency", "1,2", "--rounds", "1", "--new-tokens", "2")


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def run_serving(seconds: float, journal: Journal, small: bool = False) -> None:
    """``scripts/bench_vllm.py`` in a process of its own, which gets this long."""
    with journal.part("serving", "serving/vllm") as own:
        if not has_vllm():
            raise Skipped("vLLM is not installed")
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "vllm.json"
            words = [sys.executable, str(ROOT / "scripts" / "bench_vllm.py"), "--json", str(found)]
            done = subprocess.run(
                [*words, *(SMALL if small else OPTIONS)], capture_output=True, text=True,
                timeout=seconds,
            )  # fmt: skip
            if not found.exists():
                raise RuntimeError(f"bench_vllm.py: {done.stderr[-1500:]}")
            own["result"] = json.loads(found.read_text())
            if done.returncode:
                raise AssertionError("prompts were not as short as they should be: see the result")
