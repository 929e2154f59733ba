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


def points(draw: Draw, device: str, most: int = 80) -> tuple[Tensor, int, Tensor | None, Any]:
    """Features x, k, candidates and a generator; k = 1 and k = n come up often."""
    g = generator(draw)
    n = draw(st.one_of(st.sampled_from([1, 2, 16, 17, most]), st.integers(1, most)))
    k = draw(st.one_of(st.sampled_from([1, n]), st.integers(1, n)))
    lead = draw(st.sampled_from([(), (2,), (1, 3)]))
    x = signs(g, *lead, n, 16).to(draw(st.sampled_from(FLOATS)))
    if draw(st.integers(0, 7)) == 0:
        x[..., n // 2, :] = torch.nan
    candidates = share(g, *lead, n).to(device) if draw(st.booleans()) else None
    return x.to(device), k, candidates, g


def pivots(g: torch.Generator, x: Tensor) -> Tensor:
    return torch.randint(x.shape[-2], x.shape[:-2], generator=g).to(x.device)


# ------------------------------------------------------------------------------------ cases


def without_gram(on: bool) -> Any:
    """Sets count as too long for a Gram matrix."""
    stack = ExitStack()
    if on:
        for name in ("diversity", "dpp"):
            stack.enter_context(patch.object(operators(name), "GRAM_LIMIT", 0))
    return stack


def k_center(draw: Draw, device: str) -> None:
    x, k, candidates, g = points(draw, device)
    pivot = pivots(g, x)
    if k > 1:
        with without_gram(draw(st.booleans())):
            compare(lambda: operators("diversity").k_center(x, k, pivot, candidates))


def max_sum(draw: Draw, device: str) -> None:
    x, k, candidates, g = points(draw, device)
    pivot = pivots(g, x)
    if k > 1:
        with without_gram(draw(st.booleans())):
            compare(lambda: operators("diversity").max_sum(x, k, pivot, candidates))


def divprune(draw: Draw, device: str) -> None:
    x, k, candidates, _ = points(draw, device)
    with without_gram(draw(st.booleans())):
        if k > 1:
            compare(lambda: operators("diversity").divprune(x, k, candidates))


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
    half = draw(st.one_of(st.sampled_from([1, 30]), st.integers(1, 30)))
    x = torch.randn(2, half, 64, generator=g).repeat(1, 2, 1).to(device)
    candidates, relevance, most = None, None, half
    if draw(st.booleans()):
        mask = share(g, 2, 2 * half)
        most = int((mask[:, :half] | mask[:, half:]).sum(-1).amin())
        candidates = mask.to(device)
    if draw(st.booleans()):
        relevance = (torch.rand(2, half, generator=g) * 0.9 + 0.1).repeat(1, 2).to(device)
    k = draw(st.one_of(st.sampled_from([1, most]), st.integers(1, most)))
    with without_gram(draw(st.booleans())):
        compare(lambda: operators("dpp").dpp_map(x, k, relevance, candidates))


def dpp_map_not_finite(draw: Draw, device: str) -> None:
    g = generator(draw)
    kernel = torch.eye(20).repeat(2, 1, 1)
    kernel[:, 3, 11] = kernel[:, 11, 3] = draw(st.sampled_from([torch.nan, 0.5, 0.0]))
    kernel[1, 7, 7] = draw(st.sampled_from([torch.nan, 2.0, 0.0, -1.0]))
    kernel = kernel.to(draw(st.sampled_from(FLOATS))).to(device)
    candidates = share(g, 2, 20).to(device)
    k = draw(st.integers(1, 20))
    compare(lambda: operators("dpp").dpp_map_from_kernel(kernel, k, candidates))


def coverage(draw: Draw, device: str) -> None:
    x, k, candidates, g = points(draw, device, most=60)
    saliency = torch.randint(0, 9, x.shape[:-1], generator=g).to(device) / 8
    alpha = draw(st.sampled_from([0.0, 1.0, 2.0]))
    combine = draw(st.sampled_from(["multi", "add"]))
    select = operators("coverage").coverage
    compare(lambda: select(x, k, saliency, alpha, combine, candidates))


def bipartite_soft_matching(draw: Draw, device: str) -> None:
    g = generator(draw)
    tokens = draw(st.one_of(st.sampled_from([4, 5, 130, 300]), st.integers(4, 140)))
    metric = signs(g, draw(st.integers(1, 3)), tokens, draw(st.sampled_from([4, 16, 64])))
    if draw(st.integers(0, 5)) == 0:
        metric[0, tokens // 2] = torch.nan
    metric = metric.to(draw(st.sampled_from(FLOATS[:3]))).to(device)
    class_token, distill = draw(st.booleans()), draw(st.booleans())
    r = draw(st.integers(1, max(1, (tokens - class_token - distill) // 2)))

    def call() -> tuple[Tensor, ...]:
        match = operators("bipartite").bipartite_soft_matching
        plan = match(metric, r, class_token, distill)
        return plan.keep, plan.src, plan.dst, plan.slot

    compare(call)


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
    strange = draw(st.booleans())
    q = torch.randn(2, rows, key_heads * group, width, generator=g).to(dtype).to(device)
    k = torch.randn(2, keys, key_heads, width, generator=g).to(dtype).to(device)
    place = torch.randint(keys, (2, rows), generator=g).to(device) if strange else None
    key_valid = share(g, 2, keys).to(device) if draw(st.booleans()) else None
    row_valid = share(g, 2, rows).to(device) if draw(st.booleans()) else None
    if draw(st.integers(0, 5)) == 0:
        k[0, keys // 2] = torch.nan
    options = {
        "scaling": draw(st.sampled_from([None, 0.7])),
        "causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "others_only": draw(st.booleans()),
    }
    compare(
        lambda: operators("attention").received_attention(
            q.transpose(1, 2), k.transpose(1, 2), place=place, key_valid=key_valid,
            row_valid=row_valid, **options,
        ),
        rounding=True,
    )  # fmt: skip


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
    "k_center": (k_center, 14),
    "max_sum": (max_sum, 14),
    "divprune": (divprune, 12),
    "k_center_from_distance": (k_center_from_distance, 12),
    "dpp_map": (dpp_map, 18),
    "dpp_map_not_finite": (dpp_map_not_finite, 10),
    "coverage": (coverage, 12),
    "bipartite_soft_matching": (bipartite_soft_matching, 20),
    "best_match": (best_match, 8),
    "received_attention": (received_attention, 20),
    "gather_rows": (gather_rows, 15),
}


def large(device: str) -> None:
    """The largest sets of each path, a few picks of each."""
    g = torch.Generator().manual_seed(0)
    diversity, dpp = operators("diversity"), operators("dpp")
    for n in (1500, 4096, 16384):
        x = signs(g, 1, n, 64).to(device)
        pivot = torch.tensor([n - 1], device=device)
        candidates = share(g, 1, n).to(device)
        compare(lambda x=x, p=pivot, c=candidates: diversity.k_center(x, 3, p, c))
    compare(lambda: diversity.max_sum(x, 2, pivot))
    x = torch.randn(1, 4200, 24, generator=g).to(device)
    compare(lambda: dpp.dpp_map(x, 4))
    x = signs(g, 1, 1100, 64).to(device)
    compare(lambda: diversity.divprune(x, 4))
    compare(lambda: operators("coverage").coverage(x, 3))
    kernel = dpp.conditional_kernel(torch.randn(1, 1100, 24, generator=g).to(device))
    compare(lambda: dpp.dpp_map_from_kernel(kernel, 4))
    distance = torch.randint(9, (1, 5000, 5000), generator=g).to(torch.bfloat16).to(device)
    first = torch.tensor([7], device=device)
    compare(lambda: diversity.k_center_from_distance(distance, 4, first))
