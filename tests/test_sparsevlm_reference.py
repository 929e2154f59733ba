"""SparseVLM against a slow reference: one sample at a time, loops over tokens and heads, whole
attention maps, caches as plain tensors. Dropping, recycling, correction for rotary embedding,
head selection, counts from the rank; several images per prompt, and prompts without text after
the image."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from reference.decoder import Decoder
from reference.sparsevlm import recycle
from tiny import BUILDERS, IMAGE_TOKEN, make_inputs, single
from torch import Tensor

import tokprune
from tokprune.methods.sparsevlm import SparseVLM
from tokprune.testing.oracle import assert_same_logits, compressed_logits, continuation_tokens

STEPS = 6
SIZES = [(20, 40), (40, 20), (30, 30), (24, 72)]
BATCHES: dict[str, list[list[Any]]] = {
    "single": [[4, "image", 6]],
    "four": [[4, "image", 6], [7, "image", 9], [2, "image", 3], [5, "image", 12]],
    "images": [[3, "image", 2, "image", 8], [5, "image"], [4, "image", 1]],
}


@dataclass
class Setting:
    """Options of a method, and what they mean, spelled out for the reference: tokens ``kept``
    per step of an image of n tokens (None: from the rank), the share ``recycled``, …"""

    options: dict[str, Any]
    layers: tuple[int, ...]
    kept: Any = None
    recycled: float = 0.3
    size: int = 10
    behind: bool = True
    gravity: bool = False
    heads: int = 99
    compact: bool = True
    rank: tuple[float, float] = (13.5, 0.0)


SETTINGS = {
    "v1": Setting(
        {"keep": (18, 0.25, 4), "prune_before": (2, 4, 6)}, (1, 3, 5),
        lambda n: (18, n // 4, 4),
    ),
    "v1-many-clusters": Setting(
        {"keep": 6, "prune_before": (1, 5), "recycle": 0.9, "cluster_size": 4}, (0, 4),
        lambda n: (int(n * (6 / n) ** 0.5 + 1e-6), 6), recycled=0.9, size=4,
    ),
    "spatial-preserve": Setting(
        {
            "keep": (0.5, 0.2), "prune_before": (2, 3), "recycle": 0.6, "cluster_size": 3,
            "order": "spatial", "positions": "preserve",
        },
        (1, 2), lambda n: (n // 2, n // 5), recycled=0.6, size=3, behind=False, compact=False,
    ),
    "published-preserve": Setting(
        {"keep": (0.5, 0.2), "prune_before": (2, 3), "positions": "preserve"}, (1, 2),
        lambda n: (n // 2, n // 5), compact=False,
    ),
    "plus": Setting(
        {"keep": (20, 5), "prune_before": (1, 4), "version": "plus", "heads": 2}, (0, 3),
        lambda n: (20, 5), recycled=0, gravity=True, heads=2, compact=False,
    ),
    "plus-recycled": Setting(
        {
            "keep": (20, 5), "prune_before": (3, 6), "version": "plus", "recycle": 0.5,
            "positions": "compact",
        },
        (2, 5), lambda n: (20, 5), recycled=0.5, gravity=True, heads=14,
    ),
    "rank": Setting(
        {"keep": None, "prune_before": (2, 5), "rank_scale": 2.5, "rank_bias": 1.0}, (1, 4),
        rank=(2.5, 1.0),
    ),
}  # fmt: skip


@dataclass
class Seen:
    """Per step the tokens of each image; at the end, the prompt columns in every image token."""

    counts: list[list[int]] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    merged: int = 0


def dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def raters(x: Tensor, image: list[int], text: list[int]) -> list[int]:
    """Text columns that rate."""
    if not text:
        return []
    relevance = [0.0] * len(text)
    for i in image:
        logits = [dot(x[i], x[t]) for t in text]
        top = max(logits)
        exp = [math.exp(v - top) for v in logits]
        for j, e in enumerate(exp):
            relevance[j] += e / sum(exp) / len(image)
    mean = sum(relevance) / len(text)
    # one text token is exactly average, whatever the rounding
    above = [t for t, r in zip(text, relevance) if r > mean * (1 + 1e-9)]
    return above or text


def gravity(distance: int, width: int, base: float) -> float:
    half = width // 2
    total = sum(math.cos(distance * base ** (-2 * i / width)) for i in range(half))
    return max(2 * total, 1e-3 * width) / math.sqrt(width)


def scores(
    maps: Tensor, rows: list[int], image: list[int], positions: list[int], setting: Setting,
    width: int, base: float,
) -> dict[int, float]:  # fmt: skip
    """Score of each place in ``image``."""
    own: list[dict[int, float]] = []
    for head in maps:
        own.append(dict.fromkeys(image, 0.0))
        for row in rows:
            for j in image:
                weight = 1.0
                if setting.gravity:
                    weight = gravity(positions[row] - positions[j], width, base)
                own[-1][j] += float(head[row, j]) / weight / len(rows)
    best = sorted(own, key=lambda head: -sum(head.values()))[: setting.heads]
    return {j: sum(head[j] for head in best) / len(best) for j in image}


def reference(
    model: Any, x: Tensor, segment: list[int], setting: Setting, continuation: list[int]
) -> tuple[Tensor, Seen]:
    """Logits [1 + steps, V] after the prompt and after every token of ``continuation``; ``x``
    [L, D] embedded prompt, ``segment``: image number of every column, −1 for text."""
    decoder, embed, seen = Decoder(model), model.get_input_embeddings(), Seen()
    width = decoder.lm.layers[0].self_attn.head_dim
    last = max(i for i, s in enumerate(segment) if s >= 0)
    image = [i for i, s in enumerate(segment) if s >= 0]
    judges = raters(x, image, list(range(last + 1, len(x))))
    images = [sum(s == i for s in segment) for i in range(max(segment) + 1)]
    # of every token of the present sequence: its column, its position, the columns merged into it
    alive = list(range(len(x)))
    positions = list(range(len(x)))
    members = {c: [c] for c in alive}
    following = []
    for number in range(len(decoder.lm.layers)):
        maps, x = decoder.layer(number, x, positions)
        following.append(len(alive) if setting.compact else len(segment))
        if number not in setting.layers:
            continue
        step = setting.layers.index(number)
        rows = [alive.index(c) for c in judges] or [len(alive) - 1]
        here = [p for p, c in enumerate(alive) if segment[c] >= 0]
        score = scores(maps, rows, here, positions, setting, width, decoder.base)
        if not judges:  # the answer is read from the last token, which stays
            score[len(alive) - 1] = math.inf
        new: dict[int, Tensor] = {}
        behind: dict[int, list[int]] = {}
        gone: set[int] = set()
        for s, entered in enumerate(images):
            own = [p for p in here if segment[alive[p]] == s]
            if setting.kept is not None:
                keep = min(max(1, setting.kept(entered)[step]), len(own))
            else:
                block = maps.mean(0)[rows][:, own]
                full = int(torch.linalg.matrix_rank(block))
                scale, bias = setting.rank
                keep = len(own) if full == len(own) else min(int(full * scale + bias), len(own))
            order = sorted(own, key=lambda p: -score[p])
            dropped = order[keep:]
            if setting.recycled and dropped:
                chosen = dropped[: int(setting.recycled * len(dropped)) + 1]
                clusters = min(len(chosen) // setting.size + 1, len(chosen))
                if clusters >= len(dropped):
                    continue  # as many as before: nothing goes
                centres, groups = recycle(x[chosen], clusters)
                for centre, group in zip(centres, groups):
                    place = chosen[centre]
                    new[place] = sum((x[chosen[i]] for i in group), torch.zeros(())) / len(group)
                    held = [c for i in sorted(group) for c in members[alive[chosen[i]]]]
                    members[alive[place]] = held
                    end = max(own) - (max(own) == len(alive) - 1)
                    behind.setdefault(end, []).append(place)
                    seen.merged += len(group)
            gone |= set(dropped)
        places: list[int] = []
        for place in range(len(alive)):
            if place not in gone or (place in new and not setting.behind):
                places.append(place)
            if setting.behind:
                places += behind.get(place, [])
        x = torch.stack([new.get(place, x[place]) for place in places])
        alive = [alive[place] for place in places]
        positions = [positions[place] for place in places]
        if setting.compact:
            positions = list(range(len(places)))
        seen.counts.append([sum(segment[c] == s for c in alive) for s in range(len(images))])
    seen.members = [members[c] for c in alive if segment[c] >= 0]
    out = [decoder.logits(x)]
    for step, token in enumerate(continuation):
        y = embed(torch.tensor([token]))
        for number in range(len(decoder.lm.layers)):
            _, y = decoder.layer(number, y, [following[number] + step])
        out.append(decoder.logits(y))
    return torch.stack(out), seen


def embedded(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The embedded prompt [L, D] of a batch of one, as the unpruned model makes it."""
    entered: list[Tensor] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model(**inputs)
    handle.remove()
    return entered[0][0]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention_kind", ["eager", "sdpa"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", SETTINGS)
