#!/usr/bin/env python3
"""Time operators against plain transcriptions, and methods against their ideal. CPU, 1 thread.

    python scripts/bench_operators.py [operators|methods|growth|all] [--quick] [--only NAMES]
        [--json FILE]

``operators``: every operator that a method uses, at the sizes of LLaVA-1.5 (CLIP-L: 16 heads of 64
over 577 tokens, features of width 1024; decoder: 32 heads of 128 over 640 tokens), against a plain
PyTorch transcription of its description: the N×N or full attention maps that it speaks of, and
loops where it has loops (``tests/reference``). Both must give the same result before they are
timed. "ours" starts from
the same q, k, v or features as "plain", so reading a few rows instead of a whole map is part of
what is measured.

``methods``: one prefill of a LLaVA with random weights (CLIP 12×384, 576 patches; Llama 8×384;
with ``--wide`` 1024 instead of 384)

- *unpruned*: the model as it is;
- *method*: patched, with everything the method does;
- *replay*: the same drops at the same places, from indices that were recorded before, so without
  any scoring: what the method would cost if choosing were free;
- *bare*: the model's own forward on sequences cut to the method's lengths by slicing: no scores, no
  gathers, no book-keeping (the "ideal" of ``tokprune bench``, which measures any model).

``growth``: operators at 1,024, 4,096 and 16,384 tokens: time, the most bytes alive at once beyond
the inputs, and the exponent of time between sizes. A size whose call would take more than
``--longest`` seconds, by the growth up to it, is left out.

Everything is interleaved in one process, in changing order; medians and quartiles over rounds, and
differences taken inside a round, so that drift of the machine cancels. A difference whose quartiles
enclose zero is marked as within noise. Nothing is asserted about time.

Left out: arithmetic on the host that touches no token (schedules, bounds, scales), and operators
no method calls.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokprune import operators as ops
from tokprune.bench.clock import (
    CLOCKS,
    Spread,
    interleaved,
    milliseconds,
    no_garbage_collection,
    once,
)
from tokprune.bench.environment import environment
from tokprune.bench.growth import exponent

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from live_bytes import LiveBytes
from operator_cases import cases
from reference import (
    attention,
    clustering,
    diversity,
    flow,
    merging,
    mustdrop,
    visionzip,
    windows,
)

N, D = 576, 1024
SIDE = 24
H, HD = 16, 64  # CLIP-L
DH, DKV, DD = 32, 32, 128  # decoder of LLaVA-1.5-7B
START, TEXT = 35, 29
L = START + N + TEXT
K = 64


# ------------------------------------------------------------------------------- inputs


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(seed: int = 0, tokens: int = N, width: int = D) -> Tensor:
    """[tokens, width]: 40 unequal clusters around a common mean, as image features have."""
    g = _generator(seed)
    centre = torch.randn(40, width, generator=g)
    member = (40 * torch.rand(tokens, generator=g) ** 2).long()
    noise = torch.randn(tokens, width, generator=g)
    return 0.8 * torch.randn(width, generator=g) + centre[member] + 0.7 * noise


def uniform_windows(seed: int = 0) -> Tensor:
    """[1, 577, 1024]: class token and a grid whose 3×3 windows are more or less uniform."""
    g = _generator(seed)
    coarse = torch.randn(1, D, SIDE // 3, SIDE // 3, generator=g)
    spread = torch.rand(1, 1, SIDE // 3, SIDE // 3, generator=g)

    def grown(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=3, mode="nearest")

    grid = grown(coarse) + grown(spread) * torch.randn(1, D, SIDE, SIDE, generator=g)
    patches = grid.flatten(2).transpose(1, 2)
    return torch.cat([torch.randn(1, 1, D, generator=g), patches], dim=1)


def clip_qkv(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, 16, 577, 64] of a CLIP-L layer."""
    g = _generator(seed)
    q, k, v = (torch.randn(1, H, N + 1, HD, generator=g) for _ in range(3))
    return 1.5 * q, k, 0.3 * v


