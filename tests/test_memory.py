"""No method takes more memory than no compression.

What counts are the bytes of live tensors over a prefill of models of published widths (with fewer
layers), found without any values, as attention that holds no map has them.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from test_syncs import ADAPTIVE

import tokprune
from tokprune.bench.models import PRESETS, image_of, skeleton
from tokprune.bench.prompts import encode, prompt
from tokprune.bench.run import trials_of
from tokprune.methods import image_methods, make_method
from tokprune.testing.checks.host_reads import can_find_host_reads, without_values

pytestmark = pytest.mark.skipif(
    not can_find_host_reads(), reason="transformers 4 itself reads the placeholders"
)
DEPTH = 8
SHAPES = ("llava-1.5-7b", "llava-next-7b")


@pytest.fixture(autouse=True)
def _mapless(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device torch itself would make whole maps of attention."""

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


@functools.cache
def model_of(name: str) -> tuple[Any, dict[str, Any]]:
    shape: Any = replace(PRESETS[name], text_layers=DEPTH, vision_layers=6)
    model = skeleton(shape).to(torch.bfloat16).eval()
    return model, prompt(model, encode(model, image_of(name)), 64, 2, None)


def peak(name: str, method: Any = None) -> int:
    model, inputs = model_of(name)
    work = nullcontext() if method is None else tokprune.compress(model, method, validate=False)
    with without_values(model, inputs) as moved, torch.no_grad(), work, LiveBytes() as live:
        model(**moved, use_cache=True, logits_to_keep=1)
    return live.peak


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", sorted(set(image_methods()) - set(ADAPTIVE) - {"m3", "pool"}))
def test_no_method_takes_more_memory_than_none(method: str, name: str) -> None:
    # (M3 and pooling take whole grids only)
    (trial,) = trials_of([method], [1 / 3], DEPTH)
    assert peak(name, trial.method) < peak(name)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", ["random", "fastv"])
def test_keeping_everything_takes_no_more(method: str, name: str) -> None:
    options = {"prune_before": 2} if method == "fastv" else {}
    whole = peak(name)
    assert peak(name, make_method(method, keep=1.0, **options)) <= 1.01 * whole


def test_bytes_are_counted_while_they_live() -> None:
    before = torch.empty(1000, dtype=torch.uint8)
    with LiveBytes() as live:
        one = before[:10] + 1
        two = torch.cat([before, before])
        del one, two
        view = torch.empty(500, dtype=torch.uint8).view(5, 100)[1:]
        assert live.now == 500
        assert len(view)
    assert live.peak == 2010
