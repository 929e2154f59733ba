"""``torch.compile`` and patches, in any order: the compressed result, never an earlier one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tokprune.methods import make_method
from tokprune.testing import Case, assert_same_logits, tiny_family
from tokprune.testing.case import GREEDY

METHODS = ["divprune", "fastv"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits  # type: ignore[no-any-return]


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def decoder(model: Any) -> Any:
    model.model.language_model.compile(backend="eager")
    return model


def layers(model: Any) -> Any:
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")
    return model


def tower(model: Any) -> Any:
    model.model.vision_tower.compile(backend="eager")
    return model


WAYS = {"whole": whole, "in place": in_place, "decoder": decoder, "tower": tower}


def case_on_own_model(method: str, family: str = "llava-1.5") -> Case:
    """A model of two layers: compiling takes its time."""
    tiny = tiny_family(family)
    options = {"prune_before": 1} if method == "fastv" else {}
    made = make_method(method, keep=4, **options)
    return Case(made, tiny, tiny.build(attention="sdpa", layers=2), [[4, "image", 6], [5]])


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("fastv", "whole"),
        pytest.param("divprune", "in place", marks=pytest.mark.full),
        ("fastv", "decoder"),
        ("divprune", "tower"),
    ],
)
def test_compiled_and_run_before_the_patch(method: str, way: str) -> None:
    case = case_on_own_model(method)
    check(case, WAYS[way], first=True)


def test_layers_compiled_before_the_patch() -> None:
    check(case_on_own_model("fastv"), layers, first=True)


@pytest.mark.full
def test_patched_and_run_before_compiling() -> None:
    check(case_on_own_model("fastv"), whole, first=False)


@pytest.mark.full
@pytest.mark.parametrize("family", ["llava-next", "qwen2.5-vl", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_other_families(method: str, family: str) -> None:
    check(case_on_own_model(method, family), whole, first=True)


def check(case: Case, compiled: Callable[[Any], Any], first: bool) -> None:
    inputs = case.inputs()
    plain = logits(case.model, inputs)
    with case.compress() as trace:
        want = logits(case.model, inputs)
        counts = trace.last and trace.last.layers[-1].counts
    assert want.shape != plain.shape
    if first:
        fast = compiled(case.model)
        assert_same_logits(logits(fast, inputs), plain)
    with case.compress() as trace:
        if not first:
            logits(case.model, inputs)
            fast = compiled(case.model)
        for _ in range(2):
            assert_same_logits(logits(fast, inputs), want)
            assert trace.last is not None
            assert trace.last.layers[-1].counts == counts
    assert_same_logits(logits(fast, inputs), plain)


def test_one_patch_after_the_other() -> None:
    case = case_on_own_model("divprune")
    inputs, fast = case.inputs(), whole(case.model)
    for method, options in (("divprune", {}), ("random", {}), ("fastv", {"prune_before": 1})):
        made = make_method(method, keep=3, **options)
        plain = copy.deepcopy(case.model)
        with tokprune.compress(plain, made):
            want = logits(plain, inputs)
        tokprune.patch(case.model, made)
        assert_same_logits(logits(fast, inputs), want)
    tokprune.unpatch(case.model)
    tokprune.unpatch(plain)  # a copy of a patched model is patched
    assert_same_logits(logits(fast, inputs), logits(plain, inputs))


@pytest.mark.full
def test_generate() -> None:
    case = case_on_own_model("fastv")
    inputs = case.inputs()
    with case.compress():
        want = case.model.generate(**inputs, **GREEDY)
    plain = case.model.generate(**inputs, **GREEDY)
    case.model.compile(backend="eager")
    assert torch.equal(case.model.generate(**inputs, **GREEDY), plain)
    with case.compress():
        assert torch.equal(case.model.generate(**inputs, **GREEDY), want)
    assert torch.equal(case.model.generate(**inputs, **GREEDY), plain)


def test_a_full_graph_is_refused_with_the_reason() -> None:
    case = case_on_own_model("divprune")
    fast = torch.compile(case.model, backend="eager", fullgraph=True)
    with case.compress(), pytest.raises(Exception, match="tokprune"):
        logits(fast, case.inputs())


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused(strict: bool) -> None:
    case = case_on_own_model("divprune")
    with case.compress(), pytest.raises(Exception, match="tokprune"):
        torch.export.export(case.model, (), kwargs=dict(case.inputs()), strict=strict)


def test_forward_is_the_models_again() -> None:
    case = case_on_own_model("fastv")
    mine = lambda *args, **kwargs: type(case.model).forward(case.model, *args, **kwargs)  # noqa: E731
    case.model.forward = mine
    with case.compress():
        assert case.model.forward is not mine
    assert case.model.forward is mine
    changed = [m for m in case.model.modules() if "forward" in m.__dict__]
    assert changed == [case.model]
