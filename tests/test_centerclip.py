"""CenterCLIP and EVS in language models: images, tiles, and videos of a toy family.

References are written with loops: the tower layer by layer in float64, clusters by hand, then the
unpruned language model on what is left.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from reference.clustering import kmedoids_by_hand
from test_merging_conformance import (
    BATCHES,
    GRID,
    SIZES,
    Merge,
    Token,
    build,
    check,
    merged_image,
    pooled_image,
    tile_grid,
)
from tiny import BUILDERS, IMAGE_TOKEN, PATCHES, llava, make_inputs
from torch import Tensor
from toy_video import video_family, video_inputs

import tokprune
from tokprune.engine.contracts import ImageTokens
from tokprune.families import family_of
from tokprune.operators import segment_bounds
from tokprune.testing.oracle import (
    assert_same_logits,
    compressed_logits,
    continuation_tokens,
    oracle_logits,
)

# ------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def models() -> dict[Any, Any]:
    return {}


def shown_cells(model: Any, tiles: int, size: tuple[int, int]) -> list[list[int]]:
    """Of every tile, the cells that no padding covers, in raster order."""
    shown = [list(range(PATCHES))]
    if tiles == 1:
        return shown
    down, across = tile_grid(model, size)
    top, bottom, left, right = 0, down * GRID, 0, across * GRID
    if size[1] / size[0] > right / bottom:
        bar = (bottom - int(round(size[0] * (right / size[1]), 7))) // 2
        top, bottom = bar, bottom - bar
    else:
        bar = (right - int(round(size[1] * (bottom / size[0]), 7))) // 2
        left, right = bar, right - bar
    for v in range(down):
        for u in range(across):
            shown.append(
                [
                    y * GRID + x
                    for y in range(GRID)
                    for x in range(GRID)
                    if top <= v * GRID + y < bottom and left <= u * GRID + x < right
                ]
            )
    return shown


def in_the_tower(
    model: Any, tiles: Tensor, size: tuple[int, int], *, keep: int, after: int, mean: bool,
    kind: tuple[str, float] = ("euclidean", 2.0),
) -> list[Token]:  # fmt: skip
    """Every tile's shown cells clustered on the output of layer ``after``."""
    shown = shown_cells(model, len(tiles), size)
    tokens: list[Token] = []
    for number, cells in enumerate(shown):

        def groups(layer: int, x: Tensor, cls: bool, cells: Any = cells) -> Any:
            if layer != after:
                return None
            rows = [cell + cls for cell in cells]
            medoids, clusters = kmedoids_by_hand(x[rows], min(keep, len(rows)), *kind)
            found = zip(medoids, clusters)
            kept = [[rows[i] for i in own] if mean else [rows[m]] for m, own in found]
            return [[0]] * cls + kept

        if cells:
            own = merged_image(model, tiles[number : number + 1], size, Merge(groups))
            tokens += [(row, {(number, p) for _, p in held}) for row, held in own]
    return tokens


def at_the_input(
    model: Any, tiles: Tensor, size: tuple[int, int], *, keep: float, mean: bool
) -> list[Token]:
    """Every tile's tokens in the prompt clustered; newline tokens stay."""
    prompt = pooled_image(model, tiles, size, 1)
    budget = int(keep * PATCHES) if isinstance(keep, float) else keep
    stay = {i: token for i, token in enumerate(prompt) if not token[1]}
    for tile in range(len(tiles)):
        own = [(min(p)[1], i) for i, (_, p) in enumerate(prompt) if p and min(p)[0] == tile]
        rows = [i for _, i in sorted(own)]
        if not rows:
            continue
        x = torch.stack([prompt[i][0] for i in rows])
        medoids, clusters = kmedoids_by_hand(x, min(budget, len(rows)))
        for m, members in zip(medoids, clusters):
            held = {(tile, min(prompt[rows[i]][1])[1]) for i in members}
            stay[rows[m]] = (x[members].mean(0), held) if mean else prompt[rows[m]]
    return [stay[i] for i in sorted(stay)]


