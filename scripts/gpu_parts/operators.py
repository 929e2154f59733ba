"""Part (c): operators at 576 … 16,384 tokens, and how their time grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_parts.journal import Journal

SIZES = (576, 1296, 2880, 4096, 8192, 16384)
#: of a rehearsal
SMALL = (16, 24, 36)
WIDTH, HEADS, HEAD, TEXT = 1024, 32, 128, 32
#: an operator keeps one token in so many
SHARE = 9
ROUNDS = 9


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[int], Any]]:
    """What is timed: a function of n that prepares inputs and returns the call to time."""
    from tokprune import operators as ops

    def features(n: int, width: int = WIDTH) -> Tensor:
        generator = torch.Generator().manual_seed(n)
        return torch.randn(n, width, generator=generator).to(device, dtype)

    def chosen(name: str) -> Callable[[int], Any]:
        def prepare(n: int) -> Callable[[], Any]:
            x, pivot, function = features(n), torch.tensor(0, device=device), getattr(ops, name)
            return lambda: function(x, max(1, n // SHARE), pivot)

        return prepare

    def divprune(n: int) -> Callable[[], Any]:
        x = features(n)
        return lambda: ops.divprune(x, max(1, n // SHARE))

    def dpp_map(n: int) -> Callable[[], Any]:
        x = features(n)
        return lambda: ops.dpp_map(x, max(1, n // SHARE))

    def matching(n: int) -> Callable[[], Any]:
        x = features(n, 64)[None]
        return lambda: ops.bipartite_soft_matching(x, n // 4)

    def rows(queries: int) -> Callable[[int], Any]:
        def prepare(n: int) -> Callable[[], Any]:
            q = features(HEADS * queries, HEAD).view(1, HEADS, queries, HEAD)
            k = features(HEADS * n, HEAD).view(1, HEADS, n, HEAD)
            return lambda: ops.attention_rows(q, k)

        return prepare

    def merged(n: int) -> Callable[[], Any]:
        x = features(n, 64)[None]
        plan, values = ops.bipartite_soft_matching(x, n // 4), features(n)[None]
        assert plan is not None
        return lambda: plan.apply(values)

    return {
        "divprune": divprune,
        "k_center": chosen("k_center"),
        "max_sum": chosen("max_sum"),
        "dpp_map": dpp_map,
        "bipartite_soft_matching": matching,
        "MergePlan.apply": merged,
        "attention_rows (last row)": rows(1),
        f"attention_rows ({TEXT} rows)": rows(TEXT),
    }


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