def decoder_qkv(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, 32, 640, 128] of a decoder layer."""
    g = _generator(seed)
    q = torch.randn(1, DH, L, DD, generator=g)
    k, v = (torch.randn(1, DKV, L, DD, generator=g) for _ in range(2))
    return 1.5 * q, k, 0.3 * v


# ------------------------------------------------------------------------------ entries


@dataclass(frozen=True)
class Case:
    """Two ways to one result, on inputs made beforehand."""

    ours: Callable[[], Any]
    plain: Callable[[], Any]


@dataclass(frozen=True)
class Entry:
    """An operator, the size it is timed at, and a function that prepares its case."""

    name: str
    shape: str
    make: Callable[[], Case]


ENTRIES: dict[str, Entry] = {}


def entry(name: str, shape: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def add(make: Callable[[], Case]) -> Callable[[], Case]:
        ENTRIES[name] = Entry(name, shape, make)
        return make

    return add


_FEATURES = f"{N}×{D}"
_CLIP = f"{H}×{N + 1}×{HD}"
_DECODER = f"{DH}×{L}×{DD}"


@entry("max_sum", f"{_FEATURES}, k={K}")
def _max_sum() -> Case:
    x, pivot = features(), torch.tensor(7)
    return Case(lambda: ops.max_sum(x, K, pivot), lambda: diversity.max_sum(x, 7, K))


@entry("k_center", f"{_FEATURES}, k={K}")
def _k_center() -> Case:
    x, pivot = features(), torch.tensor(7)
    return Case(lambda: ops.k_center(x, K, pivot), lambda: diversity.k_center(x, 7, K))


@entry("kmedoids", f"{_FEATURES}, k={K}")
def _kmedoids() -> Case:
    x = features()
    return Case(lambda: tuple(ops.kmedoids(x, K)), lambda: clustering.kmedoids(x, K))


@entry("spectral_clustering", f"16 blobs, 3 frames × 49×{D}, k=16")
def _spectral() -> Case:
    g = _generator(6)  # far blobs: what the graph says is beyond doubt
    home = torch.arange(147) % 16
    x = torch.randn(16, D, generator=g)[home] + 0.02 * torch.randn(147, D, generator=g)

    def parts(assign: Tensor) -> Tensor:  # rows of a blob are alike: any of them may be the medoid
        return (assign[:, None] == assign[None, :]).long()

    return Case(
        lambda: parts(ops.spectral_clustering(x, 16, neighbours=15, sigma=10.0).assign),
        lambda: parts(clustering.spectral_clustering(x, 16, 15, 10.0)[1]),
    )


@entry("evs", f"8 frames of 196×{D}, k=470")
def _evs() -> Case:
    g = _generator(7)
    x = torch.randn(196, D, generator=g) + torch.randn(8, 196, D, generator=g).cumsum(0) * 0.3
    return Case(lambda: ops.evs(x, 470), lambda: clustering.evs(x, 470))


@entry("divprune", f"{_FEATURES}, k={K}")
def _divprune() -> Case:
    x = features()
    return Case(lambda: ops.divprune(x, K), lambda: diversity.divprune(x, K))


@entry("cls_pivot", f"q, k {_CLIP}")
def _cls_pivot() -> Case:
    q, k, _ = clip_qkv()

    def ours() -> Tensor:
        row = ops.attention_rows(q[:, :, :1], k)[:, :, 0]
        return ops.cls_pivot(ops.cls_scores(row))

    return Case(ours, lambda: attention.cls_pivot(q, k))


@entry("farthest_pivot", _FEATURES)
def _farthest_pivot() -> Case:
    x = features()
    return Case(lambda: ops.farthest_pivot(x), lambda: diversity.farthest_pivot(x))


def text_rows(q: Tensor, k: Tensor) -> Tensor:
    """[B, H, R, L]: attention from the text after the image, in a decoder layer."""
    position = torch.arange(L)
    return ops.attention_rows(
        q[:, :, START + N :], k, None, (position <= position[START + N :, None])[None]
    )


@entry("ratio_from_rows", f"q, k {_DECODER}, {TEXT} text tokens")
def _ratio_from_rows() -> Case:
    q, k, _ = decoder_qkv()
    text, visual = torch.zeros(2, 1, L, dtype=torch.bool)
    text[:, START + N :] = visual[:, START : START + N] = True
    return Case(
        lambda: ops.ratio_from_rows(text_rows(q, k), text[:, START + N :], visual),
        lambda: attention.text_to_image_ratio(q, k, text, visual),
    )


def _transitions(tokens: int, width: int) -> Case:
    g = _generator(1)
    before = torch.randn(1, tokens, width, generator=g)
    after = 0.4 * before + torch.randn(1, tokens, width, generator=g)
    return Case(
        lambda: ops.transition_weight(before, after),
        lambda: attention.transition_weight(before, after),
    )


@entry("transition_weight", _FEATURES)
def _transition_weight() -> Case:
    return _transitions(N, D)


@entry("transition_weight (7B)", f"{L}×{DH * DD}")
def _transition_weight_7b() -> Case:
    return _transitions(L, DH * DD)


def image_block() -> Tensor:
    """[1, L]: the image number of each column, −1 for text."""
    segment = torch.full((1, L), -1)
    segment[:, START : START + N] = 0
    return segment


@entry("instruction_rows", f"q, k {_DECODER}, {TEXT} text tokens")
def _instruction_rows() -> Case:
    q, k, _ = decoder_qkv()
    segment = image_block()
    return Case(
        lambda: ops.instruction_rows(text_rows(q, k), None, segment)[:, START : START + N],
        lambda: attention.instruction_attention(q, k, START, N),
    )


@entry("transition_score", f"6 layers, {N} tokens")
def _transition_score() -> Case:
    g = _generator(2)
    ttv = [torch.rand(1, N, generator=g) for _ in range(6)]
    iga = torch.rand(1, N, generator=g).softmax(-1)
    return Case(
        lambda: ops.transition_score(ttv, iga), lambda: attention.transition_score(ttv, iga, 0.5)
    )


@entry("pyramiddrop", f"q, k {_DECODER}, k={K}")
def _pyramiddrop() -> Case:
    q, k, _ = decoder_qkv()
    segment, budget = image_block(), torch.tensor([[K]])

    def ours() -> Tensor:
        score = ops.mean_rows(ops.attention_rows(q[:, :, -1:], k))
        return ops.segment_topk(score, segment, budget).nonzero()[:, 1]

    return Case(ours, lambda: attention.fastv(q, k, START, N, K))


@entry("segment_topk", f"4 prompts of {2 * N + 64}, 2 images each")
def _segment_topk() -> Case:
    score = torch.rand(4, 2 * N + 64, generator=_generator(3))
    segment = torch.full(score.shape, -1)
    segment[:, 20 : 20 + N] = 0
    segment[:, 40 + N : 40 + 2 * N] = 1
    budget = torch.full((4, 2), K)
    return Case(
        lambda: ops.segment_topk(score, segment, budget),
        lambda: attention.segment_topk(score, segment, budget),
    )


@entry("attn_terms", f"q, k, v {_CLIP}")
def _attn_terms() -> Case:
    q, k, v = clip_qkv()
    return Case(lambda: tuple(ops.attn_terms(q, k, v)), lambda: flow.attn_terms(q, k, v))


@entry("flow_score", f"{N} tokens, d={HD}")
def _flow_score() -> Case:
    terms = flow.attn_terms(*clip_qkv())
    return Case(lambda: ops.flow_score(*terms), lambda: flow.flow_score(*terms))


@entry("prune_count", f"4 images of {N}")
def _prune_count() -> Case:
    a = torch.randn(4, N, generator=_generator(4)).mul(2).softmax(-1)
    return Case(
        lambda: ops.prune_count(a, 10, K, reduce="batch"), lambda: flow.prune_count(a, 10, K)
    )


@entry("encoder_keep", f"{N} tokens")
def _encoder_keep() -> Case:
    g = _generator(4)
    a = torch.randn(1, N, generator=g).mul(2).softmax(-1)
    e = a * torch.rand(1, N, generator=g)

    def ours() -> Tensor:
        cut = ops.encoder_keep(e, a, 10, K)
        assert cut is not None
        return cut.index

    return Case(ours, lambda: flow.encoder_keep(e, a, 10, K))


@entry("global_query_terms", f"q, k, v {H}×{N}×{HD}")
def _global_query() -> Case:
    q, k, v = (t[:, :, 1:].contiguous() for t in clip_qkv())
    return Case(
        lambda: tuple(ops.global_query_terms(q, k, v)), lambda: flow.global_query_terms(q, k, v)
    )


@entry("text_terms", f"q, k, v {_DECODER}, k={K}")
def _text_terms() -> Case:
    q, k, v = decoder_qkv()
    block = slice(START, START + N)

    def ours() -> Tensor:
        terms = ops.text_terms(q[:, :, -1:], k[:, :, block], v[:, :, -1:], v[:, :, block])
        return ops.keep_topk(ops.flow_score(*terms), K)

    return Case(ours, lambda: flow.llm_select(q, k, v, START, N, L - 1, K))


def _metric(width: int = D) -> Tensor:
    return features(5, N + 1, width)[None]


def _lists(plan: ops.MergePlan | None) -> merging.Lists:
    assert plan is not None
    return plan.keep, plan.src, plan.dst, plan.slot


@entry("bipartite_soft_matching", f"{N + 1}×{HD}, r=16")
def _bsm() -> Case:
    x = _metric(HD)
    return Case(
        lambda: _lists(ops.bipartite_soft_matching(x, 16, class_token=True)),
        lambda: merging.bsm(x, 16),
    )


def _pitome(kind: Any) -> Case:
    x = _metric()
    return Case(
        lambda: _lists(ops.pitome(x, 0.9, margin=0.4, kind=kind, class_token=True)),
        lambda: merging.pitome(x, 0.9, 0.4, kind),
    )


@entry("pitome (gauss)", f"{N + 1}×{D}, ratio 0.9")
def _pitome_gauss() -> Case:
    return _pitome("gauss")


@entry("pitome (elu)", f"{N + 1}×{D}, ratio 0.9")
def _pitome_elu() -> Case:
    return _pitome("elu")


@entry("energy_bsm", f"{N + 1}×{D}, ratio 0.9")
def _energy_bsm() -> Case:
    x = _metric()
    return Case(
        lambda: _lists(ops.energy_bsm(x, 0.9, margin=0.4, class_token=True)),
        lambda: merging.energy_bsm(x, 0.9, 0.4, "elu"),
    )


def _plan() -> ops.MergePlan:
    plan = ops.pitome(_metric(), 0.9, margin=0.4, class_token=True)
    assert plan is not None
    return plan


@entry("MergePlan.apply", f"{N + 1}×{D}, mean")
def _apply() -> Case:
    x, plan = _metric(), _plan()
    lists = _lists(plan)
    return Case(lambda: plan.apply(x), lambda: merging.apply(x, lists))


@entry("MergePlan.weighted", f"{N + 1}×{D}")
def _weighted() -> Case:
    x, plan = _metric(), _plan()
    lists = _lists(plan)
    size = 1 + torch.randint(0, 4, (1, N + 1, 1), generator=_generator(6)).float()
    return Case(lambda: plan.weighted(x, size), lambda: merging.weighted(x, size, lists))


@entry("spatial_merge", f"1+{N}×{D}, 3×3 windows")
def _spatial_merge() -> Case:
    x = uniform_windows()

    def ours() -> tuple[Tensor, Tensor]:
        merged = ops.spatial_merge(x, 0.8)
        return merged.out, merged.dst

    return Case(ours, lambda: windows.spatial_merge(x, 0.8, SIDE, 3))


@entry("key_tokens", f"q, k {_CLIP}")
def _key_tokens() -> Case:
    q, k, _ = clip_qkv()

    def ours() -> Tensor:
        return ops.key_tokens(ops.attention_rows(q[:, :, :1], k)[:, :, 0])

    return Case(ours, lambda: mustdrop.key_tokens(q, k, 0.08))


@entry("text_attention", f"q, k {_DECODER}, {TEXT} text tokens")
def _text_attention() -> Case:
    q, k, _ = decoder_qkv()
    block = slice(START, START + N)

    def ours() -> Tensor:
        total, peak = ops.text_attention(text_rows(q, k)[0, ..., block])
        return ops.filter_score(total, peak, 0.0012, 0.01) >= 1

    def plain() -> Tensor:
        rows = attention.full_map(q, k, causal=True)[0, :, START + N :, block]
        return mustdrop.dual_filter(rows, 0.0012, 0.01)

    return Case(ours, plain)


@entry("filter_score", f"{N} tokens")
def _filter_score() -> Case:
    g = _generator(10)
    total, peak = torch.rand(N, generator=g), torch.rand(N, generator=g)
    return Case(
        lambda: ops.filter_score(total, peak, 0.0012, 0.001),
        lambda: mustdrop.filter_score(total, peak, 0.0012, 0.001),
    )


@entry("visionzip_dominant", f"q, k {_CLIP}, 54 tokens")
def _dominant() -> Case:
    q, k, _ = clip_qkv()

    def ours() -> Tensor:
        return ops.visionzip_dominant(ops.attention_rows(q[:, :, :1], k)[:, :, 0], 54)

    return Case(ours, lambda: visionzip.dominant(q, k, 54))


@entry("visionzip_contextual", f"{N + 1}×{D}, 54 + 10 tokens")
def _contextual() -> Case:
    hidden, metric = _metric(), _metric(HD)
    indices = torch.randperm(N, generator=_generator(12))[:53] + 1
    indices = F.pad(indices, (1, 0))[None]
    kept = indices[0].tolist()
    return Case(
        lambda: ops.visionzip_contextual(hidden, metric, indices, 10).out,
        lambda: visionzip.contextual(hidden[0], metric[0], kept, 10)[0],
    )


@entry("grid_avg_pool", f"{_FEATURES} → 64")
def _grid_avg_pool() -> Case:
    x = features()[None]

    def plain() -> Tensor:
        grid = x.transpose(1, 2).reshape(1, D, SIDE, SIDE)
        return F.avg_pool2d(grid, 3).flatten(2).transpose(1, 2)

    return Case(lambda: ops.grid_avg_pool(x, 64), plain)


# ---------------------------------------------------------------------------- measuring


def agreement(ours: Any, plain: Any) -> str:
    """ "equal", or how far two results are apart.

    Raises:
        RuntimeError: more than 1 % of the indices differ, or floats by more than 1e-4 of the
            largest (near ties may fall either way on another processor; a wrong transcription
            does not get this close).
    """
    pairs = _flat(ours), _flat(plain)
    if len(pairs[0]) != len(pairs[1]):
        raise RuntimeError(f"{len(pairs[0])} results against {len(pairs[1])}")
    wrong = total = 0
    worst = 0.0
    for a, b in zip(*pairs):
        if a.numel() != b.numel():
            raise RuntimeError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
        a, b = a.flatten(), b.flatten()
        if a.is_floating_point():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
        else:
            wrong, total = wrong + int((a != b).sum()), total + a.numel()
    if wrong > 0.01 * total or worst > 1e-4:
        raise RuntimeError(f"{wrong} of {total} indices differ, floats by {worst:.1e}")
    if wrong:
        return f"{wrong}/{total} ties"
    return "equal" if worst < 1e-6 else f"{worst:.0e}"


def _flat(result: Any) -> list[Tensor]:
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _flat(part)]


def measure_operators(
    names: list[str], repeats: int, cap: float, clock: str = "wall"
) -> list[dict[str, Any]]:
    """One row per operator: milliseconds of both sides, ratio plain ÷ ours within each round."""
    rows = []
    for name in names:
        own = ENTRIES[name]
        case = own.make()
        with torch.inference_mode():
            try:
                same = agreement(case.ours(), case.plain())
            except RuntimeError as error:
                raise RuntimeError(f"{name}: ours and plain disagree: {error}") from error
            times = interleaved({"ours": case.ours, "plain": case.plain}, repeats, cap, clock=clock)
        ratio = [p / o for o, p in zip(times["ours"], times["plain"])]
        rows.append(
            {
                "name": name,
                "shape": own.shape,
                "same": same,
                "ours_s": Spread.of(times["ours"]).to_dict(),
                "plain_s": Spread.of(times["plain"]).to_dict(),
                "ratio": Spread.of(ratio).to_dict(),
            }
        )
        print(f"  {name}", file=sys.stderr, flush=True)
    return rows


def operator_table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        title="operators, milliseconds: median (quartiles)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("operator", no_wrap=True)
    table.add_column("size")
    for name in ("ours", "plain", "plain ÷ ours"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result")
    for row in rows:
        ratio = row["ratio"]
        table.add_row(
            row["name"], row["shape"], _spread(row["ours_s"]), _spread(row["plain_s"]),
            f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})", row["same"],
        )  # fmt: skip
    return table


def _spread(value: dict[str, float]) -> str:
    low, high = milliseconds(value["q1"]), milliseconds(value["q3"])
    return f"{milliseconds(value['median'])} ({low}–{high})"


# ------------------------------------------------------------------------------- growth

SIZES, SMALL_SIZES = (1024, 4096, 16384), (64, 144)


def measure_growth(
    names: list[str], sizes: tuple[int, ...], repeats: int, longest: float, clock: str
) -> list[dict[str, Any]]:
    """A row per operator: seconds and bytes at each size that was run, and exponents between."""
    known, rows = cases(torch.device("cpu"), torch.float32), []
    for name in names:
        seconds: dict[int, list[float]] = {}
        held: dict[int, int] = {}
        for size in sizes:
            done = sorted(seconds)
            if done and _expected(seconds, size) > longest:
                break
            call = known[name](size)
            with torch.inference_mode(), LiveBytes() as live:
                call()
            held[size] = live.peak
            with torch.inference_mode(), no_garbage_collection():
                seconds[size] = [once(call, clock=clock) for _ in range(repeats)]
        done = sorted(seconds)
        medians = [Spread.of(seconds[size]).median for size in done]
        between = [
            exponent(done[i : i + 2], medians[i : i + 2]) for i in range(len(done) - 1)
        ]  # fmt: skip
        rows.append(
            {
                "name": name, "sizes": done, "left_out": [s for s in sizes if s not in done],
                "seconds": [Spread.of(seconds[size]).to_dict() for size in done],
                "bytes": [held[size] for size in done], "exponents": between,
            }
        )  # fmt: skip
        print(f"  {name}", file=sys.stderr, flush=True)
    return rows


def _expected(seconds: dict[int, list[float]], size: int) -> float:
    """Of the next size, by the last two; by the square of the size after one."""
    done = sorted(seconds)
    medians = [Spread.of(seconds[n]).median for n in done]
    power = exponent(done[-2:], medians[-2:]) if len(done) > 1 else 2.0
    return medians[-1] * (size / done[-1]) ** power


def growth_table(rows: list[dict[str, Any]], sizes: tuple[int, ...]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        title="operators, milliseconds and MB held at once", box=box.SIMPLE_HEAD,
        title_justify="left",
    )  # fmt: skip
    table.add_column("operator", no_wrap=True)
    for size in sizes:
        table.add_column(f"{size:,}", justify="right", no_wrap=True)
    table.add_column("exponents", justify="right", no_wrap=True)
    for row in rows:
        cells = [
            f"{milliseconds(value['median'])} / {held / 1e6:.1f}"
            for value, held in zip(row["seconds"], row["bytes"])
        ]
        cells += ["too long"] * len(row["left_out"])
        table.add_row(row["name"], *cells, ", ".join(f"{e:.2f}" for e in row["exponents"]))
    return table


# --------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "section", nargs="?", default="all", choices=("operators", "methods", "growth", "all")
    )
    parser.add_argument("--quick", action="store_true", help="small model, few repeats")
    parser.add_argument("--only", help="operators or methods, separated by commas")
    parser.add_argument("--wide", action="store_true", help="methods: in a model as wide as CLIP-L")
    parser.add_argument("--repeats", type=int, help="rounds (operators: 21, methods: 5, growth: 3)")
    parser.add_argument(
        "--longest", type=float, default=20.0, help="growth: seconds of one call (default 20)"
    )
    parser.add_argument(
        "--clock",
        default="wall",
        choices=tuple(CLOCKS),
        help="cpu: time spent by this process, for a machine that others use too",
    )
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()

    import transformers
    from _replay import SHAPES, labels, measure_methods, method_tables
    from rich.console import Console

    wanted = None if options.only is None else [n.strip() for n in options.only.split(",")]
    known = {
        "operators": list(ENTRIES),
        "methods": labels(),
        "growth": list(cases(torch.device("cpu"), torch.float32)),
    }
    if options.section != "all":
        known = {options.section: known[options.section]}
    if wanted is not None:
        unknown = [n for n in wanted if not any(n in names for names in known.values())]
        if unknown:
            parser.error(f"--only {unknown[0]!r} is none of {known}")
        known = {part: [n for n in names if n in wanted] for part, names in known.items()}
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "environment": {**environment(), "clock": options.clock},
        "quick": options.quick,
    }
    console = Console(width=max(Console().width, 150))
    env = report["environment"]
    console.print(
        f"{env['cpu']}, {env['threads']} thread, {options.clock} clock, load "
        f"{env['load_at_start']}; "
        f"torch {env['torch']}, transformers {env['transformers']}"
    )
    if operators := known.get("operators"):
        repeats = options.repeats or (5 if options.quick else 21)
        cap = 1.0 if options.quick else 12.0
        report["operators"] = measure_operators(operators, repeats, cap, options.clock)
        console.print(operator_table(report["operators"]))
    if methods := known.get("methods"):
        repeats = options.repeats or (2 if options.quick else 5)
        shape = SHAPES["quick" if options.quick else "wide" if options.wide else "small"]
        report["methods"] = measure_methods(methods, repeats, shape, options.clock)
        for part in method_tables(report["methods"]):
            console.print(part)
    if growing := known.get("growth"):
        sizes = SMALL_SIZES if options.quick else SIZES
        repeats = options.repeats or (1 if options.quick else 3)
        report["growth"] = measure_growth(growing, sizes, repeats, options.longest, options.clock)
        console.print(growth_table(report["growth"], sizes))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 0


def on_one_heap() -> None:
    """Start anew with temporaries on a heap that only grows. The C library (glibc) fetches large
    blocks from the system and gives them back; which of two runs pays for that is chance."""
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        heap = {
            "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
            "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
            "MALLOC_TOP_PAD_": str(256 << 20),
        }
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **heap})


if __name__ == "__main__":
    on_one_heap()
    sys.exit(main())
