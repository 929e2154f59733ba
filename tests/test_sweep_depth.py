"""Published layers on decoders of another depth."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from tokprune.families import family_of
from tokprune.methods import image_methods, make_method
from tokprune.methods.depth import layer_options, scaled_layers


@pytest.mark.parametrize("name", image_methods())
@pytest.mark.parametrize("depth", [24, 32, 40])
def test_deep_decoders_keep_the_published_layers(name: str, depth: int) -> None:
    assert layer_options(name, depth) == {}


@pytest.mark.parametrize("name", image_methods())
@pytest.mark.parametrize("layers", [2, 3, 4, 5, 6, 8])
def test_every_method_fits_a_short_decoder(name: str, layers: int) -> None:
    model = tiny.llava(layers=layers)
    family = family_of(model)
    facts = family.facts(model, family.parts(model))
    plan = make_method(name, keep=9, **layer_options(name, layers)).plan(facts)
    assert plan.encoder or plan.prompt or plan.decoder


def test_six_layers() -> None:
    assert layer_options("transprune", 6) == {
        "prune_layers": (1, 2, 3), "accumulate_layers": (1, 2, 3),
    }  # fmt: skip
    assert layer_options("mustdrop", 6) == {"pruning_layers": (0, 1, 2, 3)}
    assert layer_options("fastv", 6) == {"layer": 1}
    assert layer_options("fastv", 8) == {}  # the first two layers see all tokens, as published


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
