"""Bad input: a clear exception that names the argument and what would be right; model unharmed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import IMAGE_TOKEN, llava, make_inputs
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    LlavaForConditionalGeneration,
)

import tokprune

PROMPT = [[4, "image", 6]]


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


# (id, method, options, exception, pattern)
OPTIONS: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("unknown method", "fastvv", {}, ValueError, r"method='fastvv' is unknown.*'fastv'"),
    ("not a method", 3, {}, TypeError, r"method=3 should be a method name"),
    ("unknown option", "fastv", {"keep": 7, "rws": "last"}, ValueError, r"'rws'.*'rows'"),
    ("missing keep", "random", {}, ValueError, r"'keep' is required by random"),
    ("keep zero", "random", {"keep": 0}, ValueError, r"keep=0 should be at least 1"),
    ("keep negative", "random", {"keep": -3}, ValueError, r"keep=-3 should be at least 1"),
    ("fraction above 1", "random", {"keep": 1.5}, ValueError, r"keep=1.5 should be a fraction"),
    ("fraction zero", "random", {"keep": 0.0}, ValueError, r"keep=0.0 should be a fraction"),
    ("keep nan", "random", {"keep": float("nan")}, ValueError, r"keep=nan should be a fraction"),
    ("keep text", "random", {"keep": "64"}, TypeError, r"keep='64' should be a number"),
    ("keep bool", "random", {"keep": True}, TypeError, r"keep=True should be a number"),
    ("keep too large", "random", {"keep": 37}, ValueError, r"keep=37 is larger than the 36"),
    (
        "layer zero",
        "fastv",
        {"keep": 7, "prune_before": 0},
        ValueError,
        r"prune_before=0 should",
    ),
    (
        "layer too deep",
        "fastv",
        {"keep": 7, "prune_before": 8},
        ValueError,
        r"=8 should",
    ),
    ("bad choice", "fastv", {"keep": 7, "rows": "all"}, ValueError, r"rows='all' should be one of"),
]


@pytest.mark.parametrize(
    ("method", "options", "error", "pattern"), [o[1:] for o in OPTIONS], ids=[o[0] for o in OPTIONS]
)
def test_bad_options(
    model: Any, method: Any, options: dict[str, Any], error: type[Exception], pattern: str
) -> None:
    with pytest.raises(error, match=pattern):
        tokprune.patch(model, method, **options)
    assert not tokprune.is_patched(model)


def _drop_placeholder(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    at = int((inputs["input_ids"][0] == IMAGE_TOKEN).nonzero()[0])
    inputs["input_ids"][0, at] = 5
    return inputs


def _text_inside_image(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    ids = inputs["input_ids"][0]
    first = int((ids == IMAGE_TOKEN).nonzero()[0])
    ids[first + 3], ids[first - 1] = 5, IMAGE_TOKEN
    return inputs


def _masked_image(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    inputs["attention_mask"][:, 10] = 0
    return inputs


def _short_mask(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "attention_mask": inputs["attention_mask"][:, 1:]}


def _mask_4d(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    n = inputs["input_ids"].shape[1]
    return {**inputs, "attention_mask": torch.zeros(1, 1, n, n)}


def _nan_pixels(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], float("nan"))}


def _inf_pixels(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    inputs["pixel_values"][0, ..., 0, 0] = float("inf")
    return inputs


def _offloaded_cache(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    class Offloaded(DynamicCache):
        pass

    return {**inputs, "past_key_values": Offloaded()}


def _embeds(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    inputs.pop("pixel_values")
    return {**inputs, "inputs_embeds": embeds}


def _other_layer(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "vision_feature_layer": -1}


# (id, method, change of the inputs, exception, pattern)
INPUTS: list[tuple[str, str, Callable[..., Any], type[Exception], str]] = [
    ("placeholder missing", "random", _drop_placeholder, ValueError, r"input_ids holds 35 image"),
    ("text in image", "random", _text_inside_image, ValueError, r"not\s+contiguous"),
    ("image masked", "random", _masked_image, ValueError, r"attention_mask hides image"),
    ("mask too short", "random", _short_mask, ValueError, r"attention_mask has 45 columns"),
    ("4-d mask", "random", _mask_4d, ValueError, r"attention_mask with 4 dimensions"),
    ("nan", "random", _nan_pixels, ValueError, r"NaN or infinite.*pixel_values"),
    ("nan, decoder", "fastv", _nan_pixels, ValueError, r"NaN or infinite.*pixel_values"),
    ("inf", "random", _inf_pixels, ValueError, r"NaN or infinite.*pixel_values"),
    ("cache subclass", "fastv", _offloaded_cache, ValueError, r"past_key_values=Offloaded"),
    ("embeds, prompt stage", "random", _embeds, ValueError, r"inputs_embeds.*input_ids"),
    ("embeds, no positions", "fastv", _embeds, ValueError, r"inputs_embeds.*visual_positions"),
    ("other feature layer", "random", _other_layer, ValueError, r"vision_feature_layer=-1 differs"),
]


@pytest.mark.parametrize(
    ("method", "change", "error", "pattern"), [i[1:] for i in INPUTS], ids=[i[0] for i in INPUTS]
)
def test_bad_inputs(
    model: Any, method: str, change: Callable[..., Any], error: type[Exception], pattern: str
) -> None:
    good = make_inputs(model, PROMPT)
    with torch.no_grad():
        want = model(**good).logits
    bad = change(model, make_inputs(model, PROMPT))
    with tokprune.compress(model, method, keep=7), torch.no_grad():
        with pytest.raises(error, match=f"(?s){pattern}"):
            model(**bad)
        short = model(**good).logits  # the next call works
    assert short.shape[1] < want.shape[1]
    with torch.no_grad():
        assert torch.equal(model(**good).logits, want)


def test_mismatch_is_found_before_the_vision_tower_runs(model: Any) -> None:
    bad = _drop_placeholder(model, make_inputs(model, PROMPT))
    calls: list[int] = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with tokprune.compress(model, "random", keep=7), pytest.raises(ValueError):
            model(**bad)
    finally:
        handle.remove()
    assert not calls


def test_visual_positions_shape() -> None:
    model = llava()
    bad = _embeds(model, make_inputs(model, PROMPT))
    mask = torch.zeros(1, 3, dtype=torch.bool)
    with tokprune.compress(model, "fastv", keep=7), tokprune.visual_positions(mask):
        with pytest.raises(ValueError, match=r"visual_positions mask has shape \(1, 3\)"):
            model(**bad)


def test_unknown_model_lists_the_known_ones() -> None:
    config = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                              num_attention_heads=1, image_size=8, patch_size=4)  # fmt: skip
    with pytest.raises(tokprune.UnsupportedModelError) as error:
        tokprune.patch(CLIPVisionModel(config), "random", keep=2)
    for name in tokprune.supported_models():
        assert name in str(error.value)
    assert "CLIPVisionModel" in str(error.value)


def _other_tower() -> Any:
    from transformers import Dinov2Config

    config = llava().config
    config.vision_config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                        image_size=24, patch_size=4, mlp_ratio=1)  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _other_decoder() -> Any:
    from transformers import GPTNeoXConfig

    config = llava().config
    config.text_config = GPTNeoXConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                       num_attention_heads=4, vocab_size=100)  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _several_feature_layers() -> Any:
    model = llava()
    model.config.vision_feature_layer = [-2, -3]
    return model


def _siglip_that_cuts_a_patch() -> Any:
    model = llava("siglip")
    model.config.vision_feature_select_strategy = "default"
    return model


# (id, model, method, options, pattern)
WRONG_MODELS: list[tuple[str, Callable[[], Any], str, dict[str, Any], str]] = [
    ("tower", _other_tower, "fastv", {"keep": 4}, r"vision tower Dinov2Model.*CLIP or SigLIP"),
    ("decoder", _other_decoder, "fastv", {"keep": 4}, r"decoder GPTNeoXModel.*self_attn and mlp"),
    ("feature layers", _several_feature_layers, "flowcut", {"keep": 4}, r"vision_feature_layer"),
    ("feature layers, merge", _several_feature_layers, "tome", {"r": 2}, r"vision_feature_layer"),
    ("no class token to cut", _siglip_that_cuts_a_patch, "random", {"keep": 4}, r"'full'"),
]


@pytest.mark.parametrize(
    ("build", "method", "options", "pattern"),
    [w[1:] for w in WRONG_MODELS],
    ids=[w[0] for w in WRONG_MODELS],
)
def test_wrong_tower_or_decoder(
    build: Callable[[], Any], method: str, options: dict[str, Any], pattern: str
) -> None:
    model = build()
    with pytest.raises(tokprune.UnsupportedModelError, match=pattern):
        tokprune.patch(model, method, **options)
    assert not tokprune.is_patched(model)


def test_unknown_attention_backend() -> None:
    model = llava()
    model.config.text_config._attn_implementation_internal = "flex_attention"
    with pytest.raises(
        tokprune.UnsupportedModelError, match="attn_implementation='flex_attention'"
    ):
        tokprune.patch(model, "random", keep=2)


def test_features_encoded_before_patching_are_refused() -> None:
    model = llava()
    inputs = make_inputs(model, PROMPT)
    with torch.no_grad():
        early = model.model.get_image_features(inputs["pixel_values"])
    if not hasattr(early, "pooler_output"):
        pytest.skip("this transformers takes no pre-computed image features")
    inputs.pop("pixel_values")
    with (
        tokprune.compress(model, "random", keep=2),
        pytest.raises(ValueError, match="mm_encoder_outputs was computed before"),
    ):
        model(**inputs, mm_encoder_outputs={"image": early})


def test_compose_says_why() -> None:
    model = llava()
    with pytest.raises(tokprune.CompositionError, match="at least two methods"):
        tokprune.compose(tokprune.FastV(keep=4))
    with pytest.raises(tokprune.CompositionError, match="Random and Random both select"):
        both = tokprune.compose(tokprune.Random(keep=4), tokprune.Random(keep=3))
        tokprune.patch(model, both)
    with pytest.raises(tokprune.CompositionError, match="FastV and FastV both prune inside"):
        tokprune.patch(model, tokprune.compose(tokprune.FastV(keep=4), tokprune.FastV(keep=3)))
    assert not tokprune.is_patched(model)


def test_preset_that_is_not_published() -> None:
    with pytest.raises(ValueError, match=r"FastV.preset\('llava-1.5', 77\) is not published"):
        tokprune.FastV.preset("llava-1.5", 77)
