#!/usr/bin/env python3
"""Everything that only a GPU can tell, in one command: speed first, then correctness, then growth.

    python scripts/gpu_check.py [--minutes 9] [--json FILE] [--only bench,checks,operators,vllm]
    python scripts/gpu_check.py --rehearse      # the same code on a CPU with tiny models

``bench``: LLaVA-1.5, LLaVA-NeXT, Qwen2.5-VL and a video of 16,384 tokens on Qwen3-VL, all of 7 to 8
billion random weights, methods against no compression and the ideal, most wanted first.
``checks``: methods against the masked oracle with the attention kernels pinned, in bfloat16 and
float32; no waiting for the device in methods with fixed numbers; Triton kernels against their
references; flash-attn where it is installed.
``operators``: microseconds at 576 to 16,384 tokens, and the exponent of their growth.
``vllm``: requests per second in vLLM with pruning and without, where it is installed.

The JSON (default: gpu.json, in the folder that the variable OUT names) is rewritten after every
part, so a run that is cut short counts as far as it came. A part that fails is written down with
the end of its traceback, and the others go on. Needs PyTorch, transformers, einops, safetensors,
pillow and rich, and no network.

Exit code: 1 if a part failed, 130 after Ctrl-C or a polite kill, else 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "scripts", ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

#: seconds wanted by what comes after the bench, which leaves it that much
CHECKS = {"waits": 15.0, "conformance": 35.0, "kernels": 35.0}
OPERATORS = 25.0
SERVING = 150.0
PARTS = ("bench", "checks", "operators", "vllm")
#: seconds that the last part may run over its share
MARGIN = 20.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="wall-clock time of everything")
    parser.add_argument("--json", type=Path, help="where results go (default: $OUT/gpu.json)")
    parser.add_argument("--only", help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--commit", help="of this checkout, where git does not know it")
    given = parser.parse_args()
    given.only = PARTS if given.only is None else tuple(n.strip() for n in given.only.split(","))
    for name in given.only:
        if name not in PARTS:
            parser.error(f"--only {name!r} should be among {', '.join(PARTS)}")
    if not given.minutes > 0:
        parser.error(f"--minutes {given.minutes:g} should be above 0")
    if given.json is None:
        given.json = Path(os.environ.get("OUT", ".")) / "gpu.json"
    if not given.json.absolute().parent.is_dir():
        parser.error(f"--json {given.json}: no such folder")
    if given.json.is_dir():
        parser.error(f"--json {given.json} is a folder; it should be a file")
    return given


def commit(told: str | None) -> str | None:
    """The commit at work, with "+" where files differ from it; None where nobody knows."""
    if told is not None:
        return told
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True,
                              text=True, check=True).stdout.strip()  # fmt: skip
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT,
                                 capture_output=True, text=True, check=True).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changed.strip())


def packages() -> dict[str, str | None]:
    """Versions of what a check can use, None where it is missing."""
    found: dict[str, str | None] = {}
    for module, name in (("triton", "triton"), ("flash_attn", "flash-attn"), ("pytest", "pytest"),
                         ("pynvml", "nvidia-ml-py"), ("psutil", "psutil")):  # fmt: skip
        try:
            there = importlib.util.find_spec(module) is not None
            found[name] = importlib.metadata.version(name) if there else None
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def main() -> int:
    given = options()
    start = time.perf_counter()
    import torch
    import transformers
    from gpu_parts import bench_part, conformance, kernels, operators, serving, waits
    from gpu_parts.budget import Budget
    from gpu_parts.journal import Journal
    from gpu_parts.models import Models
    from gpu_parts.plan import items
    from methods_table import CORE

    from tokprune.bench.environment import environment
    from tokprune.methods import image_methods

    if not given.rehearse and not torch.cuda.is_available():
        print("gpu_check: no CUDA device; --rehearse runs the same on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if given.rehearse else "cuda")
    # float32 is float32: no shortened products in the checks of that type
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    transformers.logging.set_verbosity_error()
    if given.rehearse:
        torch.set_num_threads(1)
    plan = items(sorted(image_methods())) if "bench" in given.only else []
    rectified = {"divprune, rectified": ("divprune", {**CORE["divprune"][1], "rectify": "size"})}
    cases = {**CORE, **rectified}
    if given.rehearse:
        plan = [item.rehearsed(1 if number else 2, 1) for number, item in enumerate(plan)]
        cases = {**{case: CORE[case] for case in ("divprune", "fastv", "pitome")}, **rectified}
    later = [*CHECKS.values()] if "checks" in given.only else []
    later += [OPERATORS] if "operators" in given.only else []
    if "vllm" in given.only:
        later += [SERVING if serving.has_vllm() else 1.0]
    # a rehearsal shows that everything runs: nothing is left out for want of time
    seconds = 3600.0 if given.rehearse else max(1.0, 60 * given.minutes - MARGIN)
    journal = Journal(
        given.json, commit=commit(given.commit), rehearsal=given.rehearse,
        environment=environment(device), packages=packages(),
        settings={"minutes": given.minutes, "only": list(given.only)},
    )  # fmt: skip
    end = start + seconds
    reserved = min(sum(later), seconds / 3)
    budget = Budget(end - reserved - time.perf_counter(), [item.seconds for item in plan])
    models = Models(device, given.rehearse)
    signal.signal(signal.SIGTERM, _stop)
    try:
        for item in plan:
            bench_part.run_item(item, models, budget.next(), journal)
        models.clear()
        budget = Budget(end - time.perf_counter(), later)
        if "checks" in given.only:
            waits.run_waits(cases, device, budget.next(), journal)
            conformance.run_conformance(cases, device, budget.next(), journal)
            conformance.run_flash_attn(cases, device, journal)
            kernels.run_kernels(budget.next(), journal)
        if "operators" in given.only:
            operators.run_operators(device, budget.next(), journal, small=given.rehearse)
        if "vllm" in given.only:
            serving.run_serving(budget.next(), journal, small=given.rehearse)
        journal.data["status"] = "complete"
    except KeyboardInterrupt:
        journal.data["status"] = "interrupted"
    journal.write()
    _show(journal.data)
    if journal.data["status"] == "interrupted":
        return 130
    return 1 if journal.failed else 0


def _stop(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _show(data: dict[str, Any]) -> None:
    """The short table."""
    from gpu_parts.summary import tables
    from rich.console import Console

    console = Console(width=100)
    for part in tables(data):
        console.print(part)


if __name__ == "__main__":
    sys.exit(main())
