"""Decoding steps do not copy the KV cache: no step takes more memory than it does without a method.

What counts are the bytes of live tensors over a step on the CPU. A cache that grows is joined with
the new token layer by layer, by transformers itself; a static one is written in place, so that a
step that took as much as one layer of it would have copied it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from transformers import DynamicCache, StaticCache
from wide_models import visual_prompt, wide_model

import tokprune
from tokprune.engine.cache import cache_argument
from tokprune.families import bind
from tokprune.methods import Method, make_method
from tokprune.testing.grid_prompts import TYPED

FAMILIES = ("llava-1.5", "qwen2.5-vl", "qwen3-vl", "internvl", "gemma3")
#: before the decoder, inside it, and in the cache at the end of the prefill; and nothing dropped
METHODS: dict[str, Method] = {
    "random": make_method("random", keep=1 / 3),
    "fastv": make_method("fastv", keep=1 / 3, prune_before=2),
    "mustdrop": make_method("mustdrop", keep=1 / 3, prune_before=(2, 4), spatial=False),
    "everything": make_method("random", keep=1.0),
}
#: what a step notes of itself: columns and masks of the entries that each of its sequences has
NOTES = 32


@pytest.fixture(autouse=True)
def _mapless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own attention on the CPU copies keys that several heads share."""

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


def _after_two_steps(family: str, method: Method | None, static: bool) -> tuple[Any, LiveBytes]:
    """The cache after a prefill and two steps, and the bytes counted in the second of these."""
    model, inputs = wide_model(family), visual_prompt(family, "image")
    length = inputs["input_ids"].shape[1]
    config = model.config.get_text_config()
    cache: Any = (
        StaticCache(config=config, max_cache_len=length + 4)
        if static
        else DynamicCache(config=config)
    )
    named = {cache_argument(model): cache}
    token = torch.zeros(1, 1, dtype=torch.long)
    work = nullcontext() if method is None else tokprune.compress(model, method, validate=False)
    with torch.no_grad(), work:
        model(**inputs, **named, use_cache=True, logits_to_keep=1)
        model(input_ids=token, **named, use_cache=True)
        with LiveBytes() as live:
            model(input_ids=token, **named, use_cache=True)
    return cache, live


def step(family: str, method: Method | None, static: bool) -> tuple[int, int, int]:
    """Of the second step after a prefill: its peak, what of it is left, and the bytes of the keys
    of the largest layer of the cache."""
    cache, live = _after_two_steps(family, method, static)
    return live.peak, live.now, max(layer.keys.untyped_storage().nbytes() for layer in cache.layers)


@pytest.mark.parametrize("static", [False, True], ids=["grows", "static"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_takes_no_more(method: str, family: str, static: bool) -> None:
    notes = NOTES * visual_prompt(family, "image")["input_ids"].shape[1]
    plain, _, _ = step(family, None, static)
    peak, left, layer = step(family, METHODS[method], static)
    assert peak <= plain + notes
    if static:
        assert left <= notes
    if static and TYPED:  # transformers 4 repeats keys that several heads share
        assert peak < layer, "as much as a copy of the keys of a layer"


def test_a_copy_of_the_cache_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument works: a step that copies its cache before it takes more."""
    plain, _, _ = step("llava-1.5", None, True)
    model = wide_model("llava-1.5")

    def copying(module: Any, args: Any, kwargs: Any) -> None:
        held = kwargs[cache_argument(module)].layers
        module.copied = [layer.keys.clone() for layer in held if layer.is_initialized]

    with model.register_forward_pre_hook(copying, with_kwargs=True):
        peak, _, layer = step("llava-1.5", None, True)
    del model.copied
    assert peak > plain + layer


@pytest.mark.parametrize("static", [False, True], ids=["grows", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_sliding_layers_hold_their_window(method: str, static: bool) -> None:
    """A layer that sees 5 earlier tokens holds these, and what was made after the prompt."""
    cache = _after_two_steps("gemma3", METHODS[method], static)[0]
    blocks = bind(wide_model("gemma3")).parts.decoder_layers
    room = 4 if static else 2
    for layer, block in zip(cache.layers, blocks):
        if block.window is not None:
            assert layer.keys.shape[2] <= block.window + room
