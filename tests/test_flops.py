"""MACs: against figures printed in papers, and against PyTorch's own flop counter."""

from __future__ import annotations

import pytest
import tiny
import torch
from flop_counts import counted
from toy_methods import DropInDecoder, MergeAtInput, MergeInTower

import tokprune
from tokprune.families import bind
from tokprune.trace.flops import paper_flops, prefill_macs, unpruned_macs

D, M = 4096, 11008  # Vicuna-7B


def transprune(tokens: list[int], layers: tuple[int, ...] = (7, 2, 3, 20)) -> float:
    per_layer = [n for n, k in zip(tokens, layers, strict=True) for _ in range(k)]
    return paper_flops(per_layer, D, M, gated=True) / 1e12


@pytest.mark.parametrize(
    ("tokens", "printed"),
    [
        ([576, 576, 576, 576], 3.82),
        ([2880, 2880, 2880, 2880], 20.83),
        ([576, 504, 360, 72], 1.56),
        ([2880, 2520, 1800, 360], 8.33),
    ],
)
def test_transprune_paper(tokens: list[int], printed: float) -> None:
    assert round(transprune(tokens), 2) == printed


def test_fastv_layer() -> None:
    assert paper_flops([612], D, M) / 1e9 == pytest.approx(99.3, abs=0.05)


def test_gated_counts_a_third_matrix() -> None:
    more = paper_flops([10], 8, 16, gated=True) - paper_flops([10], 8, 16)
    assert more == 10 * 8 * 16


# ------------------------------------------------------------- against the flop counter

CASES = {
    "all": tokprune.Random(keep=1.0),
    "prompt": tokprune.Random(keep=10),
    "merge-at-input": MergeAtInput(),
    "between": MergeInTower(between=True),
    "after": MergeInTower(between=False),
    "between-after": MergeInTower(between=True, drop=4),
    "decoder": DropInDecoder(),
    "everywhere": tokprune.compose(
        MergeInTower(drop=3), tokprune.Random(keep=9), DropInDecoder(keep=4)
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("family", "options"),
    [("llava", {}), ("llava", {"tower": "siglip", "decoder": "qwen2"}), ("llava_next", {})],
)
def test_prefill_matches_flop_counter(family: str, options: dict[str, str], case: str) -> None:
    model = tiny.BUILDERS[family](attention="eager", **options)
    inputs = tiny.make_inputs(model, [[4, "image", 6, "image", 3]], sizes=[(20, 40), (44, 21)])
    plain = counted(lambda: model(**inputs, logits_to_keep=1))
    with tokprune.compress(model, CASES[case]) as trace:
        macs = counted(lambda: model(**inputs, logits_to_keep=1))
    assert trace.last is not None
    assert unpruned_macs(trace.last).total == plain
    assert prefill_macs(trace.last).total == macs
    assert (macs < plain) == (case != "all")


def test_decode_step_matches_flop_counter() -> None:
    model = tiny.llava(attention="eager")
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], dim=1)
    step = {"input_ids": torch.tensor([[5]]), "attention_mask": mask}
    with tokprune.compress(model, DropInDecoder(cache=True)) as trace:
        with torch.no_grad():
            cache = model(**inputs).past_key_values
        macs = counted(lambda: model(**step, past_key_values=cache))
    assert trace.last is not None
    assert prefill_macs(trace.last).decode_step == macs
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    macs = counted(lambda: model(**step, past_key_values=cache))
    assert unpruned_macs(trace.last).decode_step == macs


def test_later_turn_counts_cached_keys() -> None:
    model = tiny.llava(attention="eager")
    first = tiny.make_inputs(model, [[4, "image", 6]])
    second = tiny.make_inputs(model, [[3, "image", 2]], seed=3)
    ids = second["input_ids"]
    length = first["input_ids"].shape[1] + ids.shape[1]
    later = {**second, "attention_mask": torch.ones(1, length, dtype=torch.long)}
    for method in (tokprune.Random(keep=1.0), tokprune.Random(keep=8), DropInDecoder()):
        with tokprune.compress(model, method) as trace:
            with torch.no_grad():
                cache = model(**first).past_key_values
            macs = counted(
                lambda cache=cache: model(**later, past_key_values=cache, logits_to_keep=1)
            )
        assert trace.last is not None
        assert trace.last.past == first["input_ids"].shape[1]
        assert prefill_macs(trace.last).total == macs
        held = [layer.keys.shape[-2] for layer in cache.layers]
        assert [trace.last.kv_entries(x) for x in trace.last.layers] == [[n] for n in held]


def test_shape_by_hand() -> None:
    shape = bind(tiny.llava()).shape
    layer = shape.decoder[0]
    assert layer.projections == 32 * 32 * 2 + 32 * 16 * 2  # two of four key heads
    assert layer.mlp == 3 * 32 * 48
    assert (layer.pair, layer.kv) == (2 * 32, 2 * 16)
    assert shape.encoder[0].mlp == 2 * 32 * 48
    assert shape.patch_embedding == 3 * 4 * 4 * 32
    assert shape.lm_head == 32 * tiny.VOCAB


def test_pooling_head_is_counted() -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = tiny.vision_config("siglip").to_dict()
    config = SiglipVisionConfig(**{**config, "vision_use_head": True})
    config._attn_implementation = "eager"
    tower = SiglipVisionModel(config).eval()
    whole = counted(lambda: tower(torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)))
    config = SiglipVisionConfig(**{**config.to_dict(), "vision_use_head": False})
    config._attn_implementation = "eager"
    bare = SiglipVisionModel(config).eval()
    rest = counted(lambda: bare(torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)))
    model = tiny.llava(tower="siglip")
    if hasattr(model.model.vision_tower, "vision_model"):
        model.model.vision_tower.vision_model.head = tower.vision_model.head
    else:
        model.model.vision_tower.head = tower.head
    pooling = bind(model).shape.pooling
    assert pooling is not None
    assert 2 * pooling.macs(tiny.PATCHES) == whole - rest
