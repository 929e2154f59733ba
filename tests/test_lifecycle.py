"""Patching and unpatching: nothing left behind, nothing changed that was not asked for."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from methods_table import CORE
from tiny import BUILDERS, llava, make_inputs

import tokprune
from tokprune.api import session_of
from tokprune.engine.state import ForwardState
from tokprune.testing.checks.leftovers import fingerprint

PROMPT = [[4, "image", 6], [7, "image", 9]]


@pytest.fixture(scope="module", params=list(BUILDERS))
def model(request: pytest.FixtureRequest) -> Any:
    model = BUILDERS[request.param]()
    with torch.no_grad():
        model(**make_inputs(model, PROMPT))  # transformers installs its own hooks lazily
    return model


@pytest.mark.parametrize("case", CORE)
def test_model_is_as_before_after_compress(model: Any, case: str) -> None:
    method, options = CORE[case]
    inputs = make_inputs(model, PROMPT)
    before, state = fingerprint(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        want = model(**inputs).logits
        with tokprune.compress(model, method, **options):
            assert tokprune.is_patched(model)
            short = model(**inputs).logits
        got = model(**inputs).logits
    assert short.shape[1] < want.shape[1]
    assert torch.equal(got, want)
    assert fingerprint(model) == before
    assert not tokprune.is_patched(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("case", CORE)
def test_config_is_untouched_while_patched(model: Any, case: str) -> None:
    method, options = CORE[case]
    before = fingerprint(model)
    with tokprune.compress(model, method, **options), torch.no_grad():
        model(**make_inputs(model, PROMPT))
        during = fingerprint(model)
    for what in ("config", "attention", "forward"):
        assert during[what] == before[what]


@pytest.mark.parametrize(
    "place", ["vision_tower", "multi_modal_projector", "language_model", "layer", "attention"]
)
@pytest.mark.parametrize("case", CORE)
def test_model_is_as_before_after_an_exception(model: Any, case: str, place: str) -> None:
    """An error anywhere in the forward leaves a clean, working model."""
    method, options = CORE[case]
    inputs = make_inputs(model, PROMPT)
    before = fingerprint(model)
    inner = model.model
    module = {
        "vision_tower": inner.vision_tower,
        "multi_modal_projector": inner.multi_modal_projector,
        "language_model": inner.language_model,
        "layer": inner.language_model.layers[3],
        "attention": inner.language_model.layers[1].self_attn.o_proj,
    }[place]
    with torch.no_grad():
        want = model(**inputs).logits

    class Boom(Exception):
        pass

    def boom(*_: Any) -> None:
        raise Boom

    with pytest.raises(Boom), tokprune.compress(model, method, **options), torch.no_grad():
        handle = module.register_forward_pre_hook(boom)
        try:
            model(**inputs)
        finally:
            handle.remove()
    assert fingerprint(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("case", CORE)
def test_works_again_after_an_exception_while_patched(model: Any, case: str) -> None:
    method, options = CORE[case]
    inputs = make_inputs(model, PROMPT)
    bad = {**inputs, "input_ids": inputs["input_ids"][:, :-1]}
    with tokprune.compress(model, method, **options), torch.no_grad():
        want = model(**inputs).logits
        with pytest.raises(ValueError):
            model(**bad)
        assert torch.equal(model(**inputs).logits, want)


def test_each_forward_and_each_thread_has_a_state_of_its_own() -> None:
    model = llava(layers=2, vision_layers=2)
    inputs = make_inputs(model, PROMPT)
    seen: list[ForwardState] = []
    with tokprune.compress(model, "random", keep=5), torch.no_grad():
        session = session_of(model)
        assert session is not None
        watch = model.model.language_model.layers[1].register_forward_pre_hook(
            lambda *_: seen.append(session.state)
        )
        threads = [threading.Thread(target=model, kwargs=inputs) for _ in range(2)]
        model(**inputs)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(ValueError):
            model(**{**inputs, "input_ids": inputs["input_ids"][:, :-1]})
        watch.remove()
        assert session.state == ForwardState()
    assert len({id(state) for state in seen}) == 3
    assert all(state.prefill is not None for state in seen)


def test_patch_replaces_and_unpatch_is_idempotent(model: Any) -> None:
    before = fingerprint(model)
    inputs = make_inputs(model, PROMPT)
    tokprune.unpatch(model)
    first = tokprune.patch(model, "random", keep=10)
    second = tokprune.patch(model, tokprune.FastV(keep=7))
    with torch.no_grad():
        model(**inputs)
    assert first.last is None
    assert second.last is not None
    assert tokprune.trace_of(model) is second
    tokprune.unpatch(model)
    tokprune.unpatch(model)
    assert fingerprint(model) == before


def test_failed_patch_keeps_the_earlier_method(model: Any) -> None:
    trace = tokprune.patch(model, "random", keep=10)
    with pytest.raises(ValueError):
        tokprune.patch(model, "random", keep=10**6)
    assert tokprune.trace_of(model) is trace
    tokprune.unpatch(model)


def test_compress_inside_compress_is_refused(model: Any) -> None:
    before = fingerprint(model)
    with tokprune.compress(model, "random", keep=10):
        with pytest.raises(tokprune.AlreadyPatchedError, match="compose"):
            with tokprune.compress(model, "fastv", keep=7):
                pass
        with pytest.raises(tokprune.AlreadyPatchedError, match="compose"):
            tokprune.patch(model, "fastv", keep=7)
        assert tokprune.is_patched(model)
    assert fingerprint(model) == before


def test_compress_gives_a_patched_model_its_method_back(model: Any) -> None:
    inputs = make_inputs(model, PROMPT)
    outer = tokprune.patch(model, "random", keep=10)
    with torch.no_grad():
        want = model(**inputs).logits
        with tokprune.compress(model, "fastv", keep=7):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, want)
    assert tokprune.trace_of(model) is outer
    tokprune.unpatch(model)


def test_two_models_are_patched_independently() -> None:
    a, b = llava(seed=0), llava(seed=0)
    inputs = make_inputs(a, PROMPT)
    with torch.no_grad(), tokprune.compress(a, "random", keep=5):
        short = a(**inputs).logits.shape[1]
        full = b(**inputs).logits.shape[1]
    assert short < full == inputs["input_ids"].shape[1]


def test_patched_model_can_be_garbage_collected() -> None:
    model = llava(layers=2, vision_layers=2)
    tokprune.patch(model, "random", keep=5)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


def test_state_dict_and_parameters_are_not_touched_by_a_patch(model: Any) -> None:
    keys, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    with tokprune.compress(model, "fastv", keep=7):
        assert list(model.state_dict()) == keys
        assert [n for n, _ in model.named_modules()] == names
