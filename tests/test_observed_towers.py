"""What stages see of vision encoders that they cannot change: attention and keys by token."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tokprune.families import bind
from tokprune.testing import tiny_gemma, tiny_glm, tiny_pixtral, tiny_qwen, tiny_tiles

FAMILIES = {
    **tiny_gemma.FAMILIES, **tiny_glm.FAMILIES, **tiny_pixtral.FAMILIES, **tiny_qwen.FAMILIES,
    **tiny_tiles.FAMILIES,
}  # fmt: skip
OBSERVED = [n for n in FAMILIES if n not in ("gemma4", "paligemma", "paligemma2")]
PROMPTS = [[4, "image", 2, "image", 6], [3, "image", 5]]


class Spy:
    """Records the maps and keys of an attention module under eager attention, call by call."""

    def __init__(self, monkeypatch: Any, module: Any) -> None:
        home = sys.modules[type(module).__module__]
        genuine = home.eager_attention_forward
        self.maps: list[Tensor] = []
        self.keys: list[Tensor] = []

        def spying(
            own: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
        ) -> Any:
            out, weights = genuine(own, query, key, value, attention_mask, **kwargs)
            if own is module:
                if attention_mask is not None:  # queries of padded pixels do not count
                    seen = weights.sum(2, keepdim=True).transpose(2, 3) > 0
                    weights = weights.masked_fill(~seen, 0.0)
                self.maps.append(weights.detach())
                self.keys.append(key.detach())
            return out, weights

        monkeypatch.setattr(home, "eager_attention_forward", spying)


def by_patch(spy: Spy, cls: int, rows: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Of every tile or frame: attention [N] and mean key [N, d] of each patch, in tower order."""
    found = []
    for maps, keys in zip(spy.maps, spy.keys):
        for tile, (weights, own) in enumerate(zip(maps, keys)):
            start = 0
            # a call may hold the frames of several images, which do not see each other
            parts = rows if sum(rows) == weights.shape[-1] and len(spy.maps) == 1 else [None]
            for length in parts:
                end = weights.shape[-1] if length is None else start + length
                map_ = weights[:, start:end, start:end]
                if cls:
                    score = map_[:, 0].sum(0)
                else:
                    mean = map_.mean(0)
                    n = int((mean.sum(1) > 0).sum())
                    score = (mean.sum(0) - mean.diagonal()) / (n - 1)
                found.append((score[cls:], own[:, start:end].mean(0)[cls:]))
                start = end
            assert tile >= 0
    return found


def cells_of(family: str, model: Any, number: int, inputs: Any) -> list[list[int]]:
    """Of every token of tile (or frame) ``number`` of the batch, the patches that make it, as
    places in tower order."""
    config = model.config
    if "pixtral" in family or family == "mistral3":
        m = getattr(config, "spatial_merge_size", 1)
        height, width = (int(x) // config.vision_config.patch_size
                         for x in inputs["image_sizes"][number])  # fmt: skip
    elif "image_grid_thw" in inputs:
        m = config.vision_config.spatial_merge_size
        _, height, width = inputs["image_grid_thw"][number].tolist()
        order = list(range(height * width // m**2))
        if family == "qwen2.5-vl":
            order = window_index(model, inputs["image_grid_thw"][number : number + 1])
        found: list[list[int]] = [[] for _ in order]
        for place, cell in enumerate(order):
            found[cell] = [place * m * m + i for i in range(m * m)]
        return found
    else:
        bound = bind(model)
        assert bound.facts.observed is not None
        m, (height, width) = bound.facts.observed.merges, bound.facts.observed.grid
    return [
        [y * width + x for y in range(r * m, r * m + m) for x in range(c * m, c * m + m)]
        for r in range(height // m)
        for c in range(width // m)
    ]


def window_index(model: Any, grid: Tensor) -> list[int]:
    """Raster number of the tokens in the order of Qwen2.5-VL's encoder, by its own code."""
    visual = model.model.visual
    if hasattr(visual, "get_window_index"):
        return visual.get_window_index(grid)[0].tolist()  # type: ignore[no-any-return]
    from transformers.vision_utils import get_vision_window_index

    vision = model.config.vision_config
    size = vision.window_size // vision.spatial_merge_size // vision.patch_size
    try:
        index, _ = get_vision_window_index(
            grid, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
    except TypeError:
        index, _ = get_vision_window_index(grid, vision.spatial_merge_size, size)
    return index.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", OBSERVED)
def test_scores_and_keys_are_those_of_the_tower(family: str, monkeypatch: Any) -> None:
    build, maker = FAMILIES[family]
    model = build(attention="eager")
    inputs = maker.inputs(model, PROMPTS)
    bound = bind(model)
    observed, tower = bound.facts.observed, bound.parts.observed
    assert observed is not None
    assert tower is not None
    assert observed.feature_layer is not None
    with tokprune.compress(model, "visionzip", keep=2) as trace, torch.no_grad():
        model(**inputs)
    spy = Spy(monkeypatch, tower.attentions[observed.feature_layer])
    with torch.no_grad():
        model(**inputs)
    records = trace.last.records
    rows = [n for r in records for n in r.layout.segments.full]
    patches = by_patch(spy, int(observed.has_cls), rows)
    number = 0
    for record in records:
        score, metric = [], []
        for _ in range(record.layout.tiles):
            own, keys = patches[number]
            for cell in cells_of(family, model, number, inputs):
                score.append(own[cell].mean())
                metric.append(keys[cell].mean(0))
            number += 1
        torch.testing.assert_close(record.score, torch.stack(score), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(record.metric, torch.stack(metric), atol=1e-5, rtol=1e-4)
    assert number == len(patches)


@pytest.mark.parametrize("family", ["internvl", "qwen2.5-vl", "gemma3"])
def test_tower_stages_that_change_rows_are_refused_by_name(family: str) -> None:
    model = FAMILIES[family][0]()
    for method in ("pitome", "tome", "flowcut"):
        with pytest.raises(tokprune.UnsupportedModelError, match=f"{method} works inside the"):
            tokprune.patch(model, method, keep=4)
    assert not tokprune.is_patched(model)
