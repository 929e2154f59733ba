"""One pass of the encoder for several methods: the same bits, fewer passes, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import tokprune
from tokprune.engine.shared_encoder import SharedEncoder, shared_encoder
from tokprune.families import bind
from tokprune.trace.flops import prefill_macs, row_macs

#: (method, options, whether it needs a pass of its own)
METHODS: list[tuple[str | None, dict[str, Any], bool]] = [
    (None, {}, True),
    ("todre", {"keep": 10, "prune_before": 5}, True),
    ("todre", {"keep": 5, "tau": 0.5, "prune_before": 7}, False),
    ("divprune", {"keep": 9}, False),
    ("pool", {"keep": 9}, False),
    ("fastv", {"keep": 7}, False),
    ("flowcut", {"keep": 12}, True),
    ("flowcut", {"keep": 12}, True),
    ("pitome", {"keep": 13}, True),
    (None, {}, False),
]


def answer(model: Any, inputs: Any, method: str | None, options: dict[str, Any]) -> Any:
    with torch.inference_mode():
        if method is None:
            return model.generate(**inputs, max_new_tokens=3, do_sample=False), None
        with tokprune.compress(model, method, **options) as trace:
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            return tokens, trace.to_dict()


@pytest.mark.parametrize("family", tiny.BUILDERS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_same_answers_and_traces_with_fewer_passes(family: str, tower: str) -> None:
    model = tiny.BUILDERS[family](tower=tower)
    inputs = tiny.make_inputs(model, [[4, "image", 6], [3, "image", 9]])
    methods = [m for m in METHODS if not (tower == "siglip" and m[0] in ("flowcut", "pitome"))]
    alone = [answer(model, inputs, name, options) for name, options, _ in methods]
    with SharedEncoder(bind(model)) as shared:
        shared.remember(inputs["pixel_values"])
        for (name, options, own), (tokens, told) in zip(methods, alone):
            ran = shared.ran
            now, now_told = answer(model, inputs, name, options)
            assert torch.equal(now, tokens), name
            assert now_told == told, name
            if not (tower == "siglip" and name == "todre"):  # no class token, so no tap there
                assert shared.ran - ran == own, name
        assert shared.ran + shared.spared == len(methods)
    assert "get_image_features" not in model.model.__dict__
    assert shared_encoder(model.model) is None


def test_other_pixels_are_not_mistaken_for_the_remembered_ones() -> None:
    model = tiny.llava()
    first, second = (tiny.make_inputs(model, [[4, "image", 6]], seed=s) for s in (1, 2))
    with SharedEncoder(bind(model)) as shared:
        shared.remember(first["pixel_values"])
        told = [model.get_image_features(x["pixel_values"]) for x in (first, second, first, second)]
        assert (shared.ran, shared.spared) == (3, 1)
        shared.remember(second["pixel_values"])
        model.get_image_features(first["pixel_values"])
        assert shared.spared == 1
    features = [torch.stack(list(getattr(t, "pooler_output", t))) for t in told]
    assert torch.equal(features[0], features[2])
    assert torch.equal(features[1], features[3])
    assert not torch.equal(features[0], features[1])


def test_a_failing_block_and_a_patched_model() -> None:
    model = tiny.llava()
    with pytest.raises(RuntimeError, match="stop"), SharedEncoder(bind(model)):
        with tokprune.compress(model, "random", keep=5):
            raise RuntimeError("stop")
    assert "get_image_features" not in model.model.__dict__
    tokprune.patch(model, "random", keep=5)
    with pytest.raises(tokprune.AlreadyPatchedError, match="unpatch the model"):
        SharedEncoder(bind(model)).__enter__()
    tokprune.unpatch(model)
    # a patch that outlives the block goes on without it
    with SharedEncoder(bind(model)) as shared:
        trace = tokprune.patch(model, "random", keep=5)
    inputs = tiny.make_inputs(model, [[4, "image", 6]])
    with torch.inference_mode():
        model(**inputs)
    assert len(trace.kept()) == 5
    assert shared.spared == 0
    tokprune.unpatch(model)
    assert "get_image_features" not in model.model.__dict__


@pytest.mark.parametrize("family", tiny.BUILDERS)
@pytest.mark.parametrize(
    ("method", "options"),
    [("flowcut", {"keep": 12}), ("fastv", {"keep": 7}), ("mustdrop", {
        "threshold": 0.14, "window": (2, 2), "gamma": 0.03, "alpha": 0.03,
        "pruning_layers": (1, 3, 4, 6),
    })],
)  # fmt: skip
def test_macs_of_rows_add_up_and_equal_single_runs(
    family: str, method: str, options: dict[str, Any]
) -> None:
    model = tiny.BUILDERS[family]()
    tiled = family == "llava_next"
    inputs = tiny.make_inputs(
        model, [[4, "image", 6], [3, "image", 2, "image", 9]],
        sizes=[(20, 40), (40, 20), (24, 24)] if tiled else None,
    )  # fmt: skip
    with tokprune.compress(model, method, **options) as trace, torch.inference_mode():
        model(**inputs)
        assert trace.last is not None
        rows = row_macs(trace.last)
        whole = prefill_macs(trace.last)
        assert sum(row.total for row in rows) == whole.total
        assert sum(row.decode_step for row in rows) == whole.decode_step
        for row, images in ((0, slice(0, 1)), (1, slice(1, 3))):
            model(**tiny.single(inputs, row, images))
            assert rows[row] == prefill_macs(trace.last)
