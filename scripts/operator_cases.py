"""Operators at any number of tokens, for ``gpu_check.py`` and ``bench_operators.py growth``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WIDTH, HEADS, HEAD, TEXT = 1024, 32, 128, 32
#: an operator keeps one token in so many
SHARE = 9

Prepare = Callable[[int], Callable[[], Any]]


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, Prepare]:
    """What is timed: a function of n that prepares inputs and returns the call to time."""
    from tokprune import operators as ops
    from tokprune.operators import anchors, apet, coverage, mmtok, prumerge, prunesid, vispruner
    from tokprune.operators.clse import evolution, spectral
    from tokprune.operators.diversity import divprune, k_center, max_sum
    from tokprune.operators.dpp import dpp_map
    from tokprune.operators.ficoco import soft_targets
    from tokprune.operators.geometry import centred_geometry
    from tokprune.operators.hiprune import anchors_and_registers
    from tokprune.operators.holov import select_by_crops
    from tokprune.operators.msdg import salient_of_groups
    from tokprune.operators.occamtoken import outlier_activation, shift, stage1, stage2
    from tokprune.operators.priortr import prior_corrected
    from tokprune.operators.score import salient_k_center
    from tokprune.operators.sieve import text_residual, unexplained_and_diverse
    from tokprune.operators.tops import preservation_set
    from tokprune.operators.trim import keep_and_mean
    from tokprune.operators.v2drop import variation
    from tokprune.operators.vscan import grid_windows, merge_into, two_scans

    def features(n: int, width: int = WIDTH, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(n + seed)
        return torch.randn(n, width, generator=generator).to(device, dtype)

    def scores(n: int, seed: int = 1) -> Tensor:
        """[1, n] float32, as attention is: positive, with a long tail."""
        generator = torch.Generator().manual_seed(n + seed)
        return torch.randn(1, n, generator=generator).mul(2).softmax(-1).to(device)

    def few(n: int) -> int:
        return max(1, n // SHARE)

    def on_features(call: Callable[[Tensor, int], Any]) -> Prepare:
        def prepare(n: int) -> Callable[[], Any]:
            x = features(n)[None]
            return lambda: call(x, few(n))

        return prepare

    def on_both(call: Callable[[Tensor, Tensor, int], Any]) -> Prepare:
        def prepare(n: int) -> Callable[[], Any]:
            x, score = features(n)[None], scores(n)
            return lambda: call(x, score, few(n))

        return prepare

    def joined(n: int) -> Callable[[], Any]:
        x = features(n)[None]
        kept = torch.arange(0, n, SHARE, device=device)[None]
        return lambda: anchors.nearest(x, kept)

    def matching(n: int) -> Callable[[], Any]:
        x = features(n, 64)[None]
        return lambda: ops.bipartite_soft_matching(x, n // 4)

    def merged(n: int) -> Callable[[], Any]:
        x = features(n, 64)[None]
        plan, values = ops.bipartite_soft_matching(x, n // 4), features(n)[None]
        assert plan is not None
        return lambda: plan.apply(values)

    def rows(queries: int) -> Prepare:
        def prepare(n: int) -> Callable[[], Any]:
            q = features(HEADS * queries, HEAD).view(1, HEADS, queries, HEAD)
            k = features(HEADS * n, HEAD).view(1, HEADS, n, HEAD)
            return lambda: ops.attention_rows(q, k)

        return prepare

    def hiprune(n: int) -> Callable[[], Any]:
        middle, deep = scores(n), scores(n, 2)
        grid = (n // (side := math.isqrt(n)), side)
        cells = torch.arange(n, device=device)[None]
        full = (grid[0] + 1, grid[1])  # the last row may be cut short
        return lambda: anchors_and_registers(middle, deep, few(n), 0.1, full, cells)

    def two(n: int) -> Callable[[], Any]:
        shallow, deep, side = scores(n), scores(n, 2), math.isqrt(n)
        window = grid_windows((-(-n // side), side), 6)
        number = int(window.max()) + 1
        return lambda: two_scans(shallow, deep, window[:n], number, few(n))

    def into(n: int) -> Callable[[], Any]:
        x = features(n)[None]
        keep = torch.arange(0, n, SHARE, device=device)[None]
        return lambda: merge_into(x, keep)

    def merge(n: int) -> Callable[[], Any]:
        x, key, attention = features(n)[None], features(n, 1024, 3)[None], scores(n)
        order = prumerge.by_attention(attention)
        return lambda: prumerge.merge(x, key, attention, order, few(n))

    def covered(n: int) -> Callable[[], Any]:
        x, seen, text = features(n)[None], features(n, seed=4)[None], features(16)[None]
        return lambda: mmtok.multimodal_coverage(text, x, seen, few(n))

    def changed(n: int) -> Callable[[], Any]:
        before, after = features(n)[None], features(n, seed=5)[None]
        return lambda: variation(before, after)

    def detail(n: int) -> Callable[[], Any]:
        side = math.isqrt(n)
        x = features(side * (n // side))[None]
        return lambda: spectral(x, (n // side, side))

    def evolved(n: int) -> Callable[[], Any]:
        before, after = scores(n), scores(n, 2)
        return lambda: evolution(before, after)

    def corrected(n: int) -> Callable[[], Any]:
        question, prior = scores(n), scores(n, 2)
        segment = torch.zeros(1, n, dtype=torch.long, device=device)
        return lambda: prior_corrected(question, prior, segment)

    def residual(n: int) -> Callable[[], Any]:
        x, text = features(n)[None], features(TEXT, seed=6)[None]
        return lambda: text_residual(x, text)

    def softly(n: int) -> Callable[[], Any]:
        correlation = features(n // 14, n)[None].float()
        return lambda: soft_targets(correlation, None, 0.998, max(1, n // 500))

    def against_register(n: int) -> Callable[[], Any]:
        row = scores(n)[:, None].expand(-1, 16, -1)
        return lambda: stage1(row, 1.0)

    def asked(n: int) -> Callable[[], Any]:
        highest, mean = scores(n), scores(n, 2)
        segment = torch.zeros(1, n, dtype=torch.long, device=device)
        register = torch.arange(n, device=device)[None] == n - 1
        return lambda: stage2(highest, mean, segment, register, 1.0, few(n))

    def peaks(n: int) -> Callable[[], Any]:
        x = features(n)[None]
        outlier = torch.arange(n, device=device)[None] % SHARE == 0
        return lambda: outlier_activation(x, outlier)

    first = torch.zeros(1, dtype=torch.long, device=device)
    return {
        "divprune": on_features(divprune),
        "k_center": on_features(lambda x, k: k_center(x, k, first)),
        "max_sum": on_features(lambda x, k: max_sum(x, k, first)),
        "dpp_map": on_features(dpp_map),
        "centred_geometry": on_features(lambda x, k: centred_geometry(x)),
        "distinctive_anchors": on_features(anchors.distinctive_anchors),
        "nearest": joined,
        "coverage": on_both(lambda x, s, k: coverage.coverage(x, k, s)),
        "multimodal_coverage": covered,
        "salient_k_center": on_both(salient_k_center),
        "preservation_set": on_both(preservation_set),
        "important_and_diverse": on_both(vispruner.important_and_diverse),
        "anchors_and_registers": hiprune,
        "principal_groups": on_features(lambda x, k: prunesid.principal_groups(x, min(k, 64))),
        "group_order": on_both(
            lambda x, s, k: prunesid.group_order(
                x, torch.arange(x.shape[1], device=device)[None] % 16, s, s.new_full((1,), 0.1)
            )
        ),
        "select_by_crops": on_both(lambda x, s, k: select_by_crops(x, s, k, 16)),
        "two_scans": two,
        "merge_into": into,
        "prumerge.merge": merge,
        "apet.compress": on_features(lambda x, k: apet.compress(x, k)),
        "keep_and_mean": on_both(lambda x, s, k: keep_and_mean(x, s, k)),
        "variation": changed,
        "spectral": detail,
        "evolution": evolved,
        "prior_corrected": corrected,
        "text_residual": residual,
        "unexplained_and_diverse": on_both(lambda x, s, k: unexplained_and_diverse(x, s, s, k)),
        "salient_of_groups": on_both(lambda x, s, k: salient_of_groups(x, s, k)),
        "soft_targets": softly,
        "register shift": on_features(lambda x, k: shift(x, (1, 2, 3))),
        "occamtoken.stage1": against_register,
        "occamtoken.stage2": asked,
        "outlier_activation": peaks,
        "bipartite_soft_matching": matching,
        "MergePlan.apply": merged,
        "attention_rows (last row)": rows(1),
        f"attention_rows ({TEXT} rows)": rows(TEXT),
    }
