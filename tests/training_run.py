"""Run a training script of ``scripts/`` for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train(script: str, out: Path, *arguments: str) -> str:
    """What it printed, on one thread of the CPU."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "--out", str(out), "--device", "cpu",
         "--threads", "1", *arguments],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
