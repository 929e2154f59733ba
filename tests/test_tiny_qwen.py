"""The tiny models and prompts of the Qwen, GLM and Pixtral families against the genuine forward."""

import functools
from typing import Any

import pytest
import torch
import transformers

from tokprune.testing import tiny_glm, tiny_pixtral, tiny_qwen
from tokprune.testing.pieces import PromptMaker

FAMILIES = {**tiny_qwen.FAMILIES, **tiny_glm.FAMILIES, **tiny_pixtral.FAMILIES}
HYBRID = {"qwen3.5", "qwen3.5-moe"}
IMAGES: list[list[Any]] = [[4, "image", 5, "image", 3], [12], [3, "image", 7]]
VIDEOS: list[list[Any]] = [[4, "video", 5], [6], [2, "video", 3, "video", 2]]
BOTH: list[list[Any]] = [[4, "image", 3, "video", 5], [5], [2, "video", 3, "image", 9]]
TEXT: list[list[Any]] = [[5], [9]]


@functools.cache
def built(name: str, attention: str) -> tuple[Any, PromptMaker]:
    build, maker = FAMILIES[name]
    return build(attention=attention), maker


def slices(prompts: list[list[Any]]) -> list[tuple[slice, slice]]:
    """Which images and videos of a batch belong to each row."""
    out, images, videos = [], 0, 0
    for prompt in prompts:
        i, v = prompt.count("image"), prompt.count("video")
        out.append((slice(images, images + i), slice(videos, videos + v)))
        images, videos = images + i, videos + v
    return out


@torch.no_grad()
def check(model: Any, maker: PromptMaker, prompts: list[list[Any]], most: float, side: str) -> None:
    """Logits of rows in a batch are those of the rows alone; ``generate()`` runs."""
    inputs = maker.inputs(model, prompts, pad_side=side)
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    spread = logits[inputs["attention_mask"] != 0].std(0).mean()
    assert 0.4 < spread < 5, f"{spread=}: tokens are all alike, or the logits too large"
    for row, (images, videos) in enumerate(slices(prompts)):
        alone = model(**maker.row(inputs, row, images, videos)).logits[0]
        batched = logits[row, inputs["attention_mask"][row] != 0]
        assert (alone - batched).abs().max() < most * logits.abs().max()
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch_equal_rows_alone(name: str, attention: str) -> None:
    model, maker = built(name, attention)
    # chunks of a recurrence begin elsewhere behind padding, and so round differently
    most = 1e-4 if name in HYBRID else 1e-5
    cases = [IMAGES, TEXT]
    if name not in tiny_pixtral.FAMILIES:
        cases.append(VIDEOS)
    if name in tiny_qwen.FAMILIES:
        cases.append(BOTH)
    for prompts in cases:
        for side in ("left", "right"):
            check(model, maker, prompts, most, side)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_sizes_are_rounded_to_cells_and_grids_differ(name: str) -> None:
    model, maker = built(name, "sdpa")
    prompts: list[list[Any]] = [[2, "image", 2, "image", 3]]
    model(**maker.inputs(model, prompts, sizes=[(3, 71), (30, 18)]))
    shape = "image_grid_thw" if name not in tiny_pixtral.FAMILIES else "image_sizes"
    grids = maker.inputs(model, [["image"] * len(maker.sizes)])[shape].tolist()
    assert len({tuple(grid) for grid in grids}) >= 4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_pixels_and_positions_matter(name: str) -> None:
    """The last token's logits follow the pixels, and the token types where there are any."""
    model, maker = built(name, "sdpa")
    inputs = maker.inputs(model, [[4, "image", 6]])
    before = model(**inputs).logits[0, -1]
    other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}).logits[0, -1]
    assert (before - other).abs().max() > 0.03
    if maker.types is not None:
        flat = inputs["attention_mask"].cumsum(-1)[None].expand(3, -1, -1) - 1
        line = model(**inputs, position_ids=flat).logits[0, -1]
        assert (before - line).abs().max() > 0.03


@pytest.mark.parametrize("name", tiny_glm.FAMILIES)
def test_glm_refuses_images_beside_videos(name: str) -> None:
    """The genuine model counts placeholders of both together; so do prompts for it stay apart."""
    model, maker = built(name, "sdpa")
    with pytest.raises(ValueError, match="do not match"):
        model(**maker.inputs(model, [[4, "image", 3, "video", 5]]))


def test_frames_of_a_video_are_islands_in_qwen3_vl() -> None:
    model, maker = built("qwen3-vl", "sdpa")
    inputs = maker.inputs(model, [[3, "video", 3]], frames=6)
    video = (inputs["input_ids"][0] == model.config.video_token_id).int()
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 6]]
    assert int((video.diff() == 1).sum()) == 3
    assert int(video.sum()) == 3 * 4 * 6 // 4


@pytest.mark.skipif(not hasattr(transformers, "Ministral3Config"), reason="not in this release")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_ministral3_scales_queries_by_position(attention: str) -> None:
    """Its positions are absolute, so a plain forward of a padded row has to be told them."""
    model, maker = tiny_pixtral.mistral3(attention, decoder="ministral3"), tiny_pixtral.RowMaker()
    inputs = maker.inputs(model, [[4, "image", 5], [3, "image", 19]])
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**inputs, position_ids=positions).logits
    for row in range(2):
        alone = model(**maker.row(inputs, row, slice(row, row + 1))).logits[0]
        batched = logits[row, inputs["attention_mask"][row] != 0]
        assert (alone - batched).abs().max() < 1e-5 * logits.abs().max()
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