@torch.no_grad()
def test_equals_the_reference(case: str, family: str, attention_kind: str, batch: str) -> None:
    setting = SETTINGS[case]
    method = SparseVLM(**setting.options)
    model = BUILDERS[family](attention=attention_kind)
    prompts = BATCHES[batch]
    images = [sum(part == "image" for part in prompt) for prompt in prompts]
    inputs = make_inputs(model, prompts, (SIZES * 2)[: sum(images)])
    continuation = continuation_tokens(len(prompts), STEPS)
    with tokprune.compress(model, method) as trace:
        got = compressed_logits(model, inputs, continuation)
    last: Any = trace.last
    want, merged, first = [], 0, 0
    for b in range(len(prompts)):
        one = single(inputs, b, slice(first, first + images[b]))
        first += images[b]
        segment, image = [], -1
        for before, token in zip([0, *one["input_ids"][0].tolist()], one["input_ids"][0].tolist()):
            image += token == IMAGE_TOKEN != before
            segment.append(image if token == IMAGE_TOKEN else -1)
        x = embedded(model, one)
        logits, own = reference(model, x, segment, setting, continuation[b].tolist())
        want.append(logits)
        merged += own.merged
        counts = [last.layers[layer + 1].counts[b] for layer in setting.layers]
        assert counts == own.counts
        assert sum(own.counts[-1]) < sum(s >= 0 for s in segment)
        _compare_sources(trace, b, own, segment)
    assert bool(merged) == bool(setting.recycled)
    assert_same_logits(got, torch.stack(want))


