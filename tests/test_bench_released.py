"""Random weights of released shapes: sizes of the checkpoints, and the bench from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tokprune.bench.models import PRESETS, image_of, parameters_of, random_model, skeleton
from tokprune.bench.prompts import default_image, encode, prompt
from tokprune.bench.released import RELEASED, Released
from tokprune.families import bind
from tokprune.trace.costs import unpruned_numbers

#: weights of the checkpoints, visual tokens at the preset's size
SIZES = {
    "qwen2.5-vl-7b": (8_292_166_656, 1296),
    "qwen2.5-vl-7b-1792px": (8_292_166_656, 4096),
    "qwen3-vl-8b": (8_767_123_696, 1024),
    "internvl3-8b": (7_944_373_760, 13 * 256),
    "gemma3-4b": (4_300_079_472, 256),
}
_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
_PACKED = {**_VISION, "depth": 4, "num_heads": 2, "out_hidden_size": 64}
#: of a small vocabulary
_QWEN_TOKENS = {
    "image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}  # fmt: skip
_STACKED = {**_VISION, "num_hidden_layers": 2, "num_attention_heads": 2}


def small(name: str) -> Released:
    """The shape with the widths of a toy and a small picture, all else as it is."""
    shape = RELEASED[name]
    if name.startswith("qwen2.5"):
        rotary = {"mrope_section": [2, 3, 3]}
        vision = {**_PACKED, "fullatt_block_indexes": [1, 3]}
        return shape.changed(_TEXT, vision, size=(112, 140), rotary=rotary, rest=_QWEN_TOKENS)
    if name.startswith("qwen3"):
        rotary = {**shape.rotary, "mrope_section": [3, 3, 2]}
        vision = {**_PACKED, "deepstack_visual_indexes": [0, 1, 2]}
        text = {**_TEXT, "head_dim": 16}
        return shape.changed(text, vision, size=(128, 160), rotary=rotary, rest=_QWEN_TOKENS)
    if name.startswith("internvl"):
        vision = {**_STACKED, "image_size": [112, 112]}
        rest = {**shape.rest, "image_seq_length": 16, "image_token_id": 250}
        return shape.changed(_TEXT, vision, size=(112, 224), rest=rest)
    text = {**_TEXT, "head_dim": 16, "num_hidden_layers": 6}
    text["layer_types"] = shape.text["layer_types"][:6]
    tokens = {"boi_token_index": 251, "eoi_token_index": 252, "image_token_index": 250}
    rest = {**shape.rest, **tokens, "mm_tokens_per_image": 16}
    return shape.changed(text, {**_STACKED, "image_size": 112}, rest=rest)


TOKENS = {"qwen2.5-vl-7b": 20, "qwen3-vl-8b": 20, "internvl3-8b": 48, "gemma3-4b": 16}


@pytest.mark.parametrize("name", SIZES)
def test_released_sizes(name: str) -> None:
    weights, tokens = SIZES[name]
    assert parameters_of(PRESETS[name]) == weights
    bare = skeleton(name)
    encoded = encode(bare, image_of(name))
    assert encoded.tokens == tokens
    inputs = prompt(bare, encoded, 32, 2)
    assert inputs["input_ids"].shape == (2, 32 + len(encoded.ids))
    known = bind(bare)
    numbers = unpruned_numbers(known, inputs)
    assert [n.tokens_last for n in numbers] == [tokens] * 2
    # two operations a weight and text token, at the very least
    assert numbers[0].macs > tokens * 0.5 * weights


def test_every_released_shape_is_tested_and_says_its_source() -> None:
    assert set(SIZES) == set(RELEASED)
    assert set(TOKENS) == {name.removesuffix("-1792px") for name in SIZES}
    assert all("config.json" in shape.source for shape in RELEASED.values())
    assert "qwen2.5-vl-7b" in PRESETS


@pytest.mark.parametrize("name", TOKENS)
def test_models_of_released_shapes_run(name: str) -> None:
    shape = small(name)
    model = random_model(shape)
    inputs = prompt(model, encode(model, default_image(shape.size)), 12, 2)
    with torch.inference_mode():
        logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert torch.equal(logits[0], logits[1])
    assert 0.05 < float(logits.std()) < 50
    weights = dict(model.named_parameters())
    assert all(p.detach().abs().sum() > 0 for p in weights.values())


@pytest.mark.parametrize("name", TOKENS)
def test_command_line_measures_released_shapes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokprune.cli import app

    monkeypatch.setitem(PRESETS, name, small(name))
    options = {
        "--random-weights": name, "--methods": "fastv", "--keep": "6", "--rounds": "1",
        "--new-tokens": "2", "--batch-sizes": "2", "--text-tokens": "16", "--threads": "1",
        "--device": "cpu", "--json": str(tmp_path / "bench.json"),
    }  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        app(["bench", *[x for pair in options.items() for x in pair]])
    assert stop.value.code == 0
    assert f"{TOKENS[name]} visual tokens" in capsys.readouterr().out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["unpruned"]["tokens_last"] == TOKENS[name]
    for trial in result["trials"]:
        assert trial["tokens_last"] == 6
        assert trial["flops_prefill"] < result["unpruned"]["flops_prefill"]


def test_own_picture_keeps_its_size() -> None:
    shape = replace(small("qwen2.5-vl-7b"), size=(56, 56))
    model = random_model(shape)
    assert encode(model, default_image((56, 84))).tokens == 2 * 3
    assert encode(model, default_image((70, 70))).tokens == 2 * 2


def test_patches_are_those_of_the_processor() -> None:
    """The order in which transformers' own processor packs patches and cells."""
    kind: Any = getattr(transformers, "Qwen2VLImageProcessorPil", None)
    kind = kind or transformers.Qwen2VLImageProcessor
    model = random_model(small("qwen2.5-vl-7b"))
    image = default_image((112, 140))
    half = [0.5] * 3
    processor = kind(image_mean=half, image_std=half, min_pixels=1, max_pixels=10**6)
    made = processor(images=[image], return_tensors="pt")
    own = encode(model, image).inputs
    assert torch.equal(own["image_grid_thw"], torch.as_tensor(made["image_grid_thw"]))
    assert torch.allclose(own["pixel_values"], torch.as_tensor(made["pixel_values"]), atol=0.02)
