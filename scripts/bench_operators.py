#!/usr/bin/env python3
"""Time operators against plain transcriptions, and methods against their ideal. CPU, 1 thread.

    python scripts/bench_operators.py [operators|methods|all] [--quick] [--only NAMES] [--json FILE]

``operators``: every operator that a method uses, at the sizes of LLaVA-1.5 (CLIP-L: 16 heads of 64
over 577 tokens, features of width 1024; decoder: 32 heads of 128 over 640 tokens), against a plain
PyTorch transcription of its description: the N×N or full attention maps that it speaks of, and
loops where it has loops. Both must give the same result before they are timed. "ours" starts from
the same q, k, v or features as "plain", so reading a few rows instead of a whole map is part of
what is measured.

``methods``: one prefill of a LLaVA with random weights (CLIP 12×384, 576 patches; Llama 8×384)

- *unpruned*: the model as it is;
- *method*: patched, with everything the method does;
- *replay*: the same drops at the same places, from indices that were recorded before, so without
  any scoring: what the method would cost if choosing were free;
- *bare*: the model's own forward on sequences cut to the method's lengths by slicing: no scores, no
  gathers, no book-keeping (the "ideal" of ``tokprune bench``, which measures any model).

Everything is interleaved in one process, in changing order; medians and quartiles over rounds, and
differences taken inside a round, so that drift of the machine cancels. A difference whose quartiles
enclose zero is marked as within noise. Nothing is asserted about time.

Left out: arithmetic on the host that touches no token (schedules, bounds, scales), and operators
no method calls.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokprune import operators as ops
from tokprune.bench.clock import CLOCKS, Spread, interleaved, milliseconds
from tokprune.bench.environment import environment

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


def windows(seed: int = 0) -> Tensor:
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


# ----------------------------------------------------------------- plain transcriptions


def full_map(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """The whole softmax map [B, H, L, L], as eager attention makes it."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later, -math.inf)
    return logits.softmax(-1)


def plain_max_sum(x: Tensor, pivot: int, k: int) -> Tensor:
    unit = x / x.norm(dim=-1, keepdim=True)
    gram = unit @ unit.T
    chosen = [pivot]
    total = gram[:, pivot].clone()
    total[pivot] = math.inf
    for _ in range(k - 1):
        c = int(total.argmin())
        chosen.append(c)
        total += gram[:, c]
        total[c] = math.inf
    return torch.tensor(chosen)


def plain_k_center(x: Tensor, pivot: int, k: int) -> Tensor:
    unit = x / x.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    chosen = [pivot]
    nearest = distance[:, pivot].clone()
    nearest[pivot] = -math.inf
    for _ in range(k - 1):
        c = int(nearest.argmax())
        chosen.append(c)
        nearest = torch.minimum(nearest, distance[:, c])
        nearest[c] = -math.inf
    return torch.tensor(chosen)


def plain_divprune(x: Tensor, k: int) -> Tensor:
    unit = x / x.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    isolation = distance.topk(2, dim=0, largest=False).values[1]
    chosen = [int(isolation.argmax())]
    nearest = distance[:, chosen[0]].clone()
    for _ in range(k - 1):
        c = int(nearest.argmax())
        chosen.append(c)
        nearest = torch.minimum(nearest, distance[:, c])
    return torch.tensor(chosen)


def plain_cls_pivot(q: Tensor, k: Tensor) -> Tensor:
    return full_map(q, k)[:, :, 0, 1:].mean(1).argmax(-1)


def plain_farthest_pivot(x: Tensor) -> Tensor:
    return F.cosine_similarity(x, x.mean(0, keepdim=True), dim=-1).argmin()


