"""Merging methods against slow, obvious references: the vision tower written out layer by layer,
merging by Python loops over groups, then the *unpruned* language model on the merged features.

What holds for a compressed model must hold here too: prefill and cached steps, batches with left
padding, both families, eager and sdpa attention, towers with and without class token. Tower and
projector run in float64 on both sides, so that what is compared is the method and not the rounding
of a random tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from tiny import BUILDERS, GRID, IMAGE_SIZE, IMAGE_TOKEN, make_inputs
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

import tokprune
from tokprune.testing.oracle import compressed_logits

STEPS = 8
LAYERS = 6
FEATURE_LAYER = 4
BATCHES: dict[str, list[list[Any]]] = {
    "single": [[4, "image", 6]],
    "four": [[4, "image", 6], [7, "image", 9], [2, "image", 3], [5, "image", 12]],
}
#: (height, width) of the pictures: all are padded to the shape of their tiles
SIZES = [(14, 40), (40, 14), (30, 22), (10, 72)]

#: rows that become one: the first is the destination (or the token that stays), the others join
Group = list[int]


# ------------------------------------------------------------------------------- matchings


def cosines(rows: Tensor) -> list[list[float]]:
    unit = torch.stack([row / row.norm() for row in rows])
    return (unit @ unit.T).tolist()  # type: ignore[no-any-return]


def bipartite(metric: Tensor, r: int, cls: bool) -> list[Group]:
    """The r best pairs of an even with an odd row; unmerged evens lead (with a class token in
    order, else by falling similarity), odds follow in order."""
    near = cosines(metric)
    evens, odds = range(0, len(near), 2), range(1, len(near), 2)
    best: dict[int, tuple[float, int]] = {}
    for a in evens:
        best[a] = max(((near[a][b], b) for b in odds), key=lambda pair: pair[0])
    if cls:
        best[0] = (-math.inf, 1)
    by_score = sorted(evens, key=lambda a: -best[a][0])
    joining, staying = by_score[:r], by_score[r:]
    if cls:
        staying.sort()
    groups = [[a] for a in staying] + [[b] for b in odds]
    home = {group[0]: group for group in groups}
    for a in joining:
        home[best[a][1]].append(a)
    return groups


def by_energy(metric: Tensor, cls: bool, threshold: Callable[[float], float]) -> list[int]:
    """Rows (class token excluded) by falling energy."""
    near = cosines(metric[int(cls) :])
    energy = [sum(threshold(x) for x in row) / len(row) for row in near]
    return [i + int(cls) for i in sorted(range(len(energy)), key=lambda i: -energy[i])]


def protect(metric: Tensor, r: int, cls: bool, threshold: Callable[[float], float]) -> list[Group]:
    """Of the 2r rows of highest energy, every first joins the most similar of the seconds."""
    near = cosines(metric)
    order = by_energy(metric, cls, threshold)
    a, b, rest = order[0 : 2 * r : 2], order[1 : 2 * r : 2], order[2 * r :]
    groups = [[0]] * cls + [[i] for i in rest] + [[i] for i in b]
    home = {group[0]: group for group in groups}
    for i in a:
        home[max(b, key=lambda j: near[i][j])].append(i)
    return groups


def elu(margin: float) -> Callable[[float], float]:
    return lambda x: x - margin if x > margin else math.exp(x - margin) - 1


def equation_4(margin: float) -> Callable[[float], float]:
    return lambda x: x if x >= margin else math.exp(x - margin) - 1


def gauss(margin: float) -> Callable[[float], float]:
    sigma = 1 - margin
    scale = sigma * math.sqrt(2 * math.pi)
    return lambda x: (2 * math.exp(-(((1 - x) / sigma) ** 2)) - 1) / scale


# ------------------------------------------------------------------------------- the tower


@dataclass
class Merge:
    """What a method does in the tower: ``groups(layer, metric)`` or None to leave a layer alone."""

    groups: Callable[[int, Tensor, bool], list[Group] | None]
    keys: bool = False
    inside: bool = False
    weighted: bool = False
    proportional: bool = False


def merge_rows(x: Tensor, sizes: list[float], groups: list[Group], weighted: bool) -> Tensor:
    rows = []
    for group in groups:
        weights = [sizes[i] if weighted else 1.0 for i in group]
        rows.append(sum((w * x[i] for w, i in zip(weights, group)), torch.zeros(())) / sum(weights))
    return torch.stack(rows)


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()


def linear(x: Tensor, module: Any) -> Tensor:
    return x @ module.weight.double().T + module.bias.double()


@dataclass
class TowerResult:
    """One tile after the feature layer: ``rows`` [T, D]; ``members[i]``: patches in row i;
    the layer's attention maps [H, T, T] and head-mean ``keys`` [T, d]."""

    rows: Tensor
    members: list[list[int]]
    attention: Tensor
    keys: Tensor


