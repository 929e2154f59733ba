"""No method takes more memory than no compression, on any family, in images and in videos.

What counts are the bytes of live tensors over a prefill on the CPU, of models whose encoders read
the grids of their images from tensors, too. Attention holds no map where the backend is not eager.
The default run is every method on the families that together exercise everything, and one that
drops before the decoder and one that drops inside it on all others.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from family_cases import FAMILIES, HYBRID
from live_bytes import LiveBytes
from methods_table import ALIKE
from wide_models import visual_prompt, wide_model

import tokprune
from tokprune.bench.run import trials_of
from tokprune.errors import UnsupportedModelError, UnsupportedVideoError
from tokprune.families import bind
from tokprune.methods import Method, available_methods, image_methods, make_method
from tokprune.testing import tiny_family
from tokprune.testing.families import REPRESENTATIVE
from tokprune.testing.hybrid import is_hybrid

#: M3 and pooling take grids that they divide
NESTED = {"m3", "pool"}
#: what is noted of every token, on the host, too, weighs that much at these widths
NOTES = 1.005
#: layers with attention, where only the fourth and the last of eight have it
LAYERS: dict[str, dict[str, Any]] = {**HYBRID, "todre": {"prune_before": 4}}


@pytest.fixture(autouse=True)
def _mapless(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU torch itself would make whole maps where there is a mask."""

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


def peak(family: str, kind: str, method: Method | None = None) -> int:
    model = wide_model(family)
    work = nullcontext() if method is None else tokprune.compress(model, method, validate=False)
    with torch.no_grad(), work, LiveBytes() as live:
        model(**visual_prompt(family, kind), use_cache=True, logits_to_keep=1)
    return live.peak


@functools.cache
def whole(family: str, kind: str) -> int:
    return peak(family, kind)


def at_a_third(name: str, family: str) -> Method:
    """A method that keeps a third (of a tower too shallow for PiToMe to go so far, more)."""
    keep = 0.6 if name == "pitome" else 1 / 3
    if is_hybrid(model := wide_model(family)):
        return make_method(name, keep=keep, **LAYERS.get(name, {}))
    (trial,) = trials_of([name], [keep], bind(model).facts.decoder_layers)
    return trial.method


def _usual(method: str) -> Collection[str]:
    """The families that a method runs on without --full."""
    if method in ("divprune", "pyramiddrop"):
        return [name for name in FAMILIES if not name.startswith("qwen3.5")]  # slow ones
    return ("llava-1.5", "qwen2.5-vl") if method in ALIKE else REPRESENTATIVE


def cases(kind: str, methods: list[str]) -> list[Any]:
    families = [name for name in FAMILIES if kind == "image" or tiny_family(name).videos]
    return [
        pytest.param(
            method, family, id=f"{method}-{family}",
            marks=[] if family in _usual(method) else [pytest.mark.full],
        )
        for family in families
        for method in methods
    ]  # fmt: skip


def check(name: str, family: str, kind: str) -> None:
    method = at_a_third(name, family)
    try:
        taken = peak(family, kind, method)
    except (UnsupportedModelError, UnsupportedVideoError) as refusal:
        pytest.skip(str(refusal))
    assert taken <= NOTES * whole(family, kind)


@pytest.mark.parametrize(
    ("method", "family"), cases("image", sorted(set(image_methods()) - NESTED))
)
def test_images(method: str, family: str) -> None:
    check(method, family, "image")


@pytest.mark.parametrize(
    ("method", "family"), cases("video", sorted(set(available_methods()) - NESTED))
)
def test_videos(method: str, family: str) -> None:
    check(method, family, "video")


@pytest.mark.parametrize("method", sorted(NESTED))
def test_nested_grids(method: str) -> None:
    assert peak("llava-1.5", "image", make_method(method, keep=9)) < whole("llava-1.5", "image")


def test_where_the_decoder_sets_the_peak_a_third_of_the_tokens_takes_much_less() -> None:
    """The instrument sees what is saved."""
    taken = peak("llava-1.5", "image", make_method("random", keep=1 / 3))
    assert taken < 0.6 * whole("llava-1.5", "image")
