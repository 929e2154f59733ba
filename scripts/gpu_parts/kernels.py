"""Part (a): Triton kernels against their references, by the tests that go with them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

from gpu_parts.journal import ROOT, Journal, Skipped

TESTS = ROOT / "tests" / "test_kernels.py"


def run_kernels(seconds: float, journal: Journal) -> None:
    """The tests in ``tests/test_kernels.py`` that want a GPU, in a process of their own (without
    one all are skipped; the others run in the suite)."""
    with journal.part("kernels", "kernels") as own:
        if not TESTS.exists():
            raise Skipped("this checkout has no tests/test_kernels.py")
        for name in ("triton", "pytest"):
            if importlib.util.find_spec(name) is None:
                raise Skipped(f"{name} is not installed")
        own["result"] = _tested(max(seconds, 20.0))


def _tested(seconds: float) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
            "-m", "gpu", str(TESTS)]  # fmt: skip
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