def _compare_sources(trace: Any, row: int, seen: Seen, segment: list[int]) -> None:
    """The trace says of every surviving token which patches it stands for."""
    entered = trace.kept(0, row)
    columns = [c for c, s in enumerate(segment) if s >= 0]
    assert len(entered) == len(columns)
    sources = dict(zip(columns, (token.sources for token in entered)))
    got = [
        sorted((token.image, *cell) for cell in token.sources) for token in trace.kept(None, row)
    ]
    want = [
        sorted((segment[c], *cell) for c in held for cell in sources[c]) for held in seen.members
    ]
    assert got == want


def test_the_cases_cover_several_clusters_and_ragged_batches() -> None:
    """The cases above differ between samples and merge into several tokens, or they would prove
    less."""
    model = BUILDERS["llava_next"]()
    inputs = make_inputs(model, BATCHES["four"], SIZES)
    method = SparseVLM(**SETTINGS["v1-many-clusters"].options)
    with tokprune.compress(model, method) as trace, torch.no_grad():
        model(**inputs)
    last: Any = trace.last
    merged = [t for t in trace.kept(1) if len(t.sources) > 1]
    assert len(merged) > 3
    assert len({tuple(counts) for counts in last.layers[1].counts}) > 1
    assert last.layers[1].column[0].diff().min() < 0  # behind the image's other tokens
