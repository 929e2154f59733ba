"""The tiny models of newer families and their prompts, held against transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tokprune.testing import tiny_gemma, tiny_others, tiny_tiles
from tokprune.testing.tiny import IMAGE_TOKEN, VIDEO_TOKEN

FAMILIES = {**tiny_gemma.FAMILIES, **tiny_tiles.FAMILIES, **tiny_others.FAMILIES}
#: soft-capped scores exist in eager only (transformers 4.57's sdpa drops the cap without a word)
EAGER_ONLY = ("paligemma2", "llava-1.5/gemma2")
VIDEOS = ("gemma4", "internvl", "video-llava")
CASES = [
    (name, attention)
    for name in FAMILIES
    for attention in ("eager", "sdpa")
    if attention == "eager" or name not in EAGER_ONLY
]
SIZES = [(24, 24), (24, 48), (48, 24), (20, 24)]
#: placeholders of images of 24 × 24 and 24 × 48 pixels, and of a video of 3 frames
COUNTS = {
    "gemma3": (16, 16),
    "gemma4": (9, 18, 18),
    "paligemma": (36, 36),
    "paligemma2": (36, 36),
    "internvl": (9, 27, 27),
    "smolvlm": (9, 27),
    "idefics3": (9, 27),
    "aya-vision": (9, 27),
    "cohere2-vision": (9, 27),
    "video-llava": (36, 36, 111),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
every_case = pytest.mark.parametrize(("name", "attention"), CASES)


@lru_cache(maxsize=2)
def model_of(name: str, attention: str = "eager", layers: int = 4) -> Any:
    return FAMILIES[name][0](attention=attention, layers=layers)


def batch(name: str) -> tuple[list[list[Any]], list[tuple[slice, slice]]]:
    """Prompts with images of different sizes, two images, none, and videos where there are any;
    and which of the batch's images and videos belong to each."""
    prompts: list[list[Any]] = [[4, "image", 6], [3], [2, "image", 3, "image", 5], [9, "image", 2]]
    prompts.append([5])
    if name in VIDEOS:
        prompts[1] = [3, "video", 4]
        prompts[3] = [4, "video", 3, "image", 2]
    parts, images, videos = [], 0, 0
    for prompt in prompts:
        more_images, more_videos = prompt.count("image"), prompt.count("video")
        parts.append((slice(images, images + more_images), slice(videos, videos + more_videos)))
        images, videos = images + more_images, videos + more_videos
    return prompts, parts


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_is_the_row_alone(name: str, attention: str, side: str) -> None:
    model, maker = model_of(name, attention), FAMILIES[name][1]
    prompts, parts = batch(name)
    inputs = maker.inputs(model, prompts, SIZES, pad_side=side, frames=3)
    together = logits(model, inputs)
    real = inputs["attention_mask"] != 0
    assert together.isfinite().all()
    assert 0.5 < float(together[real].std(0).mean()) < 5
    for row, (images, videos) in enumerate(parts):
        alone = maker.row(inputs, row, images, videos)
        assert alone["attention_mask"].all()
        difference = (together[row][real[row]] - logits(model, alone)[0]).abs().max()
        assert difference <= 1e-5 * together[real].abs().max(), f"row {row}"


@every_case
def test_generate_gives_a_padded_row_the_same_tokens(name: str, attention: str) -> None:
    model, maker = model_of(name, attention), FAMILIES[name][1]
    prompts, parts = batch(name)
    inputs = maker.inputs(model, prompts, SIZES, frames=3)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    together = model.generate(**inputs, **options)[:, -3:]
    for row in (0, 4):
        alone = maker.row(inputs, row, *parts[row])
        assert model.generate(**alone, **options)[0, -3:].tolist() == together[row].tolist()


@every_family
def test_backends_agree_and_pixels_matter(name: str) -> None:
    maker, prompts = FAMILIES[name][1], [[4, "image", 6]]
    model = model_of(name)
    inputs = maker.inputs(model, prompts, SIZES)
    one = logits(model, inputs)
    pixels = next(key for key in inputs if key.startswith("pixel_values"))
    other = logits(model, {**inputs, pixels: inputs[pixels].flip(-1)})
    assert (one[0, -1] - other[0, -1]).abs().max() > 0.02 * one.abs().max()
    if name not in EAGER_ONLY:
        again = logits(model_of(name, "sdpa"), inputs)
        assert (one - again).abs().max() <= 1e-5 * one.abs().max()


