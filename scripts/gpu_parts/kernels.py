"""Part (a): Triton kernels against their references, by the tests that go with them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import torch

from gpu_parts.journal import ROOT, Journal, Skipped

TESTS = ROOT / "tests" / "test_kernels.py"


def run_kernels(device: torch.device, seconds: float, journal: Journal) -> None:
    """``tests/test_kernels.py`` in a process of its own; on a CPU in Triton's interpreter."""
    with journal.part("kernels", "kernels") as own:
        if not TESTS.exists():
            raise Skipped("this checkout has no tests/test_kernels.py")
        for name in ("triton", "pytest"):
            if importlib.util.find_spec(name) is None:
                raise Skipped(f"{name} is not installed")
        own["result"] = _tested(device, max(seconds, 20.0))


def _tested(device: torch.device, seconds: float) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if device.type != "cuda":
        environment["TRITON_INTERPRET"] = "1"
    line = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
            str(TESTS)]  # fmt: skip
    try:
        done = subprocess.run(
            line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise Skipped(f"the tests of the kernels took more than {seconds:.0f} s") from None
    last = done.stdout.strip().splitlines()[-8:]
    if done.returncode not in (0, 5):  # 5: all were skipped or deselected
        raise AssertionError(f"exit code {done.returncode}: {' | '.join(last)}")
    return {"passed": done.returncode == 0, "last_lines": last}
