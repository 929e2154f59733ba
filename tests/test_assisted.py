"""Assisted generation and prompt lookup: the tokens of greedy decoding, for every method."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from family_cases import METHODS, SHAPES, case_of
from torch import Tensor

import tokprune
from tokprune.engine.cache import cache_argument
from tokprune.errors import UnsupportedModelError
from tokprune.testing import Case, assert_same_logits, continuation_tokens, tiny_family
from tokprune.testing.generated import forced_logits

FAMILIES = ["llava-1.5", "llava-next", "qwen2.5-vl", "gemma3"]
COVER = [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.full) for family in FAMILIES[1:])]
GREEDY: dict[str, Any] = {
    "max_new_tokens": 8, "do_sample": False, "eos_token_id": 1000, "pad_token_id": 0,
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip
#: the question says things twice, so that there is something to look up
REPEATING = [[4, "image", 9]]


def single(method: str, family: str) -> Case:
    case = case_of(method, family, REPEATING)
    try:
        case.prefill(case.inputs())
    except (UnsupportedModelError, ValueError) as refusal:
        pytest.skip(str(refusal))
    return case


def repeated(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    inputs["input_ids"][:, -9:] = torch.tensor([11, 12, 13, 14, 11, 12, 13, 11, 12])
    return inputs


def generated(case: Case, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Any]:
    with case.compress() as trace:
        out = case.model.generate(**inputs, **GREEDY, **options)
    assert trace.last is not None
    return torch.stack(out.logits, 1), trace


@pytest.mark.parametrize("family", COVER)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "evs"])
def test_prompt_lookup(method: str, family: str) -> None:
    case = single(method, family)
    inputs = repeated(case)
    want, plain = generated(case, inputs)
    alone = method.startswith("mustdrop") or method.endswith("-caches")
    with pytest.warns(UserWarning, match="prunes the KV cache") if alone else nullcontext():
        got, trace = generated(case, inputs, prompt_lookup_num_tokens=4)
    assert_same_logits(got, want, tolerance=2 * case.family.tolerance)
    for own, other in zip(trace.last.layers, plain.last.layers):
        assert own.counts == other.counts
    assert alone or trace.last.original_lengths > plain.last.original_lengths, "nothing guessed"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["divprune", "fastv", "sparsevlm-recycled", "mustdrop"])
@pytest.mark.parametrize("patched", [False, pytest.param(True, marks=pytest.mark.full)])
def test_assistant_model(method: str, family: str, patched: bool) -> None:
    case = single(method, family)
    small = tiny_family(family).build(attention="sdpa", seed=3, layers=2)
    small.generation_config.num_assistant_tokens = 3
    inputs = case.inputs()
    want, _ = generated(case, inputs)
    if patched:
        tokprune.patch(small, "random", keep=4)
    got, _ = generated(case, inputs, assistant_model=small)
    assert_same_logits(got, want, tolerance=2 * case.family.tolerance)


@pytest.mark.parametrize("method", ["divprune", "fastv", "pyramiddrop"])
def test_the_question_can_be_cropped_and_asked_anew(method: str) -> None:
    """Not only guesses: whatever stands behind the last image can be taken off the cache."""
    case = single(method, "llava-1.5")
    inputs = case.inputs()
    name, tokens = cache_argument(case.model), continuation_tokens(1, 3)
    with case.compress(), torch.no_grad():
        out = case.model(**inputs, use_cache=True)
        cache = getattr(out, name)
        before = copy.deepcopy(cache)
        cache.crop(-2)
        length = inputs["input_ids"].shape[1]
        assert cache.get_seq_length() == length - 2
        again = {n: inputs[n] for n in ("input_ids", "attention_mask")}
        got = forced_logits(case.model, again, tokens, **{name: cache})
        before.crop(-1)
        want = forced_logits(case.model, again, tokens, **{name: before})
        assert_same_logits(got, want)
        with pytest.raises(NotImplementedError, match="into the images"):
            cache.crop(-length + 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["option", "config", "model"])
def test_chunked_prefill(family: str, where: str) -> None:
    case = case_of("fastv", family, SHAPES["ragged"])
    inputs = case.inputs()
    want, _ = generated(case, inputs)
    options: dict[str, Any] = {}
    if where == "option":
        options["prefill_chunk_size"] = 8
    elif where == "model":
        case.model.generation_config.prefill_chunk_size = 8
    else:
        config = copy.deepcopy(case.model.generation_config)
        config.prefill_chunk_size = 8
        options["generation_config"] = config
    try:
        got, _ = generated(case, inputs, **options)
    finally:
        case.model.generation_config.prefill_chunk_size = None
    assert torch.equal(got, want)