def plain_cross_modal_ratio(q: Tensor, k: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    attention = full_map(q, k, causal=True).mean(1)[0]
    visual, text = segment[0] == 2, segment[0] == 3
    tv = attention[text][:, visual].sum() / attention[text].sum()
    vt = attention[visual][:, text].sum() / visual.sum()
    return tv[None], vt[None]


def plain_transition_weight(before: Tensor, after: Tensor) -> Tensor:
    magnitude = after.norm(dim=-1) / before.norm(dim=-1)
    direction = torch.exp(1 - F.cosine_similarity(before, after, dim=-1))
    return magnitude * direction / direction.sum()


def plain_instruction_attention(q: Tensor, k: Tensor, start: int, n: int) -> Tensor:
    rows = full_map(q, k, causal=True)[0][:, start + n :]
    a = rows.mean(0).mean(0)[start : start + n]
    return a / (a.sum() + 1e-8)


def plain_transition_score(ttv: list[Tensor], iga: Tensor, alpha: float) -> Tensor:
    total = torch.stack(ttv).sum(0)
    total = total / (total.sum(-1, keepdim=True) + 1e-8)
    return alpha * total + (1 - alpha) * iga


def plain_fastv(q: Tensor, k: Tensor, start: int, n: int, keep: int) -> Tensor:
    row = full_map(q, k, causal=True)[0].mean(0)[-1]
    best = row[start : start + n].topk(keep).indices + start
    every = torch.arange(row.shape[0])
    return torch.cat([every[:start], best, every[start + n :]]).sort().values


def plain_segment_topk(score: Tensor, segment: Tensor, budget: Tensor) -> Tensor:
    mask = torch.zeros_like(segment, dtype=torch.bool)
    for b in range(score.shape[0]):
        for s in range(budget.shape[1]):
            place = (segment[b] == s).nonzero()[:, 0]
            best = score[b, place].topk(int(budget[b, s])).indices
            mask[b, place[best]] = True
    return mask


def plain_attn_terms(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = full_map(q, k).mean(1)[:, 0, 1:]
    semantic = (v[:, :, :1] @ v.transpose(-1, -2)).softmax(-1).mean(1)[:, 0, 1:]
    return attention, semantic, v.mean(1)[:, 1:]


def plain_flow_score(a: Tensor, s: Tensor, u: Tensor) -> Tensor:
    share = a / a.sum(-1, keepdim=True) + s / s.sum(-1, keepdim=True)
    return share * u.norm(p=1, dim=-1)


def plain_prune_count(a: Tensor, remaining: int, target: int) -> Tensor:
    counts = []
    for row in a:
        p = row / row.sum()
        h = float(-(p * p.log()).sum() / math.log(len(p)))
        counts.append(round((len(p) - target) / math.sqrt(remaining) * (1 - h * h)))
    return torch.tensor([max(counts)] * len(counts))


def plain_encoder_keep(e: Tensor, a: Tensor, remaining: int, target: int) -> Tensor:
    n = max(a.shape[1] - int(plain_prune_count(a, remaining, target)[0]), target)
    return e.topk(n, dim=-1).indices.sort(-1).values


def plain_global_query(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logits = q.mean(-2, keepdim=True) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return logits.softmax(-1).mean(1)[:, 0], v.mean(1)


def plain_llm_select(
    q: Tensor, k: Tensor, v: Tensor, start: int, n: int, last: int, target: int
) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[:, :, start : start + n]
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    seen = values[:, :, start : start + n]
    scale = math.sqrt(q.shape[-1])
    a = (q[:, :, last : last + 1] @ k.transpose(-1, -2) / scale).softmax(-1)
    s = (values[:, :, last : last + 1] @ seen.transpose(-1, -2) / scale).softmax(-1)
    score = plain_flow_score(a.mean(1)[:, 0], s.mean(1)[:, 0], seen.mean(1))
    return score.topk(target, dim=-1).indices.sort(-1).values


Plan4 = tuple[Tensor, Tensor, Tensor, Tensor]


def plain_bsm(metric: Tensor, r: int) -> Plan4:
    """keep, src, dst, slot of ToMe's matching with a class token."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
    scores[:, 0, :] = -math.inf
    best, match = scores.max(-1)
    order = best.argsort(-1, descending=True)
    joining = order[:, :r]
    staying = order[:, r:].sort(-1).values
    odd = torch.arange(1, metric.shape[1], 2).expand(metric.shape[0], -1)
    return 2 * staying, 2 * joining, odd, match.gather(1, joining)


def _energy(sim: Tensor, margin: float, kind: str) -> Tensor:
    if kind == "elu":
        return torch.where(sim > margin, sim - margin, (sim - margin).exp() - 1).mean(-1)
    sigma = 1 - margin
    bell = 2 * torch.exp(-(((1 - sim) / sigma) ** 2)) - 1
    return (bell / (sigma * math.sqrt(2 * math.pi))).mean(-1)


def plain_pitome(metric: Tensor, ratio: float, margin: float, kind: str) -> Plan4:
    x = F.normalize(metric[:, 1:], dim=-1)
    tokens = x.shape[1]
    r = math.floor(tokens - tokens * ratio)
    sim = x @ x.transpose(-1, -2)
    order = _energy(sim, margin, kind).argsort(-1, descending=True)
    mergeable, protected = order[:, : 2 * r], order[:, 2 * r :]
    a, b = mergeable[:, ::2], mergeable[:, 1::2]
    between = sim.gather(1, a[..., None].expand(-1, -1, tokens))
    between = between.gather(2, b[:, None].expand(-1, r, -1))
    return F.pad(protected + 1, (1, 0)), a + 1, b + 1, between.argmax(-1)


def plain_energy_bsm(metric: Tensor, ratio: float, margin: float, kind: str) -> Plan4:
    x = F.normalize(metric[:, 1:], dim=-1)
    tokens = x.shape[1]
    r = math.floor(tokens - tokens * ratio)
    sim = x @ x.transpose(-1, -2)
    order = _energy(sim, margin, kind).argsort(-1, descending=True)
    a, b = order[:, ::2], order[:, 1::2]
    between = sim.gather(1, a[..., None].expand(-1, -1, tokens))
    between = between.gather(2, b[:, None].expand(-1, a.shape[1], -1))
    best, match = between.max(-1)
    rank = best.argsort(-1, descending=True)
    keep = F.pad(a.gather(1, rank[:, r:]) + 1, (1, 0))
    return keep, a.gather(1, rank[:, :r]) + 1, b + 1, match.gather(1, rank[:, :r])


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def plain_apply(x: Tensor, plan: Plan4, mode: str = "mean") -> Tensor:
    keep, src, dst, slot = plan
    merged = _gathered(x, dst).scatter_reduce(
        1, slot[..., None].expand(-1, -1, x.shape[-1]), _gathered(x, src), mode, include_self=True
    )
    return torch.cat([_gathered(x, keep), merged], dim=1)


def plain_weighted(x: Tensor, size: Tensor, plan: Plan4) -> tuple[Tensor, Tensor]:
    total = plain_apply(size, plan, "sum")
    return plain_apply(x * size, plan, "sum") / total, total


def plain_tracking(source: Tensor, plan: Plan4) -> Tensor:
    """The 0/1 membership matrix [B, T_now, T_0], followed through one more merge."""
    return plain_apply(source, plan, "amax")


def plain_spectral(x: Tensor, group: Tensor) -> Tensor:
    def spectrum(weights: Tensor) -> Tensor:
        degree = weights.sum(-1)
        scale = torch.where(degree > 0, degree.rsqrt(), 0)
        return torch.linalg.eigvalsh(
            torch.eye(len(degree), dtype=weights.dtype) - scale[:, None] * weights * scale
        )

    unit = F.normalize(x.double(), dim=-1)
    weights = (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0)
    lifted = torch.empty_like(weights)
    labels = group.unique().tolist()
    members = [(group == p).nonzero()[:, 0] for p in labels]
    for p in members:
        for q in members:
            lifted[p[:, None], q] = weights[p[:, None], q].mean()
    return (spectrum(weights) - spectrum(lifted)).abs().sum()


def plain_spatial_merge(x: Tensor, threshold: float, a: int) -> tuple[Tensor, Tensor]:
    """Tokens after the merge, and the last grid token of every merged window."""
    patches = x[:, 1:]
    places, similarity = [], []
    for top in range(0, SIDE, a):
        for left in range(0, SIDE, a):
            place = torch.tensor(
                [(top + i) * SIDE + left + j for i in range(a) for j in range(a)]
            )  # fmt: skip
            unit = F.normalize(patches[0, place], dim=-1)
            cosine = unit @ unit.T
            pairs = a * a * (a * a - 1)
            places.append(place)
            similarity.append((cosine.sum() - cosine.diagonal().sum()) / pairs)
    sims = torch.stack(similarity)
    r = int((sims >= threshold).sum())
    best = sims.argsort(descending=True)[:r].tolist()
    merged = torch.stack([patches[0, places[w]].mean(0) for w in best])
    gone = torch.cat([places[w] for w in best])
    alive = torch.ones(N, dtype=torch.bool)
    alive[gone] = False
    out = torch.cat([x[0, :1], merged, patches[0][alive]])[None]
    return out, torch.stack([places[w][-1] for w in best])[None]


def plain_key_tokens(q: Tensor, k: Tensor, rate: float) -> Tensor:
    row = full_map(q, k)[:, :, 0, 1:].mean(1)
    return row.topk(math.ceil(rate * row.shape[1]), dim=-1).indices


def plain_dual_filter(q: Tensor, k: Tensor, keys: Tensor, gamma: float, alpha: float) -> Tensor:
    attention = full_map(q, k, causal=True)[0, :, START + N :, START : START + N].mean(0)
    total, peak = attention.sum(0), attention.amax(0)
    weak = (total < gamma * total.sum()) & (peak < alpha)
    kept = (~weak).nonzero()[:, 0]
    return torch.cat([kept, keys]).unique()


def plain_filter_score(total: Tensor, peak: Tensor, gamma: float, alpha: float) -> Tensor:
    return torch.maximum(total / total.sum() / gamma, peak / alpha)


def plain_cache_policy(
    keeps: list[Tensor], start: int, n: int, text: int, layers: int, cuts: list[int]
) -> list[Tensor | None]:
    steps, alive = [], n
    for keep in keeps:
        head = list(range(start))
        tail = list(range(start + alive, start + alive + text))
        steps.append(head + [start + int(j) for j in keep] + tail)
        alive = len(keep)
    result: list[Tensor | None] = []
    for layer in range(layers):
        later = [i for i, cut in enumerate(cuts) if layer <= cut]
        if layer < cuts[0] or not later:
            result.append(None)
            continue
        whole = steps[-1]
        for i in reversed(later[:-1]):
            whole = [steps[i][j] for j in whole]
        result.append(torch.tensor(whole))
    return result


def plain_dominant(q: Tensor, k: Tensor, count: int) -> Tensor:
    score = full_map(q, k)[:, :, 0, 1:].sum(1)
    best = score.topk(count - 1, dim=-1).indices + 1
    return torch.cat([torch.zeros(len(best), 1, dtype=torch.long), best], dim=1)


def plain_contextual(hidden: Tensor, metric: Tensor, indices: Tensor, count: int) -> Tensor:
    out = []
    for b in range(hidden.shape[0]):
        rest = torch.ones(hidden.shape[1], dtype=torch.bool)
        rest[indices[b]] = False
        x, keys = hidden[b][rest], metric[b][rest]
        keys = keys / keys.norm(dim=-1, keepdim=True)
        is_target = torch.zeros(len(x), dtype=torch.bool)
        is_target[torch.arange(0, len(x), max(1, len(x) // count))[:count]] = True
        nearest = (keys[~is_target] @ keys[is_target].T).argmax(-1)
        member = F.one_hot(nearest, count).to(x)
        mean = member.T @ x[~is_target] / member.sum(0).clamp(min=1)[:, None]
        out.append(x[is_target] + mean)
    return torch.stack(out)


def plain_grid_avg_pool(x: Tensor, p: int) -> Tensor:
    grid = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], SIDE, SIDE)
    return F.avg_pool2d(grid, p).flatten(2).transpose(1, 2)


def plain_flowcut_pack(kept: Tensor, tiles: tuple[int, int], base: int) -> Tensor:
    """Base tile, then the kept patches in raster order of the stitched map: (tile, row)."""
    down, across = tiles
    at = {
        (t // across * SIDE + p // SIDE, t % across * SIDE + p % SIDE): (t + 1, row)
        for t, own in enumerate(kept.tolist())
        for row, p in enumerate(own)
    }
    order = [(0, i) for i in range(base)]
    for y in range(down * SIDE):
        for x in range(across * SIDE):
            if (y, x) in at:
                order.append(at[y, x])
    return torch.tensor(order)


def plain_visionzip_pack(
    dominant: Tensor, contextual: int, tiles: tuple[int, int], base: int
) -> Tensor:
    ascending = dominant.sort(-1).values
    patches = plain_flowcut_pack(ascending[:, 1:] - 1, tiles, 0)
    count = dominant.shape[1]
    order = [(0, i) for i in range(base)]
    order += [(t, row + 1) for t, row in patches.tolist()]
    order += [(t + 1, 0) for t in range(len(dominant))]
    order += [(t + 1, count + c) for t in range(len(dominant)) for c in range(contextual)]
    return torch.tensor(order)


def plain_kmedoids(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [n, d]: start farthest-first, then assign and re-centre over k masked distance maps."""
    distance = torch.cdist(x, x)
    distance.fill_diagonal_(-1)
    medoids = x.norm(dim=-1).argmax()[None]
    for _ in range(k - 1):
        nearest = distance[medoids].min(0).values
        medoids = torch.cat([medoids, nearest.argmax()[None]])
    for _ in range(100):
        assign = distance[medoids].argmin(0)
        member = assign == torch.arange(k)[:, None]
        cost = (distance * member[:, :, None] * member[:, None, :]).sum(-1)
        moved = cost.masked_fill(~member, torch.inf).argmin(-1)
        if torch.equal(moved, medoids):
            break
        medoids = moved
    medoids = medoids.sort().values
    return medoids, distance[medoids].argmin(0)


def plain_spectral_clustering(
    x: Tensor, k: int, neighbours: int, sigma: float
) -> tuple[Tensor, Tensor]:
    """x [n, d]: the graph, a full SVD of its Laplacian, k-medoids on the last k columns."""
    weights = torch.exp(-(torch.cdist(x, x) ** 2) / (2 * sigma**2))
    least = weights.sort(dim=-1, descending=True).values[:, neighbours - 1]
    linked = (weights >= least[:, None]) | (weights >= least[None, :])
    weights = weights * linked
    scale = weights.sum(-1).rsqrt().diag()
    laplacian = scale @ (weights.sum(-1).diag() - weights) @ scale
    rows = torch.linalg.svd(laplacian).U[:, -k:]
    return plain_kmedoids(F.normalize(rows, dim=-1), k)


def plain_evs(x: Tensor, k: int) -> Tensor:
    """x [T, n, d]: the first frame, and the k − n tokens least like the frame before."""
    change = 1 - torch.cosine_similarity(x[1:], x[:-1], dim=-1)
    change = torch.cat([torch.full_like(change[:1], 255), change]).flatten()
    return change.argsort(descending=True, stable=True)[:k].sort().values


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
    return Case(lambda: ops.max_sum(x, K, pivot), lambda: plain_max_sum(x, 7, K))


@entry("k_center", f"{_FEATURES}, k={K}")
def _k_center() -> Case:
    x, pivot = features(), torch.tensor(7)
    return Case(lambda: ops.k_center(x, K, pivot), lambda: plain_k_center(x, 7, K))


@entry("kmedoids", f"{_FEATURES}, k={K}")
def _kmedoids() -> Case:
    x = features()
    return Case(lambda: tuple(ops.kmedoids(x, K)), lambda: plain_kmedoids(x, K))


@entry("spectral_clustering", f"16 blobs, 3 frames × 49×{D}, k=16")
def _spectral() -> Case:
    g = _generator(6)  # far blobs: what the graph says is beyond doubt
    home = torch.arange(147) % 16
    x = torch.randn(16, D, generator=g)[home] + 0.02 * torch.randn(147, D, generator=g)

    def parts(assign: Tensor) -> Tensor:  # rows of a blob are alike: any of them may be the medoid
        return (assign[:, None] == assign[None, :]).long()

    return Case(
        lambda: parts(ops.spectral_clustering(x, 16, neighbours=15, sigma=10.0).assign),
        lambda: parts(plain_spectral_clustering(x, 16, 15, 10.0)[1]),
    )


@entry("evs", f"8 frames of 196×{D}, k=470")
def _evs() -> Case:
    g = _generator(7)
    x = torch.randn(196, D, generator=g) + torch.randn(8, 196, D, generator=g).cumsum(0) * 0.3
    return Case(lambda: ops.evs(x, 470), lambda: plain_evs(x, 470))


@entry("divprune", f"{_FEATURES}, k={K}")
def _divprune() -> Case:
    x = features()
    return Case(lambda: ops.divprune(x, K), lambda: plain_divprune(x, K))


@entry("cls_pivot", f"q, k {_CLIP}")
def _cls_pivot() -> Case:
    q, k, _ = clip_qkv()

    def ours() -> Tensor:
        row = ops.attention_rows(q[:, :, :1], k)[:, :, 0]
        return ops.cls_pivot(ops.cls_scores(row))

    return Case(ours, lambda: plain_cls_pivot(q, k))


@entry("farthest_pivot", _FEATURES)
def _farthest_pivot() -> Case:
    x = features()
    return Case(lambda: ops.farthest_pivot(x), lambda: plain_farthest_pivot(x))


@entry("cross_modal_ratio", f"q, k {_DECODER}, {TEXT} text rows")
def _cross_modal_ratio() -> Case:
    q, k, _ = decoder_qkv()
    segment = torch.full((1, L), 3)
    segment[:, :START] = 1
    segment[:, START : START + N] = 2
    return Case(
        lambda: ops.cross_modal_ratio(q, k, segment),
        lambda: plain_cross_modal_ratio(q, k, segment),
    )


def _transitions(tokens: int, width: int) -> Case:
    g = _generator(1)
    before = torch.randn(1, tokens, width, generator=g)
    after = 0.4 * before + torch.randn(1, tokens, width, generator=g)
    return Case(
        lambda: ops.transition_weight(before, after),
        lambda: plain_transition_weight(before, after),
    )


@entry("transition_weight", _FEATURES)
def _transition_weight() -> Case:
    return _transitions(N, D)


@entry("transition_weight (7B)", f"{L}×{DH * DD}")
def _transition_weight_7b() -> Case:
    return _transitions(L, DH * DD)


@entry("instruction_attention", f"q, k {_DECODER}, {TEXT} rows")
def _instruction_attention() -> Case:
    q, k, _ = decoder_qkv()
    return Case(
        lambda: ops.instruction_attention(q[0, :, START + N :], k[0], START, N),
        lambda: plain_instruction_attention(q, k, START, N),
    )


@entry("transition_score", f"6 layers, {N} tokens")
def _transition_score() -> Case:
    g = _generator(2)
    ttv = [torch.rand(1, N, generator=g) for _ in range(6)]
    iga = torch.rand(1, N, generator=g).softmax(-1)
    return Case(
        lambda: ops.transition_score(ttv, iga), lambda: plain_transition_score(ttv, iga, 0.5)
    )


@entry("fastv_select", f"q, k {_DECODER}, k={K}")
def _fastv() -> Case:
    q, k, _ = decoder_qkv()

    def ours() -> Tensor:
        row = ops.attention_rows(q[0, :, -1:], k[0])[:, 0]
        return ops.fastv_select(row, START, N, K)

    return Case(ours, lambda: plain_fastv(q, k, START, N, K))


@entry("segment_topk", f"4 prompts of {2 * N + 64}, 2 images each")
def _segment_topk() -> Case:
    score = torch.rand(4, 2 * N + 64, generator=_generator(3))
    segment = torch.full(score.shape, -1)
    segment[:, 20 : 20 + N] = 0
    segment[:, 40 + N : 40 + 2 * N] = 1
    budget = torch.full((4, 2), K)
    return Case(
        lambda: ops.segment_topk(score, segment, budget),
        lambda: plain_segment_topk(score, segment, budget),
    )


@entry("attn_terms", f"q, k, v {_CLIP}")
def _attn_terms() -> Case:
    q, k, v = clip_qkv()
    return Case(lambda: tuple(ops.attn_terms(q, k, v)), lambda: plain_attn_terms(q, k, v))


@entry("flow_score", f"{N} tokens, d={HD}")
def _flow_score() -> Case:
    terms = plain_attn_terms(*clip_qkv())
    return Case(lambda: ops.flow_score(*terms), lambda: plain_flow_score(*terms))


@entry("prune_count", f"4 images of {N}")
def _prune_count() -> Case:
    a = torch.randn(4, N, generator=_generator(4)).mul(2).softmax(-1)
    return Case(
        lambda: ops.prune_count(a, 10, K, reduce="batch"), lambda: plain_prune_count(a, 10, K)
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

    return Case(ours, lambda: plain_encoder_keep(e, a, 10, K))


@entry("global_query_terms", f"q, k, v {H}×{N}×{HD}")
def _global_query() -> Case:
    q, k, v = (t[:, :, 1:].contiguous() for t in clip_qkv())
    return Case(lambda: tuple(ops.global_query_terms(q, k, v)), lambda: plain_global_query(q, k, v))


@entry("llm_select", f"q, k, v {_DECODER}, k={K}")
def _llm_select() -> Case:
    q, k, v = decoder_qkv()
    return Case(
        lambda: ops.llm_select(q, k, v, START, N, L - 1, K),
        lambda: plain_llm_select(q, k, v, START, N, L - 1, K),
    )


def _metric(width: int = D) -> Tensor:
    return features(5, N + 1, width)[None]


def _lists(plan: ops.MergePlan | None) -> Plan4:
    assert plan is not None
    return plan.keep, plan.src, plan.dst, plan.slot


@entry("bipartite_soft_matching", f"{N + 1}×{HD}, r=16")
def _bsm() -> Case:
    x = _metric(HD)
    return Case(
        lambda: _lists(ops.bipartite_soft_matching(x, 16, class_token=True)),
        lambda: plain_bsm(x, 16),
    )


@entry("ratio_bsm", f"{N + 1}×{D}, ratio 0.9")
def _ratio_bsm() -> Case:
    x = _metric()
    r = math.floor((N + 1) - (N + 1) * 0.9)
    return Case(lambda: _lists(ops.ratio_bsm(x, 0.9, class_token=True)), lambda: plain_bsm(x, r))


def _pitome(kind: Any) -> Case:
    x = _metric()
    return Case(
        lambda: _lists(ops.pitome(x, 0.9, margin=0.4, kind=kind, class_token=True)),
        lambda: plain_pitome(x, 0.9, 0.4, kind),
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
        lambda: plain_energy_bsm(x, 0.9, 0.4, "elu"),
    )


def _plan() -> ops.MergePlan:
    plan = ops.pitome(_metric(), 0.9, margin=0.4, class_token=True)
    assert plan is not None
    return plan


@entry("MergePlan.apply", f"{N + 1}×{D}, mean")
def _apply() -> Case:
    x, plan = _metric(), _plan()
    lists = _lists(plan)
    return Case(lambda: plan.apply(x), lambda: plain_apply(x, lists))


@entry("MergePlan.weighted", f"{N + 1}×{D}")
def _weighted() -> Case:
    x, plan = _metric(), _plan()
    lists = _lists(plan)
    size = 1 + torch.randint(0, 4, (1, N + 1, 1), generator=_generator(6)).float()
    return Case(lambda: plan.weighted(x, size), lambda: plain_weighted(x, size, lists))


@entry("MergePlan.group + compose", f"{N + 1} rows from {N + 1} tokens")
def _tracking() -> Case:
    plan = _plan()
    lists = _lists(plan)
    first = torch.randperm(N + 1, generator=_generator(7))[None]
    source = F.one_hot(first).float().transpose(1, 2)  # [1, T_now, T_0]
    return Case(
        lambda: ops.compose_groups(first, plan.group()),
        # compared as group numbers; the matrix itself is what the plain way keeps
        lambda: plain_tracking(source, lists).argmax(1),
    )


@entry("spectral_distance", f"{_FEATURES}, 288 groups, float64")
def _spectral() -> Case:
    x = features(8)
    group = torch.arange(N) % 288
    return Case(lambda: ops.spectral_distance(x, group), lambda: plain_spectral(x, group))


@entry("spatial_merge", f"1+{N}×{D}, 3×3 windows")
def _spatial_merge() -> Case:
    x = windows()

    def ours() -> tuple[Tensor, Tensor]:
        merged = ops.spatial_merge(x, 0.8)
        return merged.out, merged.dst

    return Case(ours, lambda: plain_spatial_merge(x, 0.8, 3))


@entry("key_tokens", f"q, k {_CLIP}")
def _key_tokens() -> Case:
    q, k, _ = clip_qkv()

    def ours() -> Tensor:
        return ops.key_tokens(ops.attention_rows(q[:, :, :1], k)[:, :, 0])

    return Case(ours, lambda: plain_key_tokens(q, k, 0.08))


@entry("dual_filter", f"q, k {_DECODER}, {TEXT} rows")
def _dual_filter() -> Case:
    q, k, _ = decoder_qkv()
    keys = torch.randperm(N, generator=_generator(9))[:47]
    position = torch.arange(L)
    allowed = position <= position[START + N :, None]

    def ours() -> Tensor:
        rows = ops.attention_rows(q[0, :, START + N :], k[0], allowed=allowed)
        keep = ops.dual_filter(
            rows[..., START : START + N], ops.key_mask(keys, N), gamma=0.0012, alpha=0.01
        )
        return keep.nonzero()[:, 0]

    return Case(ours, lambda: plain_dual_filter(q, k, keys, 0.0012, 0.01))


@entry("filter_score", f"{N} tokens")
def _filter_score() -> Case:
    g = _generator(10)
    total, peak = torch.rand(N, generator=g), torch.rand(N, generator=g)
    return Case(
        lambda: ops.filter_score(total, peak, 0.0012, 0.001),
        lambda: plain_filter_score(total, peak, 0.0012, 0.001),
    )


@entry("cache_policy", "32 layers, 4 cuts, 576 → 64")
def _cache_policy() -> Case:
    g, counts, n = _generator(11), (300, 180, 100, 64), N
    keeps = []
    for count in counts:
        keeps.append(torch.randperm(n, generator=g)[:count].sort().values)
        n = count
    cuts = [2, 6, 10, 14]
    return Case(
        lambda: ops.cache_policy(keeps, START, N, TEXT, 32, cuts),
        lambda: plain_cache_policy(keeps, START, N, TEXT, 32, cuts),
    )


@entry("visionzip_dominant", f"q, k {_CLIP}, 54 tokens")
def _dominant() -> Case:
    q, k, _ = clip_qkv()

    def ours() -> Tensor:
        return ops.visionzip_dominant(ops.attention_rows(q[:, :, :1], k)[:, :, 0], 54)

    return Case(ours, lambda: plain_dominant(q, k, 54))


@entry("visionzip_contextual", f"{N + 1}×{D}, 54 + 10 tokens")
def _contextual() -> Case:
    hidden, metric = _metric(), _metric(HD)
    indices = torch.randperm(N, generator=_generator(12))[:53] + 1
    indices = F.pad(indices, (1, 0))[None]
    return Case(
        lambda: ops.visionzip_contextual(hidden, metric, indices, 10).out,
        lambda: plain_contextual(hidden, metric, indices, 10),
    )


@entry("grid_avg_pool", f"{_FEATURES} → 64")
def _grid_avg_pool() -> Case:
    x = features()[None]
    return Case(lambda: ops.grid_avg_pool(x, 64), lambda: plain_grid_avg_pool(x, 3))


def _kept_patches(count: int) -> Tensor:
    g = _generator(13)
    return torch.stack([torch.randperm(N, generator=g)[:count].sort().values for _ in range(4)])


@entry("flowcut_pack", "2×2 crops + base, 160 patches each")
def _flowcut_pack() -> Case:
    kept = _kept_patches(160)
    return Case(
        lambda: ops.flowcut_pack(kept, (2, 2)), lambda: plain_flowcut_pack(kept, (2, 2), 160)
    )


@entry("visionzip_pack", "2×2 crops + base, 54 + 10 tokens each")
def _visionzip_pack() -> Case:
    dominant = F.pad(_kept_patches(53) + 1, (1, 0))
    return Case(
        lambda: ops.visionzip_pack(dominant, 10, (2, 2)),
        lambda: plain_visionzip_pack(dominant, 10, (2, 2), 64),
    )


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


# --------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "section", nargs="?", default="all", choices=("operators", "methods", "all")
    )
    parser.add_argument("--quick", action="store_true", help="small model, few repeats")
    parser.add_argument("--only", help="operators or methods, separated by commas")
    parser.add_argument("--repeats", type=int, help="rounds (operators: 21, methods: 5)")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=tuple(CLOCKS),
        help="cpu: time spent by this process, for a machine that others use too",
    )
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()

    import transformers
    from _replay import labels, measure_methods, method_tables
    from rich.console import Console

    wanted = None if options.only is None else [n.strip() for n in options.only.split(",")]
    operators, methods = list(ENTRIES), labels()
    if wanted is not None:
        unknown = [n for n in wanted if n not in operators and n not in methods]
        if unknown:
            parser.error(f"--only {unknown[0]!r} is neither of {operators} nor of {methods}")
        operators = [n for n in operators if n in wanted]
        methods = [n for n in methods if n in wanted]
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
    if options.section != "methods" and operators:
        repeats = options.repeats or (5 if options.quick else 21)
        cap = 1.0 if options.quick else 12.0
        report["operators"] = measure_operators(operators, repeats, cap, options.clock)
        console.print(operator_table(report["operators"]))
    if options.section != "operators" and methods:
        repeats = options.repeats or (2 if options.quick else 5)
        report["methods"] = measure_methods(methods, repeats, options.quick, options.clock)
        for part in method_tables(report["methods"]):
            console.print(part)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
