"""MSDG-Prune: a slow reference, shares of the budget, what is read of each tower, errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from golden_checks.models import Watched
from reference.msdg import budgets_of, salient
from test_methods_dart_cdpruner_m3 import PROMPTS, SIZES, kept, large_facts, prefill, text_of
from tiny import llava, llava_next, make_inputs
from torch import Tensor

import tokprune
from tokprune.errors import CompositionError, UnsupportedModelError
from tokprune.families import bind
from tokprune.methods.msdg import MSDG
from tokprune.methods.msdg.layers import encoder_layers
from tokprune.operators.msdg import (
    change_direction,
    question_saliency,
    salient_of_groups,
    softmax_budgets,
    spherical_groups,
)
from tokprune.testing import Case, tiny_family


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5, 3.0])
@pytest.mark.parametrize(("n", "groups", "keep"), [(12, 6, 9), (40, 5, 12), (90, 20, 31)])
def test_equals_the_reference(n: int, groups: int, keep: int, noise: float) -> None:
    """A batch of which each sample has other sinks: none, a few, more than the budget allows. With
    fewer directions than groups some groups are empty."""
    generator = torch.Generator().manual_seed(n)
    centres = torch.randn(groups - 2, 16, generator=generator)
    pick = torch.randint(len(centres), (3, n), generator=generator)
    way = centres[pick] + noise * torch.randn(3, n, 16, generator=generator)
    saliency = torch.randn(3, n, generator=generator) + 2
    gone = [[], list(range(0, n, 7)), list(range(n - keep + 2))]
    sink = torch.zeros(3, n, dtype=torch.bool)
    for b, own in enumerate(gone):
        sink[b, own] = True
    way[sink] = torch.nan  # what sinks hold plays no part
    groups = min(groups, n - len(gone[2]))
    found = salient_of_groups(way, saliency, keep, groups, sink, seed=4)
    for b in range(3):
        stay, labels, budgets = salient(way[b], saliency[b], keep, groups, gone[b], seed=4)
        assert found.group[b].tolist() == labels
        assert found.budget[b].tolist() == budgets
        assert found.kept[b].tolist() == stay


@pytest.mark.parametrize("scale", [0.0, 0.3, 5.0, 40.0])
def test_shares_of_the_budget(scale: float) -> None:
    """Small saliencies share it, large ones let groups be filled one after the other."""
    generator = torch.Generator().manual_seed(1)
    for budget in (1, 7, 24, 50):
        labels = torch.randint(6, (2, 50), generator=generator)
        saliency = torch.rand(2, 50, generator=generator) * scale + labels * scale / 4
        got = softmax_budgets(saliency, labels, 6, torch.tensor([budget] * 2))
        for b in range(2):
            want = budgets_of(saliency[b].double().tolist(), labels[b].tolist(), 6, budget)
            assert got[b].tolist() == want
            assert sum(want) == budget


def test_a_group_is_filled_before_the_next_gets_any() -> None:
    labels = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    saliency = torch.tensor([[10.0, 10, 10, 90, 90, 50, 50, 50]])
    for budget, want in ((2, [0, 2, 0]), (4, [1, 2, 1]), (6, [1, 2, 3]), (8, [3, 2, 3])):
        assert softmax_budgets(saliency, labels, 3, torch.tensor([budget])).tolist() == [want]


def test_tokens_that_nothing_changed_and_equal_ones() -> None:
    still = torch.zeros(1, 5, 4)
    assert change_direction(still + 2, still + 3).abs().max() == 0  # longer, no other direction
    assert spherical_groups(still, 3).tolist() == [[0] * 5]
    found = salient_of_groups(still, torch.ones(1, 5), 3, 2)
    assert found.kept.tolist() == [[0, 1, 2]]
    way = torch.eye(4)[[2, 0, 2, 1, 0]][None]
    assert spherical_groups(way, 3).tolist() == [[0, 1, 0, 2, 1]]
    assert spherical_groups(way, 3, seed=8).tolist() == [[1, 2, 1, 0, 2]]  # from token 3
    one = salient_of_groups(way, torch.tensor([[3.0, 1, 3, -1, 2]]), 2, 1)
    assert one.kept.tolist() == [[0, 2]]


def test_words() -> None:
    projected = torch.tensor([[[1.0, 0], [-2, 0], [0, 3]]])
    query = torch.tensor([[[5.0, 0], [0, -1]]])
    change = torch.tensor([[2.0, 3, 4]])
    assert question_saliency(change, projected, query).tolist() == [[2, 0, 0]]
    first = torch.tensor([[True, False]])
    assert question_saliency(change, projected, query, first).tolist() == [[2, -3, 0]]
    assert question_saliency(change, projected, query, ~first).tolist() == [[0, 0, -4]]
    assert question_saliency(change, projected, query, first & ~first).tolist() == [[2, 3, 4]]
    assert question_saliency(change, projected, query[:, :0]).tolist() == [[2, 3, 4]]


def expected(
    states: list[Tensor], sinks: Tensor, features: Tensor, text: Tensor, keep: int, groups: int
) -> list[int]:
    """``states`` early, late, start, end [n, patches of a token, D]; ``sinks`` [n]."""
    unit = torch.nn.functional.normalize
    early, late, start, end = (own.double() for own in states)
    way = unit(unit(late, dim=-1) - unit(early, dim=-1), dim=-1).mean(1)
    likeness = unit(features.double(), dim=-1) @ unit(text.double(), dim=-1).T
    saliency = (end - start).norm(dim=-1).mean(1) * likeness.amax(-1)
    return salient(way, saliency, keep, groups, sinks.nonzero().flatten().tolist())[0]


def test_states_of_a_tower() -> None:
    """Those that enter the layers, as the model itself reports them."""
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    with torch.no_grad():
        pixels = inputs["pixel_values"]
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    entry = states[3][:, 1:, 3].abs()
    limit = float(entry.quantile(0.8))
    method = Watched(MSDG(keep=9, groups=4, layers=(1, 5, 2, 4), sink=(2, 3, limit)))
    last = prefill(model, inputs, method)
    sinks = entry > limit
    assert sinks.any(-1).all()
    for b, image in enumerate(method.images):
        own = [states[layer][b, 1:, None] for layer in (1, 5, 2, 4)]
        want = expected(own, sinks[b], image.features, text_of(model, inputs, b), 9, 4)
        assert kept(last, b) == want
        assert not sinks[b, want].any()


def test_sinks_come_back_where_too_few_others_are_left() -> None:
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    every = prefill(model, inputs, MSDG(keep=9, sink=(2, 3, 0.0)))
    assert every.layers[-1].counts == [[9]] * 3


@pytest.mark.parametrize("shape", [[[4, "image", 6], [3, "image", 5]], [[4, "video", 6]]])
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_patches_of_a_packed_encoder_are_averaged_by_cell(name: str, shape: Any) -> None:
    tiny = tiny_family(name)
    model = tiny.build()
    inputs = Case(MSDG(keep=4), tiny, model, shape).inputs()
    states: dict[int, Tensor] = {}
    visual = model.model.visual
    handles = [
        block.register_forward_hook(lambda m, args, out, i=i: states.__setitem__(i + 1, out))
        for i, block in enumerate((*visual.blocks, visual.merger))
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    tokens = states[len(visual.blocks) + 1]
    area = model.config.vision_config.spatial_merge_size**2
    cells = [states[layer].view(-1, area, states[layer].shape[-1]) for layer in (1, 4, 2, 3)]
    entry = states[2][:, 5].abs().view(-1, area)
    limit = float(entry.quantile(0.9))
    marked = entry.gt(limit).any(-1)
    method = Watched(MSDG(keep=4, groups=3, layers=(1, 4, 2, 3), sink=(1, 5, limit)))
    with tokprune.compress(model, method) as trace, torch.no_grad():
        model(**inputs)
    for number, image in enumerate(method.images):
        # which of the merger's tokens each one is
        at = (image.features[:, None] - tokens).abs().amax(-1).argmin(1)
        assert image.text is not None
        assert 0 < int(marked[at].sum()) < len(at) - 4
        own = [states_of[at] for states_of in cells]
        want = expected(own, marked[at], image.features, image.text, 4, 3)
        assert kept(trace.last, number) == want


def test_tiles_are_grouped_together() -> None:
    model = llava_next()
    inputs = make_inputs(model, PROMPTS, SIZES)
    method = Watched(MSDG(keep=14))
    last = prefill(model, inputs, method)
    assert last.layers[-1].counts == [[14]] * 3
    for b, image in enumerate(method.images):
        assert not image.newline[kept(last, b)].any()


def test_layers_of_towers() -> None:
    """Published ones where they are, their share of the depth elsewhere."""
    clip = large_facts()
    assert encoder_layers(MSDG(keep=9), clip) == ((2, 23, 14, 19), False)
    assert clip.tower is not None

    def layers(depth: int, feature: int | None) -> Any:
        assert clip.tower is not None
        tower = dataclasses.replace(clip.tower, encoder_layers=depth, feature_layer=feature)
        return encoder_layers(MSDG(keep=9), dataclasses.replace(clip, tower=tower))[0]

    assert layers(27, 26) == (2, 26, 16, 21)
    assert layers(12, None) == (1, 12, 7, 10)
    assert layers(12, 5) == (1, 6, 5, 6)
    assert layers(2, 1) == (1, 2, 1, 2)
    with pytest.raises(UnsupportedModelError, match="reads layer 0 of its vision encoder"):
        layers(24, 0)
    seen = dataclasses.replace(clip.tower, encoder_layers=32, feature_layer=31, merges=2)
    packed = dataclasses.replace(clip, tower=None, observed=seen, readable=True)
    assert encoder_layers(MSDG(keep=9), packed) == ((2, 31, 19, 24), True)
    own = MSDG(keep=9, layers=(1, 24, 3, 4), sink=(23, 0, 1.0))
    assert encoder_layers(own, clip) == ((1, 24, 3, 4), False)
    with pytest.raises(ValueError, match=r"layers=\(1, 25, 3, 4\) should .* up to 24"):
        encoder_layers(MSDG(keep=9, layers=(1, 25, 3, 4)), clip)
    with pytest.raises(ValueError, match=r"sink=\(24, 0, 1.0\) should .* up to 23"):
        encoder_layers(MSDG(keep=9, sink=(24, 0, 1.0)), clip)


def test_what_cannot_be() -> None:
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    both = tokprune.compose(tokprune.FasterVLM(keep=14), MSDG(keep=7))
    with pytest.raises(CompositionError, match="another method has dropped or merged some"):
        prefill(model, inputs, both)
    width = model.config.vision_config.hidden_size
    with pytest.raises(ValueError, match=rf"names coordinate {width} of states that have {width}"):
        prefill(model, inputs, MSDG(keep=7, sink=(0, width, 1.0)))
    internvl = bind(tiny_family("internvl").build()).facts
    with pytest.raises(UnsupportedModelError, match="msdg works inside the vision encoder"):
        MSDG(keep=3).plan(internvl)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups=0 should be a whole number, at least 1"),
        ({"layers": (2, 2, 3, 4)}, "should be .* with early < late"),
        ({"layers": (0, 2, 3, 4)}, "encoder layers from 1 on"),
        ({"layers": (1, 2, 3)}, r"should be \(early, late, start, end\)"),
        ({"sink": (11, 650)}, r"should be \(layer, coordinate, threshold\)"),
        ({"sink": (11, -1, 50.0)}, r"should be \(layer, coordinate, threshold\)"),
        ({"sink": (11, 650, -1)}, "a limit of at least 0"),
        ({"seed": 0.5}, "seed=0.5 should be a whole number"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MSDG(keep=9, **options)


def test_operators_refuse_what_does_not_fit() -> None:
    way, one = torch.zeros(1, 4, 3), torch.ones(1, 4)
    with pytest.raises(ValueError, match="states of the same patches"):
        change_direction(way, way[:, 1:])
    with pytest.raises(ValueError, match=r"query \(1, 4, 2\)"):
        question_saliency(one, way, way[..., :2])
    with pytest.raises(ValueError, match="words is"):
        question_saliency(one, way, way, one)
    with pytest.raises(ValueError, match="groups is 0"):
        spherical_groups(way, 0)
    with pytest.raises(ValueError, match="candidates is"):
        spherical_groups(way, 2, one)
    with pytest.raises(ValueError, match=r"budget \(2,\)"):
        softmax_budgets(one, one.long(), 2, torch.ones(2).long())
    with pytest.raises(ValueError, match="k is 5"):
        salient_of_groups(way, one, 5)
    with pytest.raises(ValueError, match=r"saliency \(4,\)"):
        salient_of_groups(way, one[0], 2)