#: (id, options, reference)
IMAGE_CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("tower", {"keep": 11}, partial(in_the_tower, keep=11, after=4, mean=False)),
    (
        "tower-mean",
        {"keep": 10, "aggregate": "mean", "p": 1.0},
        partial(in_the_tower, keep=10, after=4, mean=True, kind=("euclidean", 1.0)),
    ),
    (
        "encoder",
        {"keep": 0.25, "place": "encoder"},
        partial(in_the_tower, keep=9, after=2, mean=False),
    ),
    (
        "encoder-mean",
        {"keep": 12, "place": "encoder", "layer": 2, "aggregate": "mean", "distance": "cosine"},
        partial(in_the_tower, keep=12, after=1, mean=True, kind=("cosine", 2.0)),
    ),
    (
        "input-mean",
        {"keep": 0.2, "place": "projector", "aggregate": "mean"},
        partial(at_the_input, keep=0.2, mean=True),
    ),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", IMAGE_CASES, ids=[c[0] for c in IMAGE_CASES])
def test_images(models: Any, case: Any, family: str, attention: str, batch: str) -> None:
    _, options, image_tokens = case
    check(build(models, family, attention), batch, "centerclip", options, image_tokens)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", IMAGE_CASES, ids=[c[0] for c in IMAGE_CASES])
def test_images_without_class_token(models: Any, case: Any, family: str) -> None:
    _, options, image_tokens = case
    model = build(models, family, "sdpa", "siglip")
    check(model, "single", "centerclip", options, image_tokens)


def test_medoids_at_language_model_keep_newlines(models: Any) -> None:
    model = build(models, "llava_next", "sdpa")
    inputs = make_inputs(model, BATCHES["four"], SIZES)
    with tokprune.compress(model, "centerclip", keep=5, place="projector") as trace:
        model(**inputs)
    assert trace.last is not None
    for b, image in enumerate(trace.last.images):
        size = inputs["image_sizes"][b].tolist()
        assert image.record is not None
        packed = image.record.layout.packed
        newlines = int((packed < 0).sum())
        shown = shown_cells(model, image.record.layout.tiles, tuple(size))
        assert image.entered is not None
        assert int(image.entered.newline.sum()) == newlines
        per_tile = [min(5, len(cells)) for cells in shown]
        tiles = image.entered.tile[image.entered.row >= 0]
        assert [int((tiles == t).sum()) for t in range(len(shown))] == per_tile
        assert (image.entered.column.diff() > 0).all()


def test_a_budget_of_everything_changes_nothing(models: Any) -> None:
    model = llava()
    inputs = make_inputs(model, BATCHES["four"])
    with torch.no_grad():
        want = model(**inputs).logits
        for place in ("tower", "encoder", "projector"):
            with tokprune.compress(model, "centerclip", keep=PATCHES, place=place):
                assert torch.equal(model(**inputs).logits, want)


