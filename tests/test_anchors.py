"""The option ``anchors``: what a method leaves out is merged into tokens that stand for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import SHAPES, case_of
from golden_checks.case import load_case

from tokprune.engine.contracts import ImageTokens
from tokprune.methods import make_method
from tokprune.methods.scoring import PromptSelector, SelectorStage
from tokprune.operators.anchors import distinctive_anchors
from tokprune.operators.diversity import divprune

GOLDEN = Path(__file__).parent / "golden" / "rectified"


def image_of(features: torch.Tensor, newline: torch.Tensor | None = None) -> ImageTokens:
    n = len(features)
    place = torch.arange(n)
    newline = torch.zeros(n, dtype=torch.bool) if newline is None else newline
    return ImageTokens(
        features, torch.zeros_like(place), place, place, place, newline, int((~newline).sum()),
        1, (1, n), n,
    )  # fmt: skip


def stage_of(name: str, **options: Any) -> SelectorStage:
    method = make_method(name, **options)
    assert isinstance(method, PromptSelector)
    return SelectorStage(method)


@pytest.mark.parametrize("file", ["reduce_divprune", "reduce_divprune_odd"])
def test_divprune_and_anchors_as_published(file: str) -> None:
    case = load_case(GOLDEN / f"{file}.safetensors")
    p = case.parameters
    stage = stage_of("divprune", keep=p["n_vis"], anchors=1 - p["gamma"])
    answer = stage.select([image_of(case["features"])])[0]
    assert answer is not None
    assert answer.features is not None
    assert answer.group is not None
    order = case["order_median"]
    assert torch.equal(answer.index, case["positions_median"] - p["n_sys"])
    torch.testing.assert_close(answer.features, case["merged"][order])
    assert torch.equal(answer.group, order.argsort()[case["cluster"]])
    assert torch.equal(answer.group.bincount().float(), case["size"][order])


def test_anchors_alone() -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    answer = stage_of("divprune", keep=5, anchors=1).select([image_of(x)])[0]
    want = distinctive_anchors(x, 5)
    assert answer is not None
    assert answer.index.tolist() == sorted(want.place().tolist())


def test_newlines_go_where_they_are_no_candidates() -> None:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    newline = torch.arange(12) % 4 == 3
    for name, merged in (("divprune", 12), ("random", 9)):
        answer = stage_of(name, keep=4, anchors=0.5).select([image_of(x, newline)])[0]
        assert answer is not None
        assert answer.group is not None
        assert int((answer.group >= 0).sum()) == merged
        assert len(answer.index) == 4


def test_the_method_runs_with_its_own_part_of_the_budget() -> None:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    answer = stage_of("divprune", keep=10, anchors=0.25).select([image_of(x)])[0]
    assert answer is not None
    assert answer.group is not None
    alone = set(divprune(x, 7).tolist())
    assert alone <= set(answer.index.tolist())
    assert len(answer.index) == 10
    for token in alone:
        own = answer.group[token]
        assert int((answer.group == own).sum()) == 1


@pytest.mark.parametrize("family", ["llava-1.5", "llava-next", "qwen2.5-vl"])
@pytest.mark.parametrize("name", ["fastervlm", "vispruner", "hiprune", "scope", "prunesid"])
def test_methods_of_the_tower_choose_at_the_input(name: str, family: str) -> None:
    """The same budget as without anchors, or what the tiles show of it, and all stand for some."""
    method = make_method(name, keep=6, anchors=0.5, rectify={"dropped": "none"})
    case = case_of(method, family, SHAPES["ragged"])
    _, trace = case.prefill(case.inputs())
    plain = case.having(method=make_method(name, keep=6))
    _, before = plain.prefill(plain.inputs())
    for own, other in zip(trace.images, before.images):
        selection = own.selection
        assert selection is not None
        assert selection.group is not None
        assert own.entered is not None
        assert other.entered is not None
        assert own.entered.count == other.entered.count
        sizes = selection.group[selection.group >= 0].bincount()
        assert sizes.max() > 1
        assert len(sizes) == own.entered.count


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, r"share=0 should be a number in \(0, 1\]"),
        (1.5, "share=1.5 should be"),
        (True, "share=True should be"),
        ("half", "anchors='half' should be a share of the budget"),
        ({"gamma": 0.5}, "'gamma' should be one of share, superior, place"),
        ({"place": "mean"}, "place='mean' should be one of 'first', 'median', 'last'"),
        ({"superior": "x"}, "superior='x' should be one of 'lower', 'higher'"),
    ],
)
def test_bad_values(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_method("divprune", keep=4, anchors=value)


def test_repr_and_equality() -> None:
    method = make_method("divprune", keep=4, anchors={"superior": "higher"})
    assert "anchors=Anchors(superior='higher')" in repr(method)
    assert method == make_method("divprune", keep=4, anchors=method.anchors)  # type: ignore[attr-defined]
