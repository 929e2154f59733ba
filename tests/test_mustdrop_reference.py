"""MustDrop with merging against a slow reference: one sample at a time, loops over windows,
tokens and heads, whole attention maps, caches as plain tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference.decoder import Decoder, attention, heads
from reference.windows import groups_of, similarity, windows
from tiny import BUILDERS, IMAGE_TOKEN, make_inputs
from torch import Tensor

import tokprune
from tokprune.families import bind
from tokprune.methods.mustdrop import MustDrop
from tokprune.testing.oracle import compressed_logits, continuation_tokens

STEPS = 8
SIZES = [(20, 40), (40, 20), (30, 30), (24, 72)]
BATCHES: dict[str, list[list[Any]]] = {
    "single": [[4, "image", 6]],
    "four": [[4, "image", 6], [7, "image", 9], [2, "image", 3], [5, "image", 12]],
}
METHODS = {
    "official": MustDrop(
        gamma=0.03, alpha=0.03, window=(2, 2), threshold=0.14, prune_before=(2, 4, 5, 7)
    ),
    "continue": MustDrop(
        gamma=0.08, alpha=0.06, window=(3, 3), threshold=0.1, prune_before=(1, 5),
        decode_positions="continue", key_rate=0.2,
    ),
    "no-cache-policy": MustDrop(
        gamma=0.04, alpha=0.08, window=(2, 3), threshold=0.2, prune_before=(3, 4),
        cache_policy=False, merge_after_layer=1,
    ),
}  # fmt: skip


@dataclass
class Seen:
    """What the reference decided for one sample."""

    merged: int
    keys: list[int]
    counts: list[int]
    cached: list[int]


# ------------------------------------------------------------------------------- vision


def clip_block(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """One block on [T, D]: its attention maps and its output."""
    attn = layer.self_attn
    normed = layer.layer_norm1(x)
    q, k, v = (heads(normed, p, attn.head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    maps, out = attention(q, k, v, causal=False)
    x = x + attn.out_proj(out)
    return maps, x + layer.mlp(layer.layer_norm2(x))


def encode(model: Any, tiles: Tensor, method: MustDrop) -> tuple[Tensor, list[bool], int]:
    """Visual tokens [n, D] of one image in published order, which of them are key tokens, and
    how many windows merged in each tile."""
    multimodal = model.model
    tower = getattr(multimodal.vision_tower, "vision_model", multimodal.vision_tower)
    layers = tower.encoder.layers
    merge_layer = method.merge_after_layer or 0
    xs = [tower.pre_layrnorm(tower.embeddings(tile[None]))[0] for tile in tiles]
    for layer in layers[: merge_layer + 1]:
        xs = [clip_block(layer, x)[1] for x in xs]
    side = math.isqrt(len(xs[0]) - 1)
    boxes = windows(method.window, (side, side))
    similar = [[similarity(x[1:], box) for box in boxes] for x in xs]
    merged = min(sum(s >= method.threshold for s in own) for own in similar)
    features, marks = [], []
    for x, own in zip(xs, similar):
        groups = groups_of(boxes, own, merged)
        hidden = torch.stack([x[0], *(x[1:][members].mean(0) for members in groups)])
        for number, layer in enumerate(layers[merge_layer + 1 :], merge_layer + 1):
            maps, hidden = clip_block(layer, hidden)
            if number == len(layers) - 2:
                features.append(multimodal.multi_modal_projector(hidden[1:]))
        look = maps[:, 0, 1:].mean(0)
        count = math.ceil(method.key_rate * len(look))
        keys = sorted(range(len(look)), key=lambda i: -float(look[i]))[:count]
        marks += [i in keys for i in range(len(look))]
    return torch.cat(features), marks, merged


# ------------------------------------------------------------------------------- language


def weak(maps: Tensor, image: list[int], text: list[int], method: MustDrop) -> list[bool]:
    mean = maps.mean(0)
    total = [sum(float(mean[row, j]) for row in text) for j in image]
    peak = [max(float(mean[row, j]) for row in text) for j in image]
    limit = method.gamma * sum(total)
    return [g < limit and m < method.alpha for g, m in zip(total, peak)]


def reference(
    model: Any, ids: list[int], tiles: Tensor, method: MustDrop, continuation: list[int]
) -> tuple[Tensor, Seen]:
    """Logits [1 + steps, V] after the prompt and after every token of ``continuation``."""
    decoder, embed = Decoder(model), model.get_input_embeddings()
    features, marks, merged = encode(model, tiles, method)
    start = ids.index(IMAGE_TOKEN)
    after = [i for i in ids[start:] if i != IMAGE_TOKEN]
    x = torch.cat([embed(torch.tensor(ids[:start])), features, embed(torch.tensor(after))])
    # every token of the present sequence: its number in the prompt; and which numbers are image
    alive = list(range(len(x)))
    image = set(range(start, start + len(features)))
    keys = {start + i for i, mark in enumerate(marks) if mark}
    held, counts = [], []
    for number in range(len(decoder.lm.layers)):
        held.append(list(alive))
        maps, x = decoder.layer(number, x, list(range(len(alive))))
        if number + 1 in method.prune_before:
            here = [place for place, token in enumerate(alive) if token in image]
            text = [p for p, token in enumerate(alive) if token >= start + len(features)]
            drop = {
                alive[place]
                for place, gone in zip(here, weak(maps, here, text, method))
                if gone and alive[place] not in keys
            }
            rows = [place for place, token in enumerate(alive) if token not in drop]
            x, alive = x[rows], [alive[place] for place in rows]
            counts.append(sum(token in image for token in alive))
    following = [len(tokens) for tokens in held]
    if method.cache_policy:
        for number in range(min(method.prune_before) - 1, max(method.prune_before)):
            rows = [place for place, token in enumerate(held[number]) if token in alive]
            decoder.cache[number] = tuple(t[rows] for t in decoder.cache[number])
            if method.decode_positions != "continue":
                following[number] = len(rows)
    cached = [len(k) for k, _ in decoder.cache]
    out = [decoder.logits(x)]
    for step, token in enumerate(continuation):
        x = embed(torch.tensor([token]))
        for number in range(len(decoder.lm.layers)):
            _, x = decoder.layer(number, x, [following[number] + step])
        out.append(decoder.logits(x))
    return torch.stack(out), Seen(merged, sorted(keys), counts, cached)


# ------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention_kind", ["eager", "sdpa"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", METHODS)
@torch.no_grad()
def test_equals_the_reference(case: str, family: str, attention_kind: str, batch: str) -> None:
    method = METHODS[case]
    model = BUILDERS[family](attention=attention_kind)
    prompts = BATCHES[batch]
    inputs = make_inputs(model, prompts, SIZES[: len(prompts)])
    continuation = continuation_tokens(len(prompts), STEPS)
    with tokprune.compress(model, method) as trace:
        got = compressed_logits(model, inputs, continuation)
    bound = bind(model)
    layouts = bound.family.images(bound.parts, bound.facts, inputs)
    want, seen = [], []
    for b in range(len(prompts)):
        ids = inputs["input_ids"][b][inputs["attention_mask"][b] != 0].tolist()
        pixels = inputs["pixel_values"][b]
        tiles = pixels[None] if pixels.dim() == 3 else pixels[: layouts[b].tiles]
        logits, own = reference(model, ids, tiles, method, continuation[b].tolist())
        want.append(logits)
        seen.append(own)
    last: Any = trace.last
    for b, own in enumerate(seen):
        counts = [sum(last.layers[cut].counts[b]) for cut in method.prune_before]
        assert counts == own.counts
        assert [layer.cached[b] for layer in last.layers] == own.cached
    assert any(own.merged for own in seen), "nothing merged: the comparison would show little"
    entered = [sum(counts) for counts in last.layers[0].counts]
    assert any(own.counts[0] < n for own, n in zip(seen, entered))
    assert any(own.counts[-1] < own.counts[0] for own in seen)
    # loops round in another order than kernels do, and differently on every kind of processor
    error, scale = (got - torch.stack(want)).abs().max(), torch.stack(want).abs().max()
    assert error <= 3e-5 * max(1.0, scale)


def test_the_batch_is_ragged_in_every_way() -> None:
    """The cases above differ between the samples of a batch, or they would prove less."""
    model = BUILDERS["llava"]()
    inputs = make_inputs(model, BATCHES["four"])
    with tokprune.compress(model, METHODS["official"]) as trace, torch.no_grad():
        model(**inputs)
    last: Any = trace.last
    assert len({counts[0] for counts in last.layers[0].counts}) > 1
    assert len({counts[0] for counts in last.layers[-1].counts}) > 1