def test_scope_shares_an_image_between_its_tiles() -> None:
    model = BUILDERS["llava_next"]()
    family = family_of(model)
    facts = family.facts(model, family.parts(model))
    inputs = make_inputs(model, BATCHES["single"], [(48, 48)])
    for place in ("tower", "projector"):
        options = {"keep": 22, "scope": "image", "place": place}
        with tokprune.compress(model, "centerclip", **options) as trace, torch.no_grad():
            model(**inputs)
        assert trace.last is not None
        entered = trace.last.images[0].entered
        assert entered is not None
        tiles = entered.tile[entered.row >= 0]
        assert torch.bincount(tiles).tolist() == [22 // facts.tower.max_tiles] * 5


# ------------------------------------------------------------------------------- videos

FRAMES = 5
VIDEO_PROMPTS = [(4, 6), (7, 9), (2, 3)]


def prepared(attention: str = "sdpa", tower: str = "clip") -> tuple[Any, dict[str, Tensor]]:
    model = llava(tower, attention=attention)
    return model, video_inputs(VIDEO_PROMPTS, FRAMES)


def features_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[B, T, n, D] after the projector."""
    with torch.no_grad():
        out = model.model.get_image_features(inputs["pixel_values"])
    features = torch.cat(list(getattr(out, "pooler_output", out)))
    return features.view(len(VIDEO_PROMPTS), FRAMES, PATCHES, -1)


#: method, options, tokens of each video that stay
VIDEO_CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "centerclip": ("centerclip", {"keep": 30, "segments": 2}, 30),
    "centerclip-default": ("centerclip", {"keep": 0.2}, 36),
    "centerclip-spectral": ("centerclip", {"keep": 21, "segments": 1, "algorithm": "spectral"}, 21),
    "centerclip-projector": (
        "centerclip",
        {"keep": 13, "segments": 3, "place": "projector", "positions": "preserve"},
        13,
    ),
    "evs": ("evs", {"keep": 0.4}, 72),
    "evs-count": ("evs", {"keep": 50, "positions": "preserve"}, 50),
    "evs-first-frame": ("evs", {"keep": 3}, 36),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", VIDEO_CASES)
def test_videos_equal_the_model_with_dropped_keys_hidden(case: str, attention: str) -> None:
    method, options, kept = VIDEO_CASES[case]
    model, inputs = prepared(attention)
    continuation = continuation_tokens(len(VIDEO_PROMPTS), 5)
    with video_family(FRAMES):
        with tokprune.compress(model, method, **options) as trace:
            got = compressed_logits(model, inputs, continuation)
        assert trace.last is not None
        assert trace.last.layers[-1].counts == [[kept]] * 3
        want = oracle_logits(model, inputs, trace.last, continuation)
    assert_same_logits(got, want)


@pytest.mark.parametrize("case", VIDEO_CASES)
def test_a_video_does_not_depend_on_its_batch(case: str) -> None:
    method, options, _ = VIDEO_CASES[case]
    model, inputs = prepared()
    continuation = continuation_tokens(len(VIDEO_PROMPTS), 3)
    with video_family(FRAMES), tokprune.compress(model, method, **options):
        together = compressed_logits(model, inputs, continuation)
        for b in range(len(VIDEO_PROMPTS)):
            real = inputs["attention_mask"][b] != 0
            one = {
                "input_ids": inputs["input_ids"][b : b + 1, real],
                "attention_mask": inputs["attention_mask"][b : b + 1, real],
                "pixel_values": inputs["pixel_values"][b * FRAMES : (b + 1) * FRAMES],
            }
            alone = compressed_logits(model, one, continuation[b : b + 1])
            torch.testing.assert_close(alone[0], together[b], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segments", [1, 2, 3, 9])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("place", ["tower", "projector"])
def test_segments_of_a_video(segments: int, mean: bool, place: str) -> None:
    """Clusters by hand on the projected frames, then the unpruned language model."""
    model, inputs = prepared()
    features, keep = features_of(model, inputs), 31
    pieces = segment_bounds(FRAMES, min(segments, FRAMES))
    budgets = [keep // len(pieces) + (s < keep % len(pieces)) for s in range(len(pieces))]
    options = {"keep": keep, "segments": segments, "place": place}
    with video_family(FRAMES):
        with (
            tokprune.compress(
                model, "centerclip", aggregate="mean" if mean else None, **options
            ) as trace,
            torch.no_grad(),
        ):
            got = model(**inputs).logits[:, -1]
    assert trace.last is not None
    for b, image in enumerate(trace.last.images):
        rows: list[Tensor] = []
        index: list[int] = []
        groups = [-1] * (FRAMES * PATCHES)
        for (start, stop), k in zip(pieces, budgets):
            tokens = features[b, start:stop].flatten(0, 1)
            medoids, clusters = kmedoids_by_hand(tokens, k)
            for m, members in zip(medoids, clusters):
                for i in members:
                    groups[start * PATCHES + i] = len(rows)
                rows.append(tokens[members].mean(0) if mean else tokens[m])
                index.append(start * PATCHES + m)
        assert image.selection is not None
        assert image.selection.index.tolist() == index
        if mean:
            assert image.selection.group is not None
            assert image.selection.group.tolist() == groups
        real = inputs["input_ids"][b][inputs["attention_mask"][b] != 0]
        at = (real == IMAGE_TOKEN).nonzero().flatten()
        embed = model.get_input_embeddings()
        embeds = torch.cat([embed(real[: at[0]]), torch.stack(rows), embed(real[at[-1] + 1 :])])
        with torch.no_grad():
            hidden = model.model.language_model(inputs_embeds=embeds[None], use_cache=False)
            want = model.lm_head(hidden.last_hidden_state)[0, -1]
        torch.testing.assert_close(got[b], want, rtol=1e-4, atol=1e-4)


def test_evs_keeps_what_changed() -> None:
    model, inputs = prepared()
    features, keep = features_of(model, inputs), 80
    with video_family(FRAMES), tokprune.compress(model, "evs", keep=keep) as trace:
        with torch.no_grad():
            model(**inputs)
    assert trace.last is not None
    for b, image in enumerate(trace.last.images):
        assert image.selection is not None
        index = image.selection.index.tolist()
        assert index[:PATCHES] == list(range(PATCHES))
        change = {
            t * PATCHES + i: -float(
                torch.cosine_similarity(features[b, t, i], features[b, t - 1, i], dim=0)
            )
            for t in range(1, FRAMES)
            for i in range(PATCHES)
        }
        wanted = sorted(change, key=lambda i: -change[i])[: keep - PATCHES]
        assert index[PATCHES:] == sorted(wanted)


def hand_made(frames: int, newlines: int, seed: int = 0) -> ImageTokens:
    """Tokens of a video as LLaVA-OneVision packs them: frames of 2×3 cells, then newlines."""
    n = frames * 6
    cell = torch.arange(n)
    off = torch.full((newlines,), -1)
    features = torch.randn(n + newlines, 4, generator=torch.Generator().manual_seed(seed))
    return ImageTokens(
        features=features,
        tile=torch.cat([cell // 6, off]),
        row=torch.cat([cell % 6 // 3, off]),
        col=torch.cat([cell % 3, off]),
        column=torch.arange(n + newlines) + 5,
        newline=torch.arange(n + newlines) >= n,
        patches=n,
        tiles=frames,
        grid=(2, 3),
        original=n + newlines,
        frames=frames,
        video=True,
    )


def stage_of(method: Any) -> Any:
    model = llava()
    family = family_of(model)
    facts = replace(family.facts(model, family.parts(model)), videos=True)
    return method.plan(facts).prompt[0]


@pytest.mark.parametrize(
    "method",
    [tokprune.CenterCLIP(keep=9, segments=3), tokprune.EVS(keep=9),
     tokprune.CenterCLIP(keep=9, segments=3, aggregate="mean")],
)  # fmt: skip
def test_newlines_of_a_video_stay_and_do_not_count(method: Any) -> None:
    videos = [hand_made(4, 1), hand_made(4, 2, seed=1), hand_made(7, 0, seed=2)]
    answers = stage_of(method).select(videos)
    for video, answer in zip(videos, answers):
        index = answer.index
        assert len(index) == 9 + int(video.newline.sum())
        assert (index.diff() > 0).all()
        assert int(video.newline[index].sum()) == int(video.newline.sum())
        if answer.features is not None:
            assert torch.equal(answer.features[video.newline[index]], video.features[video.newline])
        (alone,) = stage_of(method).select([video])
        assert torch.equal(alone.index, index)
    everything = stage_of(type(method)(keep=1.0)).select(videos)
    assert everything == [None, None, None]


def test_fewer_tokens_than_segments() -> None:
    """A budget below the number of segments makes them longer, not empty."""
    (answer,) = stage_of(tokprune.CenterCLIP(keep=2, segments=4)).select([hand_made(6, 1)])
    index = answer.index.tolist()
    assert len(index) == 3
    assert index[0] < 18 <= index[1] < 36 == index[2]


def test_evs_on_still_images_says_that_it_does_nothing() -> None:
    stage = stage_of(tokprune.EVS(keep=0.5))
    with pytest.warns(UserWarning, match="evs found no video in this prompt.*nothing is dropped"):
        assert stage.select([hand_made(1, 1)]) == [None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        still, video = stage.select([hand_made(1, 1), hand_made(4, 1)])
    assert still is None
    assert video is not None


def test_still_images_of_a_video_model_are_clustered_in_the_tower() -> None:
    """``keep`` counts a video; an image that has fewer tokens keeps them all."""
    model = llava()
    inputs = make_inputs(model, BATCHES["four"])
    with torch.no_grad():
        want = model(**inputs).logits
        with tokprune.compress(model, "centerclip", keep=11):
            short = model(**inputs).logits
        with video_family(1):
            with tokprune.compress(model, "centerclip", keep=11):
                assert torch.equal(model(**inputs).logits, short)
            with tokprune.compress(model, "centerclip", keep=200):
                assert torch.equal(model(**inputs).logits, want)


# ------------------------------------------------------------------------------- bad input


def test_evs_refuses_models_without_videos() -> None:
    for build_model in BUILDERS.values():
        model = build_model()
        with pytest.raises(tokprune.UnsupportedModelError, match="takes still images only"):
            tokprune.patch(model, "evs", keep=0.5)
        assert not tokprune.is_patched(model)


def test_videos_inside_the_encoder_are_refused() -> None:
    model, inputs = prepared()
    with video_family(FRAMES), tokprune.compress(model, "centerclip", keep=30, place="encoder"):
        with pytest.raises(ValueError, match="place='encoder' clusters still images"):
            model(**inputs)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep=0"),
        ({"keep": 37}, ValueError, "keep=37 is larger than the 36"),
        ({"keep": 9, "segments": 0}, ValueError, "segments=0 should be a whole number"),
        ({"keep": 9, "segments": 1.5}, ValueError, "segments=1.5"),
        ({"keep": 9, "place": "decoder"}, ValueError, "place='decoder' should be one of"),
        ({"keep": 9, "layer": 2}, ValueError, "layer=2 belongs to place='encoder'"),
        ({"keep": 9, "layer": 0, "place": "encoder"}, ValueError, "layer=0 should be"),
        ({"keep": 9, "layer": 5, "place": "encoder"}, ValueError, "layer=5 comes after layer 4"),
        ({"keep": 9, "algorithm": "pooling"}, ValueError, "algorithm='pooling' should be one of"),
        ({"keep": 9, "aggregate": "max"}, ValueError, "aggregate='max' should be one of"),
        ({"keep": 9, "distance": "l1"}, ValueError, "distance='l1' should be one of"),
        ({"keep": 9, "p": 0}, ValueError, "p=0 should be a number above 0"),
        ({"keep": 9, "iterations": 0}, ValueError, "iterations=0"),
        ({"keep": 9, "graph": "full"}, ValueError, "graph='full'"),
        ({"keep": 9, "sigma": 0.0}, ValueError, "sigma=0.0"),
        ({"keep": 9, "neighbours": 0}, ValueError, "neighbours=0"),
        ({"keep": 9, "order": "random"}, ValueError, "order='random'"),
        ({"keep": 9, "positions": "new"}, ValueError, "positions='new'"),
        ({"keep": 9, "scope": "batch"}, ValueError, "scope='batch'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = llava()
    with pytest.raises(error, match=message):
        tokprune.patch(model, "centerclip", **options)
    assert not tokprune.is_patched(model)


def test_several_feature_layers_are_refused_in_the_tower_only() -> None:
    model = llava()
    model.config.vision_feature_layer = [-2, -3]
    with pytest.raises(tokprune.UnsupportedModelError, match="vision_feature_layer"):
        tokprune.patch(model, "centerclip", keep=9)
    tokprune.patch(model, "centerclip", keep=9, place="projector")
    tokprune.unpatch(model)
