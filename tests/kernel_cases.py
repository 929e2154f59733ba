"""What each Triton kernel is compared on with its plain form: random arguments of the operators.

Most features are ±1 in 16 or 64 dimensions: their norm is a power of two, so cosines, sums and
products are exact in any order and equal ones are exactly equal. Where that cannot be, numbers are
continuous and only float results may differ, by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from torch import Tensor

MODULES = ("attention", "bipartite", "coverage", "diversity", "dpp", "rows")
KERNELS = ("coverage", "dpp", "gather", "greedy", "match", "received", "steps")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Draw = Callable[[Any], Any]


def operators(name: str) -> Any:
    return import_module(f"tokprune.operators.{name}")


@contextmanager
def plain() -> Iterator[None]:
    """Operators use PyTorch alone."""
    with ExitStack() as stack:
        for name in MODULES:
            stack.enter_context(patch.object(operators(name), "available", lambda *x: False))
        yield


@contextmanager
def kernels() -> Iterator[None]:
    """Operators use their kernels, on any device, and at least one is launched."""
    launches: list[str] = []
    with ExitStack() as stack:
        for name in MODULES:
            stack.enter_context(patch.object(operators(name), "available", lambda *x: True))
        for name in KERNELS:
            module = operators(f"kernels.{name}")

            def counted(x: Tensor, name: str = name, was: Any = module.on_device) -> Any:
                launches.append(name)
                return was(x)

            stack.enter_context(patch.object(module, "on_device", counted))
        yield
    assert launches, "no kernel ran"


def compare(call: Callable[[], Any], rounding: bool = False) -> None:
    """Plain code and kernels give the same; on a GPU the kernels never wait for it."""
    with plain():
        want = call()
    with kernels():
        got = call()
        if (want if isinstance(want, Tensor) else want[0]).is_cuda:  # compiled now
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = call()
            finally:
                torch.cuda.set_sync_debug_mode(before)
    pairs = [(got, want)] if isinstance(want, Tensor) else list(zip(got, want, strict=True))
    for new, old in pairs:
        assert new.dtype == old.dtype
        assert new.shape == old.shape
        if rounding and old.is_floating_point():
            torch.testing.assert_close(new, old, rtol=2e-5, atol=1e-6, equal_nan=True)
        else:
            assert torch.equal(new, old), (new, old)


# -------------------------------------------------------------------------------- arguments


def generator(draw: Draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 10_000)))


def signs(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=g) * 2.0 - 1


def share(g: torch.Generator, *shape: int, of: float = 0.7) -> Tensor:
    """bool; at least the last entry of each row is True."""
    mask = torch.rand(*shape, generator=g) < of
    mask[..., -1] = True
    return mask


def points(draw: Draw) -> tuple[Tensor, int, torch.Generator]:
    """Features x, k and a generator; k = 1 and k = n come up often."""
    g = generator(draw)
    n = draw(st.one_of(st.sampled_from([2, 16, 17, 70]), st.integers(2, 40)))
    few = min(n, 40)
    k = draw(st.one_of(st.sampled_from([1, few]), st.integers(1, few)))
    lead = draw(st.sampled_from([(), (2,), (1, 3)]))
    return signs(g, *lead, n, 16).to(draw(st.sampled_from(FLOATS))), k, g


def variants(x: Tensor, g: torch.Generator, device: str) -> list[tuple[Tensor, Tensor | None]]:
    """Features and candidates: all of them, some of them, and with a row that is NaN."""
    candidates = share(g, *x.shape[:-1]).to(device)
    broken = x.clone()
    broken[..., x.shape[-2] // 2, :] = torch.nan
    x, broken = x.to(device), broken.to(device)
    return [(x, None), (x, candidates), (broken, None), (broken, candidates)]


def pivots(g: torch.Generator, x: Tensor, device: str) -> Tensor:
    return torch.randint(x.shape[-2], x.shape[:-2], generator=g).to(device)


# ------------------------------------------------------------------------------------ cases


@contextmanager
def without_gram(on: bool) -> Iterator[None]:
    """Sets count as too long for a Gram matrix."""
    with ExitStack() as stack:
        for name in ("diversity", "dpp") if on else ():
            stack.enter_context(patch.object(operators(name), "GRAM_LIMIT", 0))
        yield


def by_gram_and_features(call: Callable[[], Any]) -> None:
    for features in (False, True):
        with without_gram(features):
            compare(call)


def k_center(draw: Draw, device: str) -> None:
    x, k, g = points(draw)
    pivot, k = pivots(g, x, device), max(k, 2)  # with 1 there is nothing to do
    for y, candidates in variants(x, g, device):
        by_gram_and_features(
            lambda y=y, c=candidates: operators("diversity").k_center(y, k, pivot, c)
        )
        # powers of two, so that products are exact
        weight = 2.0 ** torch.randint(-2, 2, y.shape[:-1], generator=g).to(device)
        compare(
            lambda y=y, c=candidates, w=weight: operators("diversity").k_center(y, k, pivot, c, w)
        )


def max_sum(draw: Draw, device: str) -> None:
    x, k, g = points(draw)
    pivot, k = pivots(g, x, device), max(k, 2)
    for y, candidates in variants(x, g, device):
        by_gram_and_features(
            lambda y=y, c=candidates: operators("diversity").max_sum(y, k, pivot, c)
        )


def divprune(draw: Draw, device: str) -> None:
    x, k, g = points(draw)
    for y, candidates in variants(x, g, device):
        compare(lambda y=y, c=candidates: operators("diversity").divprune(y, k, c))
        with without_gram(True):
            compare(lambda y=y, c=candidates: operators("diversity").divprune(y, max(k, 2), c))


def k_center_from_distance(draw: Draw, device: str) -> None:
    g = generator(draw)
    n = draw(st.integers(2, 70))
    k = draw(st.one_of(st.sampled_from([1, n]), st.integers(1, n)))
    distance = torch.randint(-3, 9, (2, n, n), generator=g) / 8
    odd = draw(st.sampled_from([0.0, -0.0, torch.inf, -torch.inf, torch.nan]))
    distance[:, n // 2, n // 3] = odd
    distance = distance.to(draw(st.sampled_from(FLOATS))).to(device)
    pivot = torch.randint(n, (2,), generator=g).to(device)
    compare(lambda: operators("diversity").k_center_from_distance(distance, k, pivot))


def dpp_map(draw: Draw, device: str) -> None:
    """The second half repeats the first, so that of equal gains the lower index counts; k is at
    most the number of different tokens, behind which gains are rounding noise."""
    g = generator(draw)
    half = draw(st.one_of(st.just(30), st.integers(2, 30)))
    x = torch.randn(2, half, 64, generator=g).repeat(1, 2, 1).to(device)
    relevance = (torch.rand(2, half, generator=g) * 0.9 + 0.1).repeat(1, 2).to(device)
    some = share(g, 2, 2 * half)
    there = int((some[:, :half] | some[:, half:]).sum(-1).amin())
    for candidates, most in ((None, half), (some.to(device), there)):
        k = draw(st.one_of(st.just(most), st.integers(1, most)))
        for r in (None, relevance):
            by_gram_and_features(
                lambda k=k, r=r, c=candidates: operators("dpp").dpp_map(x, k, r, c)
            )


def dpp_map_not_finite(draw: Draw, device: str) -> None:
    """Kernels with NaN and, as rounding leaves them, with gains of 0 and below."""
    g = generator(draw)
    kernel = torch.eye(20).repeat(2, 1, 1)
    kernel[:, 3, 11] = kernel[:, 11, 3] = draw(st.sampled_from([torch.nan, 0.5, 0.0]))
    kernel[1, 7, 7] = draw(st.sampled_from([torch.nan, 2.0, 0.0, -1.0]))
    used_up = torch.tensor([[0.0, 0.75, 0.0], [0.75, -1.0, 0.5], [0.0, 0.5, -1.25]])
    kernel[:, -3:, -3:] = used_up  # the first must not change the other two
    kernel = kernel.to(draw(st.sampled_from(FLOATS))).to(device)
    k = draw(st.one_of(st.just(20), st.integers(1, 20)))
    for candidates in (None, share(g, 2, 20).to(device)):
        compare(lambda c=candidates: operators("dpp").dpp_map_from_kernel(kernel, k, c))


def dpp_map_beyond_the_rank(draw: Draw, device: str) -> None:
    """What is left is rounding noise, but no token comes twice."""
    x = torch.randn(2, 24, 3, generator=generator(draw)).to(device)
    for features in (False, True):
        with without_gram(features), kernels():
            order = operators("dpp").dpp_map(x, 24)
        assert torch.equal(order.sort(-1).values, torch.arange(24, device=device).expand(2, -1))


def coverage(draw: Draw, device: str) -> None:
    x, k, g = points(draw)
    saliency = torch.randint(0, 9, x.shape[:-1], generator=g).to(device) / 8
    alpha = draw(st.sampled_from([0.0, 1.0, 2.0]))
    select = operators("coverage").coverage
    for at, (y, candidates) in enumerate(variants(x, g, device)):
        combine = ("multi", "add")[(at + k) % 2]
        compare(lambda y=y, c=candidates, how=combine: select(y, k, saliency, alpha, how, c))


def bipartite_soft_matching(draw: Draw, device: str) -> None:
    g = generator(draw)
    tokens = draw(st.one_of(st.sampled_from([4, 5, 130, 300]), st.integers(4, 140)))
    metric = signs(g, draw(st.integers(1, 3)), tokens, draw(st.sampled_from([4, 16, 64])))
    metric = metric.to(draw(st.sampled_from(FLOATS[:3])))
    broken = metric.clone()
    broken[0, tokens // 2] = torch.nan
    match = operators("bipartite").bipartite_soft_matching

    def call(x: Tensor, class_token: bool, distill: bool) -> tuple[Tensor, ...]:
        plan = match(x, (tokens - class_token - distill) // 2, class_token, distill)
        return plan.keep, plan.src, plan.dst, plan.slot

    for x in (metric.to(device), broken.to(device)):
        for tokens_aside in ((False, False), (True, False), (False, True), (True, True)):
            compare(lambda x=x, aside=tokens_aside: call(x, *aside))


def best_match(draw: Draw, device: str) -> None:
    g = generator(draw)
    unit = (signs(g, 2, 90, 16) / 4).to(device)
    src = torch.randint(90, (2, draw(st.integers(1, 70))), generator=g).to(device)
    dst = torch.randint(90, (2, draw(st.integers(1, 70))), generator=g).to(device)
    compare(lambda: operators("bipartite").best_match(unit, src, dst))


def received_attention(draw: Draw, device: str) -> None:
    g = generator(draw)
    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    keys = draw(st.one_of(st.sampled_from([1, 64, 65]), st.integers(1, 100)))
    rows = draw(st.integers(1, keys))
    width = draw(st.sampled_from([1, 8, 20, 40]))
    dtype = draw(st.sampled_from(FLOATS))
    q = torch.randn(2, rows, key_heads * group, width, generator=g).to(dtype).to(device)
    k = torch.randn(2, keys, key_heads, width, generator=g).to(dtype).to(device)
    broken = k.clone()
    broken[0, keys // 2] = torch.nan
    place = torch.randint(keys, (2, rows), generator=g).to(device)
    masks = {
        "key_valid": share(g, 2, keys).to(device), "row_valid": share(g, 2, rows).to(device),
    }  # fmt: skip
    padded = torch.arange(keys).ge(keys // 2).expand(2, -1).to(device)  # whole blocks of keys
    receive = operators("attention").received_attention
    for options in (
        {},
        {"causal": True, "scaling": 0.7},
        {"others_only": True, "softcap": 2.0, "place": place},
        {"causal": True, "place": place, **masks},
        {"causal": True, "others_only": True, "softcap": 2.0, **masks},
        {"key_valid": padded, "row_valid": masks["row_valid"]},
    ):
        compare(lambda o=options: receive(q.transpose(1, 2), k.transpose(1, 2), **o), rounding=True)
    compare(lambda: receive(q.transpose(1, 2), broken.transpose(1, 2), **masks), rounding=True)


def gather_rows(draw: Draw, device: str) -> None:
    g = generator(draw)
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    index = torch.randint(-1, length, (batch, draw(st.integers(1, 25))), generator=g).to(device)
    base = torch.randn(batch + 1, length, 30, generator=g).to(device)
    tensors = [
        base[1:].to(draw(st.sampled_from(FLOATS))),
        base[1:, :, 1:4],
        base[:1, :, 5:9].expand(batch, -1, -1),
        base[1:] > 0,
        (base[1:] * 100).long()[..., 0],
        (base.permute(2, 0, 1)[:, 1:] * 9).to(torch.int32).permute(1, 2, 0),
        base[1:].reshape(batch, length, 2, 15).to(torch.bfloat16),
        torch.randn(batch, length, 1200, generator=g).half().to(device),
    ]
    number = draw(st.integers(1, len(tensors)))
    compare(lambda: operators("rows").gather_rows(tensors[-number:], index))


#: case → how many examples of it
CASES: dict[str, tuple[Callable[[Draw, str], None], int]] = {
    "k_center": (k_center, 4),
    "max_sum": (max_sum, 4),
    "divprune": (divprune, 3),
    "k_center_from_distance": (k_center_from_distance, 8),
    "dpp_map": (dpp_map, 4),
    "dpp_map_not_finite": (dpp_map_not_finite, 5),
    "dpp_map_beyond_the_rank": (dpp_map_beyond_the_rank, 3),
    "coverage": (coverage, 4),
    "bipartite_soft_matching": (bipartite_soft_matching, 6),
    "best_match": (best_match, 8),
    "received_attention": (received_attention, 3),
    "gather_rows": (gather_rows, 15),
}


def extremes(device: str) -> None:
    """The smallest set, and the largest of each path with a few picks."""
    g = torch.Generator().manual_seed(0)
    diversity, dpp = operators("diversity"), operators("dpp")
    one = torch.ones(1, 1, 4, device=device)
    compare(lambda: diversity.divprune(one, 1))
    compare(lambda: dpp.dpp_map(one, 1))
    compare(lambda: operators("coverage").coverage(one, 1))
    for n, k in ((4096, 3), (16384, 2)):
        x = signs(g, 1, n, 64).to(device)
        pivot = torch.tensor([n - 1], device=device)
        candidates = share(g, 1, n).to(device)
        compare(lambda x=x, k=k, p=pivot, c=candidates: diversity.k_center(x, k, p, c))
    x = torch.randn(1, 4200, 24, generator=g).to(device)
    compare(lambda: dpp.dpp_map(x, 3))
    x = signs(g, 1, 1100, 64).to(device)
    compare(lambda: diversity.divprune(x, 4))
    compare(lambda: operators("coverage").coverage(x, 2))
    kernel = dpp.conditional_kernel(torch.randn(1, 1100, 24, generator=g).to(device))
    compare(lambda: dpp.dpp_map_from_kernel(kernel, 4))
    distance = torch.randint(9, (1, 5000, 5000), generator=g).to(torch.bfloat16).to(device)
    first = torch.tensor([7], device=device)
    compare(lambda: diversity.k_center_from_distance(distance, 4, first))
