"""MACs of every family against PyTorch's own flop counter: unpruned, pruned at the input and inside
the decoder, a decode step after it, and what the counter sees beside them, in words."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from flop_counts import Counted, counts
from toy_methods import DropInDecoder

import tokprune
from tokprune.engine.compat import RELEASE
from tokprune.engine.model import Segments
from tokprune.families import bind
from tokprune.methods import Method
from tokprune.testing import (
    tiny_gemma,
    tiny_glm,
    tiny_others,
    tiny_pixtral,
    tiny_qwen,
    tiny_tiles,
)
from tokprune.testing.grid_prompts import TYPED
from tokprune.trace.costs import unpruned_numbers
from tokprune.trace.flops import model_macs, prefill_macs, row_macs, unpruned_macs

FAMILIES: dict[str, tuple[Any, Any]] = {}
for _kind in (tiny_qwen, tiny_glm, tiny_pixtral, tiny_gemma, tiny_tiles, tiny_others):
    FAMILIES.update(_kind.FAMILIES)
if not TYPED:  # its attention is out of reach of the methods here
    FAMILIES.pop("llava-1.5/stablelm")

#: a part of every family's name that takes videos as such (Gemma 4's are left as they are)
VIDEOS = ("qwen", "glm4v", "glm46v", "internvl", "video-llava")
#: Gemma 4's processor pads every image to so many pixels; this one fills them
FULL = {"gemma4": [(48, 48)]}
PROMPTS: dict[str, list[Any]] = {
    "image": [4, "image", 6],
    "images": [3, "image", 5, "image", 4],
    "video": [2, "video", 7],
}
METHODS: dict[str, Method] = {
    "all": tokprune.Random(keep=1.0),
    "input": tokprune.Random(keep=4),
    "decoder": DropInDecoder(keep=3),
}
#: of the mixtures of experts, these compute all experts for every token, in this release
DENSE = ("qwen3-vl-moe",) if RELEASE < (5, 0) else ()

CASES = [
    (family, prompt)
    for family in FAMILIES
    for prompt in PROMPTS
    if prompt != "video" or family.startswith(VIDEOS)
]


@lru_cache(maxsize=1)
def model_of(family: str, **options: Any) -> Any:
    model = FAMILIES[family][0](attention="eager", **options)
    if hasattr(model, "set_experts_implementation"):
        # one expert after the other; the counter does not know grouped products
        model.set_experts_implementation("eager")
    return model


def inputs_of(family: str, model: Any, prompt: str) -> dict[str, Any]:
    made: dict[str, Any] = FAMILIES[family][1].inputs(model, [PROMPTS[prompt]], FULL.get(family))
    return made


def head_rows(family: str, shortened: bool, tokens: int) -> int:
    """Rows that the head works on where one is asked for: of all tokens in Qwen2-VL before
    transformers 5, and, in Gemma 4, of all that are left of a shortened prompt."""
    everything = (family == "qwen2-vl" and RELEASE < (5, 0)) or (family == "gemma4" and shortened)
    return tokens if everything else 1


def idle_experts(family: str, model: Any, tokens: list[int]) -> int:
    """MACs of experts whose answer is multiplied by zero."""
    if family not in DENSE:
        return 0
    config = model.config.get_text_config()
    one = 3 * config.hidden_size * config.moe_intermediate_size
    return sum(tokens) * (config.num_experts - config.num_experts_per_tok) * one


def packed(shape: Any, layouts: list[Any], pixels: torch.Tensor) -> int:
    """What a Pixtral tower does in vain where a call has several images: pairs of rows of different
    images, in the one sequence that they make, and patches of the padding around smaller ones."""
    rows = [n for layout in layouts for n in layout.segments.full]
    pairs = sum(rows) ** 2 - sum(n * n for n in rows)
    patches = pixels.shape[0] * pixels.shape[2] * pixels.shape[3] // tiny_qwen.PATCH**2
    padding = (patches - sum(rows)) * shape.patch_embedding
    return sum(layer.pair for layer in shape.encoder) * pairs + padding


def check(macs: Any, seen: Counted, lm_head: int, more: int) -> None:
    """``more``: that ran and is masked or multiplied by zero."""
    assert macs.total - macs.lm_head == seen.rest - more
    assert seen.head == lm_head


@pytest.mark.parametrize(("family", "prompt"), CASES)
def test_prefill_matches_flop_counter(family: str, prompt: str) -> None:
    model = model_of(family)
    inputs = inputs_of(family, model, prompt)
    tokens = inputs["input_ids"].shape[1]
    plain = counts(lambda: model(**inputs, logits_to_keep=1))
    for name, method in METHODS.items():
        with tokprune.compress(model, method) as trace:
            seen = counts(lambda: model(**inputs, logits_to_keep=1))
        assert trace.last is not None
        prefill, one = trace.last, trace.last.shape.lm_head
        masked = 0
        if family in ("mistral3", "llava-pixtral"):
            layouts = [record.layout for record in prefill.records]
            masked = packed(prefill.shape, layouts, inputs["pixel_values"])
            assert bool(masked) == (prompt == "images")

        before = [tokens] * len(prefill.layers)
        after = [layer.lengths[0] for layer in prefill.layers]
        macs, unpruned = prefill_macs(prefill), unpruned_macs(prefill)
        more = idle_experts(family, model, before) + masked
        check(unpruned, plain, one * head_rows(family, False, tokens), more)
        more = idle_experts(family, model, after) + masked
        shortened = after[-1] < tokens
        check(macs, seen, one * head_rows(family, shortened, after[-1]), more)
        assert macs.lm_head == unpruned.lm_head == one
        assert (macs.total < unpruned.total) == (name != "all")

        # the parts that make up the total, and the same count before anything runs
        assert macs.patch_embedding > 0
        assert macs.projector > 0
        assert len(macs.encoder) == len(prefill.shape.encoder) > 0
        assert [m.total for m in row_macs(prefill)] == [macs.total]
        assert [n.macs for n in unpruned_numbers(bind(model), inputs)] == [unpruned.total]


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_step_matches_flop_counter(family: str) -> None:
    # of a window that binds, a step counts what is cached behind it, too
    wide = {"window": 500} if family.startswith(("gemma", "aya", "cohere2")) else {}
    model = model_of(family, **wide)
    inputs = inputs_of(family, model, "image")
    answer = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    for method in (METHODS["input"], METHODS["decoder"]):
        with tokprune.compress(model, method) as trace:
            seen = counts(lambda: model.generate(**inputs, **answer))
        assert trace.last is not None
        macs, layers = prefill_macs(trace.last), trace.last.layers
        idle = idle_experts(family, model, [layer.lengths[0] + 1 for layer in layers])
        assert macs.total + macs.decode_step - 2 * macs.lm_head == seen.rest - idle


@pytest.mark.skipif("gemma4" not in FAMILIES, reason="the release has no Gemma 4")
def test_padding_of_gemma4_is_not_counted() -> None:
    model, maker = model_of("gemma4"), FAMILIES["gemma4"][1]
    inputs = maker.inputs(model, [PROMPTS["image"]], [(24, 48)])
    known = bind(model)
    images = known.family.images(known.parts, known.facts, inputs)
    assert isinstance(images, list)
    (image,) = images
    assert image.segments is not None
    rows = inputs["pixel_values"].shape[1]
    assert sum(image.segments.full) < rows
    padded = replace(image, segments=Segments((rows,), (rows,)))
    length = [inputs["input_ids"].shape[1]]
    seen = counts(lambda: model(**inputs, logits_to_keep=1))
    macs = model_macs(known.shape, known.facts, [padded], length)
    # the average is taken for as many cells as fit, the projector sees the true ones
    cells = rows // 4 - len(image.packed)
    assert macs.total + rows * cells * known.shape.averaged == seen.total


@pytest.mark.skipif("gemma4" not in FAMILIES, reason="the release has no Gemma 4")
def test_experts_beside_an_mlp() -> None:
    """Gemma 4 26B-A4B: layers with a dense MLP and experts at once."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    model = model_of("gemma4", moe_intermediate_size=16, **experts)
    inputs = inputs_of("gemma4", model, "image")
    seen = counts(lambda: model(**inputs, logits_to_keep=1))
    assert unpruned_numbers(bind(model), inputs)[0].macs == seen.total