def tower(model: Any, pixels: Tensor, merge: Merge | None) -> TowerResult:
    """One tile through the vision tower, in float64."""
    whole = model.model.vision_tower
    inner = getattr(whole, "vision_model", whole)
    cls = hasattr(inner.embeddings, "class_embedding")
    x = inner.embeddings(pixels[None])[0].double()
    if cls:
        x = layer_norm(x, inner.pre_layrnorm)
    members: list[list[int]] = [[]] * cls + [[i] for i in range(GRID * GRID)]
    sizes = [1.0] * len(x)
    for number, layer in enumerate(inner.encoder.layers[: FEATURE_LAYER + 1]):
        attention = layer.self_attn
        normed = layer_norm(x, layer.layer_norm1)
        heads, width = attention.num_heads, attention.head_dim
        q, k, v = (
            linear(normed, module).view(len(x), heads, width)
            for module in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        maps, out = [], []
        for h in range(heads):
            logits = q[:, h] @ k[:, h].T / math.sqrt(width)
            if merge is not None and merge.proportional:
                logits = logits + torch.tensor(sizes).double().log()
            maps.append(logits.softmax(-1))
            out.append(maps[-1] @ v[:, h])
        x = x + linear(torch.cat(out, dim=-1), attention.out_proj)
        keys = k.mean(1)

        def reduce(x: Tensor, number: int = number, keys: Tensor = keys) -> Tensor:
            nonlocal sizes, members
            assert merge is not None
            groups = merge.groups(number, keys if merge.keys else x, cls)
            if groups is None:
                return x
            x = merge_rows(x, sizes, groups, merge.weighted)
            sizes = [sum(sizes[i] for i in group) for group in groups]
            members = [[p for i in group for p in members[i]] for group in groups]
            return x

        if merge is not None and merge.inside:
            x = reduce(x)
        normed = layer_norm(x, layer.layer_norm2)
        activation = ACT2FN[inner.config.hidden_act]
        x = x + linear(activation(linear(normed, layer.mlp.fc1)), layer.mlp.fc2)
        if merge is not None and not merge.inside:
            x = reduce(x)
    return TowerResult(x, members, torch.stack(maps), keys)


# ------------------------------------------------------------------------------- methods


def pitome(variant: str, ratio: float) -> Merge:
    margins = [0.9 - 0.9 * i / LAYERS for i in range(LAYERS)]

    def groups(layer: int, metric: Tensor, cls: bool) -> list[Group] | None:
        if variant == "v1" and layer % 2 == 0:
            return None
        plain = {"v1": margins[layer] >= 0.45, "head": layer <= LAYERS / 2, "paper": False}
        if plain[variant]:
            r = math.floor(len(metric) - len(metric) * ratio)
            return bipartite(metric, r, cls)
        free = len(metric) - cls
        energy = {"v1": gauss, "head": elu, "paper": equation_4}[variant]
        r = math.floor(free - free * ratio)
        return protect(metric, r, cls, energy(margins[layer])) if r else None

    inside = variant == "paper"
    return Merge(groups, keys=inside, inside=inside, weighted=inside, proportional=inside)


def tome(r: list[int], proportional: bool) -> Merge:
    def groups(layer: int, metric: Tensor, cls: bool) -> list[Group] | None:
        return bipartite(metric, r[layer], cls) if r[layer] else None

    return Merge(groups, keys=True, inside=True, weighted=True, proportional=proportional)


def tome_baseline(ratio: float) -> Merge:
    def groups(layer: int, metric: Tensor, cls: bool) -> list[Group] | None:
        r = math.floor(len(metric) - len(metric) * ratio)
        return bipartite(metric, r, cls) if layer % 2 else None

    return Merge(groups)


#: (id, method, options, reference merge)
TOWER_CASES: list[tuple[str, str, dict[str, Any], Merge]] = [
    ("pitome-v1", "pitome", {"ratio": 0.7}, pitome("v1", 0.7)),
    ("pitome-head", "pitome", {"ratio": 0.8, "variant": "head"}, pitome("head", 0.8)),
    ("pitome-paper", "pitome", {"ratio": 0.82, "variant": "paper"}, pitome("paper", 0.82)),
    ("tome", "tome", {"r": 5}, tome([5] * LAYERS, True)),
    ("tome-plain", "tome", {"r": 5, "prop_attn": False}, tome([5] * LAYERS, False)),
    ("tome-falling", "tome", {"r": 4, "inflect": -1.0}, tome([8, 6, 4, 3, 1, 0], True)),
    ("tome-list", "tome", {"r": [0, 6, 0, 5]}, tome([0, 6, 0, 5, 0, 0], True)),
    (
        "tome-baseline",
        "tome",
        {"ratio": 0.75, "variant": "pitome_baseline"},
        tome_baseline(0.75),
    ),
]

#: (tile, patches) of one visual token; the class token and newlines have no patches
Token = tuple[Tensor, set[tuple[int, int]]]


def merged_image(model: Any, tiles: Tensor, size: tuple[int, int], merge: Merge) -> list[Token]:
    """All tokens of all tiles, tile after tile, class tokens left out."""
    tokens: list[Token] = []
    for number, pixels in enumerate(tiles):
        result = tower(model, pixels, merge)
        cls = int(len(result.members[0]) == 0)
        features = project(model, result.rows[cls:])
        held = [{(number, p) for p in patches} for patches in result.members[cls:]]
        tokens += list(zip(features, held))
    return tokens


def project(model: Any, rows: Tensor) -> Tensor:
    return model.model.multi_modal_projector(rows[None])[0].float()


def zipped_image(
    model: Any, tiles: Tensor, size: tuple[int, int], dominant: int, contextual: int, received: bool
) -> list[Token]:
    """VisionZip tile by tile, then the published packing."""
    base: list[Token] = []
    patches: list[tuple[tuple[int, int], Token]] = []
    classes: list[Token] = []
    merged: list[Token] = []
    across = tile_grid(model, size)[1] if len(tiles) > 1 else 0
    for number, pixels in enumerate(tiles):
        result = tower(model, pixels, None)
        cls = len(result.rows) > GRID * GRID
        total = len(result.rows)
        heads: list[list[list[float]]] = result.attention.tolist()
        score = []
        for j in range(total):
            if cls and not received:
                score.append(sum(head[0][j] for head in heads))
            else:
                others = [i for i in range(total) if i != j]
                score.append(sum(head[i][j] for head in heads for i in others) / len(others))
        ranked = sorted(range(int(cls), total), key=lambda j: -score[j])
        kept = sorted(([0] if cls else []) + ranked[: dominant - cls])
        rest = [j for j in range(total) if j not in kept]
        step = max(1, len(rest) // contextual)
        targets = rest[::step][:contextual]
        near = cosines(result.keys)
        followers: dict[int, list[int]] = {t: [] for t in targets}
        for j in rest:
            if j not in targets:
                followers[max(targets, key=lambda t: near[j][t])].append(j)
        rows = [result.rows[j] for j in kept]
        for t in targets:
            mean = sum(result.rows[j] for j in followers[t]) / max(1, len(followers[t]))
            rows.append(result.rows[t] + mean)
        features = project(model, torch.stack(rows))
        held = [{(number, j - cls)} if j or not cls else set() for j in kept]
        held += [{(number, j - cls) for j in [t, *followers[t]]} for t in targets]
        tokens = list(zip(features, held))
        if number == 0:
            base = tokens
            continue
        for j, token in zip(kept, tokens):
            if cls and j == 0:
                classes.append(token)
                continue
            y, x = (number - 1) // across, (number - 1) % across
            cell = (y * GRID + (j - cls) // GRID, x * GRID + (j - cls) % GRID)
            patches.append((cell, token))
        merged += tokens[len(kept) :]
    patches.sort(key=lambda pair: pair[0])
    return base + [token for _, token in patches] + classes + merged


def pooled_image(model: Any, tiles: Tensor, size: tuple[int, int], p: int) -> list[Token]:
    """Average pooling of each tile's projector output, stitched, unpadded, newline per row."""
    side = GRID // p
    pools: list[dict[tuple[int, int], Token]] = []
    for number, pixels in enumerate(tiles):
        rows = tower(model, pixels, None).rows
        features = project(model, rows[len(rows) - GRID * GRID :])
        pool: dict[tuple[int, int], Token] = {}
        for y in range(side):
            for x in range(side):
                cells = [(y * p + i) * GRID + x * p + j for i in range(p) for j in range(p)]
                mean = sum((features[c] for c in cells), torch.zeros(())) / len(cells)
                pool[y, x] = (mean, {(number, c) for c in cells})
        pools.append(pool)
    tokens = [pools[0][y, x] for y in range(side) for x in range(side)]
    if not hasattr(model.model, "image_newline"):
        return tokens
    newline: Token = (model.model.image_newline, set())
    if len(tiles) == 1:
        return [*tokens, newline]
    down, across = tile_grid(model, size)
    top, bottom, left, right = 0, down * side, 0, across * side
    if size[1] / size[0] > right / bottom:  # bars above and below
        bar = (bottom - int(round(size[0] * (right / size[1]), 7))) // 2
        top, bottom = bar, bottom - bar
    else:
        bar = (right - int(round(size[1] * (bottom / size[0]), 7))) // 2
        left, right = bar, right - bar
    for y in range(top, bottom):
        for x in range(left, right):
            tile = y // side * across + x // side + 1
            tokens.append(pools[tile][y % side, x % side])
        tokens.append(newline)
    return tokens


def tile_grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Crops (down, across) of an image: the pinpoint that shows most of it, least wasted."""
    best: tuple[int, int, tuple[int, int]] | None = None
    for height, width in model.config.image_grid_pinpoints:
        scale = min(width / size[1], height / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        waste = height * width - shown
        if best is None or (shown, -waste) > best[:2]:
            best = (shown, -waste, (height // IMAGE_SIZE, width // IMAGE_SIZE))
    assert best is not None
    return best[2]


# ------------------------------------------------------------------------------- comparison


@torch.no_grad()
def reference(
    model: Any,
    inputs: dict[str, Tensor],
    continuation: Tensor,
    image_tokens: Callable[[Any, Tensor, tuple[int, int]], list[Token]],
) -> tuple[Tensor, list[list[Token]]]:
    """Logits [B, 1 + steps, V] of the unpruned language model on merged features, row by row
    without padding, and the visual tokens of each row's image."""
    rows, images = [], []
    for b, ids in enumerate(inputs["input_ids"]):
        ids = ids[inputs["attention_mask"][b] != 0]
        pixels, size = inputs["pixel_values"][b], (0, 0)
        if "image_sizes" in inputs:
            height, width = inputs["image_sizes"][b].tolist()
            size = (height, width)
            number = image_size_to_num_patches(
                list(size), model.config.image_grid_pinpoints, IMAGE_SIZE
            )
            pixels = pixels[:number]
        else:
            pixels = pixels[None]
        tokens = image_tokens(model, pixels, size)
        images.append(tokens)
        at = (ids == IMAGE_TOKEN).nonzero().flatten()
        embed = model.get_input_embeddings()
        embeds = torch.cat(
            [
                embed(ids[: at[0]]),
                torch.stack([feature for feature, _ in tokens]),
                embed(ids[at[-1] + 1 :]),
                embed(continuation[b]),
            ]
        )
        hidden = model.model.language_model(
            inputs_embeds=embeds[None], use_cache=False
        ).last_hidden_state
        steps = continuation.shape[1]
        rows.append(model.lm_head(hidden)[0, -steps - 1 :])
    return torch.stack(rows), images


@pytest.fixture(scope="module")
def models() -> dict[Any, Any]:
    return {}


def build(models: dict[Any, Any], family: str, attention: str, towers: str = "clip") -> Any:
    key = (family, attention, towers)
    if key not in models:
        model = BUILDERS[family](tower=towers, attention=attention, vision_layers=LAYERS)
        model.model.vision_tower.double()
        model.model.multi_modal_projector.double()
        models[key] = model
    return models[key]


def close(got: Tensor, want: Tensor) -> None:
    """1e-5 of the largest logit."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def check(model: Any, batch: str, method: str, options: dict[str, Any], image_tokens: Any) -> None:
    prompts = BATCHES[batch]
    inputs = make_inputs(model, prompts, SIZES[: len(prompts)])
    continuation = torch.randint(
        3, 98, (len(prompts), STEPS), generator=torch.Generator().manual_seed(7)
    )
    with tokprune.compress(model, method, **options) as trace:
        got = compressed_logits(model, inputs, continuation)
    want, images = reference(model, inputs, continuation, image_tokens)
    assert trace.last is not None
    assert trace.last.layers[-1].counts == [[len(tokens)] for tokens in images]
    close(got, want)
    for image, tokens in zip(trace.last.images, images):
        compare_groups(image, tokens)


def compare_groups(image: Any, tokens: list[Token]) -> None:
    """The book-keeping says of every original patch which visual token holds it."""
    want = {patch: i for i, (_, patches) in enumerate(tokens) for patch in patches}
    if image.selection is None:
        got = image.record.group
        for tile, row in enumerate(got.tolist()):
            for patch, i in enumerate(row):
                assert i == want.get((tile, patch), -1)
        return
    group = image.selection.group.tolist()
    facts = image.record.facts
    assert len(group) == image.record.count
    for place, i in zip(image.record.layout.packed.tolist(), group):
        if place < 0:  # a newline joins a newline, or goes
            assert i == -1 or not tokens[i][1]
            continue
        tile, patch = divmod(place, facts.tokens_per_tile)
        assert i == want.get((tile, patch), -1)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", TOWER_CASES, ids=[c[0] for c in TOWER_CASES])
def test_merging_in_the_tower(
    models: Any, case: Any, family: str, attention: str, batch: str
) -> None:
    _, method, options, merge = case
    check(
        build(models, family, attention), batch, method, options,
        partial(merged_image, merge=merge),
    )  # fmt: skip


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", TOWER_CASES, ids=[c[0] for c in TOWER_CASES])
def test_merging_in_a_tower_without_class_token(models: Any, case: Any, family: str) -> None:
    _, method, options, merge = case
    check(
        build(models, family, "sdpa", "siglip"), "single", method, options,
        partial(merged_image, merge=merge),
    )  # fmt: skip


ZIP = {"dominant": 8, "contextual": 3}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("score", ["cls", "mean_received"])
def test_visionzip(models: Any, score: str, family: str, attention: str, batch: str) -> None:
    received = score == "mean_received"
    check(
        build(models, family, attention), batch, "visionzip", {**ZIP, "score": score},
        partial(zipped_image, dominant=8, contextual=3, received=received),
    )  # fmt: skip


@pytest.mark.parametrize("family", BUILDERS)
def test_visionzip_in_a_tower_without_class_token(models: Any, family: str) -> None:
    check(
        build(models, family, "eager", "siglip"), "single", "visionzip", dict(ZIP),
        partial(zipped_image, dominant=8, contextual=3, received=True),
    )  # fmt: skip


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("window", [2, 3, 6])
def test_pool(models: Any, window: int, family: str, attention: str, batch: str) -> None:
    check(
        build(models, family, attention), batch, "pool", {"window": window},
        partial(pooled_image, p=window),
    )  # fmt: skip


@pytest.mark.parametrize("family", BUILDERS)
def test_pool_with_a_tower_without_class_token(models: Any, family: str) -> None:
    check(
        build(models, family, "sdpa", "siglip"), "single", "pool", {"keep": 4},
        partial(pooled_image, p=3),
    )  # fmt: skip


@pytest.mark.parametrize(
    "size", [(10, 70), (70, 10), (23, 71), (48, 31), (7, 96), (96, 7), (22, 55), (14, 40), (40, 14)]
)
def test_pool_packs_uneven_pictures(models: Any, size: tuple[int, int]) -> None:
    """Unpadding at the pooled resolution, for pictures whose padding does not fill windows."""
    model = build(models, "llava_next", "sdpa")
    inputs = make_inputs(model, BATCHES["single"], [size])
    continuation = torch.full((1, 2), 5)
    with tokprune.compress(model, "pool", window=2) as trace:
        got = compressed_logits(model, inputs, continuation)
    want, images = reference(model, inputs, continuation, partial(pooled_image, p=2))
    close(got, want)
    assert trace.last is not None
    compare_groups(trace.last.images[0], images[0])
    # every pooled crop cell stands where a crop token of the full prompt stood
    entered = trace.last.images[0].entered
    assert entered is not None
    assert (entered.newline | (entered.tile > 0))[(GRID // 2) ** 2 :].all()


def test_pooled_rows_keep_their_newlines(models: Any) -> None:
    """Each newline of the full grid goes with the newline of the pooled row it ends."""
    model = build(models, "llava_next", "sdpa")
    inputs = make_inputs(model, BATCHES["single"], [(20, 40)])
    with tokprune.compress(model, "pool", window=3) as trace, torch.no_grad():
        model(**inputs)
    assert trace.last is not None
    image = trace.last.images[0]
    assert image.selection is not None
    assert image.selection.group is not None
    newline = image.record.layout.packed < 0  # type: ignore[union-attr]
    # base 4, then two rows of four pooled cells and a newline
    assert image.selection.group[newline].tolist() == [8, 8, 8, 13, 13, 13]
    assert image.entered is not None
    assert image.entered.newline.nonzero().flatten().tolist() == [8, 13]


def test_pool_before_the_projector(models: Any) -> None:
    """place="before" averages the tower's rows; the projector then sees the means."""
    model = build(models, "llava", "sdpa")

    def tokens(model: Any, tiles: Tensor, size: tuple[int, int]) -> list[Token]:
        rows = tower(model, tiles[0], None).rows[1:].view(GRID, GRID, -1)
        out: list[Token] = []
        for y in range(0, GRID, 2):
            for x in range(0, GRID, 2):
                mean = rows[y : y + 2, x : x + 2].mean((0, 1))
                held = {(0, (y + i) * GRID + x + j) for i in range(2) for j in range(2)}
                out.append((project(model, mean[None])[0], held))
        return out

    check(model, "four", "pool", {"window": 2, "place": "before"}, tokens)
