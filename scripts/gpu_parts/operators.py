"""Part (c): operators at 576 … 16,384 tokens, and how their time grows."""

from __future__ import annotations

import time

import torch
from operator_cases import cases

from gpu_parts.journal import Journal

SIZES = (576, 1296, 2880, 4096, 8192, 16384)
#: of a rehearsal
SMALL = (16, 24, 36)
ROUNDS = 9


def run_operators(
    device: torch.device, seconds: float, journal: Journal, small: bool = False
) -> None:
    """A line for every operator, until the time is over."""
    from tokprune.bench.clock import interleaved
    from tokprune.bench.growth import growth

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    end, known = time.perf_counter() + seconds, cases(device, dtype)
    for number, (name, prepare) in enumerate(known.items()):
        left = end - time.perf_counter()
        if left <= 0:
            journal.skip("operators", f"operators/{name}", "the time was over")
            continue
        with journal.part("operators", f"operators/{name}") as own, torch.inference_mode():
            calls = {n: prepare(n) for n in (SMALL if small else SIZES)}
            times = interleaved(
                {str(n): call for n, call in calls.items()}, 1 if small else ROUNDS,
                left / (len(known) - number), least=1, device=device,
            )  # fmt: skip
            found = growth({n: times[str(n)] for n in calls})
            found["microseconds"] = [1e6 * s for s in found.pop("seconds")]
            own["result"] = {"operator": name, "dtype": str(dtype).removeprefix("torch."), **found}