def test_pooling_head_of_a_whole_encoder() -> None:
    from transformers import SiglipVisionModel

    model = model_of("gemma3")
    inputs = inputs_of("gemma3", model, "image")
    config = type(model.config.vision_config)(
        **{**model.config.vision_config.to_dict(), "vision_use_head": True}
    )
    config._attn_implementation = "eager"
    head = SiglipVisionModel(config).eval()
    model.model.vision_tower = head  # weights of no matter
    with tokprune.compress(model, METHODS["input"]) as trace:
        seen = counts(lambda: model(**inputs, logits_to_keep=1))
    assert trace.last is not None
    macs = prefill_macs(trace.last)
    assert macs.total == seen.total
    assert macs.pooling > 0
    model_of.cache_clear()


def test_windows_of_qwen25() -> None:
    shape = bind(model_of("qwen2.5-vl")).shape
    assert shape.windowed == {0, 2}
    assert {len(shape.encoder)} == {4}


@pytest.mark.parametrize("family", ["qwen2.5-vl", "internvl", "gemma3"])
def test_trace_tells_of_the_encoder(family: str) -> None:
    model = model_of(family)
    inputs = inputs_of(family, model, "images")
    with tokprune.compress(model, METHODS["input"]) as trace, torch.no_grad():
        model(**inputs)
    assert trace.last is not None
    told = trace.to_dict()
    layers, macs = told["encoder"], told["macs"]
    assert [layer["layer"] for layer in layers] == list(range(len(macs["encoder"])))
    assert [layer["macs"] for layer in layers] == macs["encoder"]
    segments = [record.layout.segments for record in trace.last.records]
    rows = [list(own.full) for own in segments if own is not None]
    for layer in layers:
        assert layer["mlp_rows"] == rows
        windows = family == "qwen2.5-vl" and layer["layer"] in (0, 2)
        assert (layer["attention_rows"] != rows) == windows
        assert [sum(r) for r in layer["attention_rows"]] == [sum(r) for r in rows]
    (line,) = [x for x in trace.summary().splitlines() if x.lstrip("| ").startswith("encoder")]
    assert f"encoder 0-{len(layers) - 1}" in line
    assert str(sum(map(sum, rows))) in line
