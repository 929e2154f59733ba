"""Published layers on decoders of another depth."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from tokprune.families import family_of
from tokprune.methods import image_methods, make_method
from tokprune.methods.depth import scaled_layers
from tokprune.methods.registry import options_for_depth


@pytest.mark.parametrize("name", image_methods())
@pytest.mark.parametrize("depth", [24, 32, 40])
def test_deep_decoders_keep_the_published_layers(name: str, depth: int) -> None:
    assert options_for_depth(name, depth) == {}


@pytest.mark.parametrize("name", image_methods())
@pytest.mark.parametrize("layers", [2, 3, 4, 5, 6, 8])
def test_every_method_fits_a_short_decoder(name: str, layers: int) -> None:
    model = tiny.llava(layers=layers)
    family = family_of(model)
    facts = family.facts(model, family.parts(model))
    plan = make_method(name, keep=9, **options_for_depth(name, layers)).plan(facts)
    assert plan.encoder or plan.prompt or plan.decoder


def test_six_layers() -> None:
    assert options_for_depth("transprune", 6) == {
        "prune_before": (1, 2, 3), "transition_layers": (0, 1, 2),
    }  # fmt: skip
    assert options_for_depth("mustdrop", 6) == {"prune_before": (1, 2, 3, 4)}
    assert options_for_depth("sparsevlm", 6) == {"prune_before": (1, 2, 4)}
    assert options_for_depth("pyramiddrop", 6) == {"prune_before": (2, 3, 5)}
    for name in ("fastv", "dart"):
        assert options_for_depth(name, 6) == {"prune_before": 1}
        assert options_for_depth(name, 8) == {}  # the first two layers see all tokens, as published


@pytest.mark.parametrize("depth", range(2, 24))
def test_short_decoders_get_the_layers_they_had_before_they_were_renamed(depth: int) -> None:
    """Counted as published (SparseVLM by the layer whose attention ranks), then shifted."""
    ranking = scaled_layers((2, 6, 15)[-max(1, depth - 1) :], depth, first=0, last=depth - 2)
    assert options_for_depth("sparsevlm", depth) == {"prune_before": tuple(n + 1 for n in ranking)}
    after = scaled_layers((7, 9, 12) if depth > 3 else (9,), depth, first=1, last=depth - 1)
    assert options_for_depth("transprune", depth) == {
        "prune_before": after,
        "transition_layers": tuple(n - 1 for n in range(after[0], after[-1] + 1)),
    }


@given(
    st.lists(st.integers(0, 31), min_size=1, max_size=5, unique=True).map(sorted),
    st.integers(2, 64), st.integers(0, 1), st.integers(1, 2),
)  # fmt: skip
def test_scaled_layers_rise_inside_their_bounds(
    layers: list[int], depth: int, first: int, behind: int
) -> None:
    last = depth - behind
    if last - first + 1 < len(layers):
        with pytest.raises(ValueError, match="does not fit a decoder"):
            scaled_layers(layers, depth, first=first, last=last)
        return
    placed = scaled_layers(layers, depth, first=first, last=last)
    assert list(placed) == sorted(set(placed))
    assert first <= placed[0]
    assert placed[-1] <= last
    if depth == 32 and first <= layers[0] and layers[-1] <= last:
        assert placed == tuple(layers)
