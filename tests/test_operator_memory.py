"""Operators on as many tokens as a long video has hold no map of all pairs that they can spare.

What counts are the bytes of live tensors, found without any values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor

from tokprune.operators.attention import received_attention
from tokprune.operators.coverage import coverage
from tokprune.operators.diversity import divprune, k_center, max_sum
from tokprune.operators.dpp import dpp_map
from tokprune.operators.kmedoids import kmedoids
from tokprune.operators.score import salient_k_center
from tokprune.operators.sieve import unexplained_and_diverse
from tokprune.operators.tops import preservation_set

TOKENS = 16384


def first(x: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.long, device=x.device)


#: ones whose definition needs a token's distance to all others, but not all distances at once
SELECTIONS: dict[str, Callable[[Tensor], Any]] = {
    "divprune": lambda x: divprune(x, 8),
    "max_sum": lambda x: max_sum(x, 8, first(x)),
    "k_center": lambda x: k_center(x, 8, first(x)),
    "dpp_map": lambda x: dpp_map(x, 8, torch.ones_like(x[..., 0])),
    "coverage": lambda x: coverage(x, 8),
    "unexplained_and_diverse": lambda x: unexplained_and_diverse(x, x[..., 0], x[..., 0], 8),
    "salient_k_center": lambda x: salient_k_center(x, x[..., 0], 8),
    "received_attention": lambda x: received_attention(x[None], x[None], causal=True),
}


def peak(run: Callable[[Tensor], Any], tokens: int, device: str = "meta") -> int:
    x = torch.ones(1, tokens, 16, device=device)
    with LiveBytes() as live:
        run(x)
    return live.peak


@pytest.mark.parametrize("name", SELECTIONS)
def test_no_map_of_all_pairs(name: str) -> None:
    assert peak(SELECTIONS[name], TOKENS) < TOKENS**2  # less than a byte a pair


def test_k_medoids_holds_one_map_of_distances() -> None:
    """Every round reads all of them: 4 bytes a pair; beside it, some blocks of 256 rows, of 8."""
    tokens = 4096
    taken = peak(lambda x: kmedoids(x, 8), tokens, "cpu")
    assert 4 * tokens**2 <= taken < 4 * tokens**2 + 6 * 256 * tokens * 8


def test_preservation_sets_hold_one_map_of_cosines() -> None:
    """Every step reads all of them: 4 bytes a pair; beside it, some blocks of 1024 rows, in which
    differences are of 8 bytes. Of several sets, maps of no more than 8192 tokens together."""
    tokens = 4096
    taken = peak(lambda x: preservation_set(x, x[..., 0], 4), tokens, "cpu")
    assert 4 * tokens**2 <= taken < 4 * tokens**2 + 6 * 1024 * tokens * 4
    many = peak(lambda x: preservation_set(x.expand(9, -1, -1), x[..., 0].expand(9, -1), 4), tokens)
    assert many < 4 * 8192**2 + 4 * 4 * 1024 * tokens * 3