@every_family
def test_placeholders_of_images_and_videos(name: str) -> None:
    model, maker = model_of(name), FAMILIES[name][1]
    counts = COUNTS.get(name, (36, 36))
    ids = maker.inputs(model, [["image"], ["image"]], SIZES)["input_ids"]
    assert tuple((ids == IMAGE_TOKEN).sum(-1).tolist()) == counts[:2]
    if name in VIDEOS:
        ids = maker.inputs(model, [["video"]], frames=3)["input_ids"]
        assert int(((ids == IMAGE_TOKEN) | (ids == VIDEO_TOKEN)).sum()) == counts[2]
    else:
        with pytest.raises(NotImplementedError, match="makes no videos"):
            maker.inputs(model, [["video"]])


def test_tiles_stand_between_markers() -> None:
    def runs(name: str) -> list[int]:
        ids = FAMILIES[name][1].inputs(model_of(name), [["image"]], [(48, 48)])["input_ids"][0]
        text = "".join("x" if i == IMAGE_TOKEN else " " for i in ids.tolist())
        return [len(run) for run in text.split()]

    assert runs("internvl") == [45]
    for name in ("smolvlm", "idefics3", "aya-vision", "cohere2-vision"):
        assert runs(name) == [9] * 5


def test_weights_follow_the_seed() -> None:
    for name in ("gemma3", "internvl"):
        build = FAMILIES[name][0]
        first, again, other = (build(layers=2, seed=seed).lm_head.weight for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def changed(build: Callable[..., Any], **options: Any) -> float:
    """How far the last logits move when a builder gets other options, relative to the largest."""
    maker = next(made[1] for made in FAMILIES.values() if made[0] is build)
    here, there = build(attention="eager", layers=4), build(attention="eager", layers=4, **options)
    inputs = maker.inputs(here, [["image", 9]], SIZES)
    one, other = logits(here, inputs)[0, -1], logits(there, inputs)[0, -1]
    return float((one - other).abs().max() / one.abs().max())


def test_windows_hide_keys() -> None:
    for build in (tiny_gemma.gemma3, tiny_tiles.aya_vision, tiny_tiles.cohere2_vision):
        assert changed(build, window=500) > 0.02
    for decoder in ("mistral", "phi3", "gemma2"):
        build = FAMILIES[f"llava-1.5/{decoder}"][0]
        assert changed(build, window=6) > 0.02


def test_soft_caps_count() -> None:
    assert changed(tiny_gemma.paligemma2, attn_logit_softcapping=None) > 0.01


def test_internvl_with_qwen3() -> None:
    model, maker = tiny_tiles.internvl(decoder="qwen3", layers=4), FAMILIES["internvl"][1]
    assert hasattr(model.model.language_model.layers[0].self_attn, "q_norm")
    inputs = maker.inputs(model, [[4, "image", 6]], SIZES)
    assert logits(model, inputs).isfinite().all()


@pytest.mark.skipif("gemma4" not in FAMILIES, reason="this transformers has no Gemma 4")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gemma4_with_inputs_per_layer_and_shared_keys(attention: str) -> None:
    maker = FAMILIES["gemma4"][1]
    for options in ({"per_layer": True}, {"shared": 3}):
        model = tiny_gemma.gemma4(attention, **options)
        prompts, parts = batch("gemma4")
        inputs = maker.inputs(model, prompts, SIZES)
        together = logits(model, inputs)
        for row, (images, videos) in enumerate(parts):
            alone = logits(model, maker.row(inputs, row, images, videos))[0]
            difference = (together[row][inputs["attention_mask"][row] != 0] - alone).abs().max()
            assert difference <= 1e-5 * together.abs().max()
        assert model.generate(**inputs, max_new_tokens=3).shape[0] == len(prompts)
