"""Methods of different stages at work together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BUILDERS, llava, make_inputs, single

import tokprune
from tokprune import DivPrune, FastV, FlowCut, MustDrop, Random, ToDRE, TransPrune, VisionZip
from tokprune.errors import CompositionError
from tokprune.methods import make_method
from tokprune.testing import Case, tiny_family
from tokprune.testing.oracle import (
    assert_same_logits,
    compressed_logits,
    continuation_tokens,
    oracle_logits,
)

PROMPTS = [[4, "image", 6], [7, "image", 9], [2, "image", 3]]
SIZES = [(20, 40), (40, 20), (30, 30)]
TRANSPRUNE = TransPrune(prune_before=(3, 4, 6), transition_layers=(2, 3, 4, 5))
#: combinations that only drop tokens
PRUNING = {
    "flowcut+transprune": tokprune.compose(FlowCut(keep=20, decoder_cut=False), TRANSPRUNE),
    "flowcut+divprune": tokprune.compose(FlowCut(keep=24, decoder_cut=False), DivPrune(keep=9)),
    "todre stage 1+fastv": tokprune.compose(ToDRE(keep=16, stage2=False), FastV(keep=5)),
    "flowcut+random+fastv": tokprune.compose(
        FlowCut(keep=24, decoder_cut=False), Random(keep=12), FastV(keep=5)
    ),
}


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", PRUNING)
def test_composition_equals_the_masked_oracle(case: str, family: str) -> None:
    model = BUILDERS[family]()
    inputs = make_inputs(model, PROMPTS, SIZES)
    continuation = continuation_tokens(len(PROMPTS), 8)
    with tokprune.compress(model, PRUNING[case]) as trace:
        got = compressed_logits(model, inputs, continuation)
    first = sum(map(sum, trace.last.layers[0].counts))
    last = sum(map(sum, trace.last.layers[-1].counts))
    assert last <= first < sum(len(i.columns) for i in trace.last.images)
    assert_same_logits(got, oracle_logits(model, inputs, trace.last, continuation))


@pytest.mark.parametrize("family", BUILDERS)
def test_merging_encoder_stage_under_a_decoder_stage(family: str) -> None:
    """VisionZip then FastV: a batch equals single runs, and both budgets hold."""
    model = BUILDERS[family]()
    both = tokprune.compose(VisionZip(keep=12), FastV(keep=5))
    inputs = make_inputs(model, PROMPTS, SIZES)
    continuation = continuation_tokens(len(PROMPTS), 4)
    with tokprune.compress(model, both) as trace:
        got = compressed_logits(model, inputs, continuation)
        assert list(trace.last.layers[-1].counts) == [[5], [5], [5]]
        for i in range(len(PROMPTS)):
            one = compressed_logits(
                model, single(inputs, i, slice(i, i + 1)), continuation[i : i + 1]
            )
            assert_same_logits(got[i : i + 1], one)


NONSENSE: list[tuple[str, Any, str]] = [
    ("two encoder methods", (FlowCut(keep=20), VisionZip(keep=12)), "inside the vision encoder"),
    ("two prompt methods", (DivPrune(keep=20), Random(keep=12)), "after the projector"),
    ("two decoder methods", (FastV(keep=5), TRANSPRUNE), "inside the decoder"),
    ("todre's own decoder stage", (ToDRE(keep=16), FastV(keep=5)), "inside the decoder"),
    ("mustdrop and fastv", (MustDrop(keep=8, prune_before=(2, 3, 4, 5)), FastV(keep=5)),
     "inside the decoder"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("methods", "why"), [n[1:] for n in NONSENSE], ids=[n[0] for n in NONSENSE]
)
def test_combinations_that_make_no_sense_say_why(methods: Any, why: str) -> None:
    model = llava()
    with pytest.raises(tokprune.CompositionError, match=why):
        tokprune.patch(model, tokprune.compose(*methods))
    assert not tokprune.is_patched(model)


def test_compositions_flatten_and_print_their_parts() -> None:
    inner = tokprune.compose(FlowCut(keep=20), TRANSPRUNE)
    outer = tokprune.compose(inner, Random(keep=9))
    assert repr(outer).count("FlowCut(") == repr(outer).count("Random(") == 1


REDUCING = {
    "flowcut": {"keep": 12, "decoder_cut": False}, "centerclip": {"keep": 12, "place": "encoder"},
    "visionzip": {"dominant": 8, "contextual": 4}, "tome": {"r": 4}, "pitome": {"keep": 20},
}  # fmt: skip
ON_GRIDS = {
    "grid": {"keep": 4}, "pool": {"window": 3}, "m3": {"keep": 9},
    "centerclip": {"keep": 4, "place": "projector"},
}  # fmt: skip


@pytest.mark.parametrize("family", ["llava-1.5", "llava-next"])
@pytest.mark.parametrize("second", ON_GRIDS)
@pytest.mark.parametrize("first", REDUCING)
def test_methods_on_whole_grids_refuse_what_is_left_of_one(
    first: str, second: str, family: str
) -> None:
    """They would take the places of tokens that are gone for places."""
    tiny = tiny_family(family)
    model = tiny.build(attention="sdpa", layers=2)
    inputs = Case(make_method("random", keep=1), tiny, model, [[4, "image", 6]]).inputs()
    both = tokprune.compose(
        make_method(first, **REDUCING[first]), make_method(second, **ON_GRIDS[second])
    )
    with pytest.raises(CompositionError), tokprune.compress(model, both), torch.no_grad():
        model(**inputs)
