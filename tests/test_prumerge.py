"""PruMerge beyond the golden cases: a slow reference, the repairs, and a whole model."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llava, make_inputs
from torch import Tensor

import tokprune
from tokprune.methods import PruMerge
from tokprune.operators.prumerge import adaptive, by_attention, cls_attention, merge, spread
from tokprune.testing import tiny_family


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def peaked(seed: int, tiles: int, n: int) -> Tensor:
    """Attention with a few outliers in each tile."""
    return (3 * draw(seed, tiles, n)).softmax(-1)


def slowly(x: Tensor, key: Tensor, attn: Tensor, order: list[int], count: int, near: int) -> Tensor:
    rows = []
    for i in order[:count]:
        cosine = {j: float(torch.cosine_similarity(key[i], key[j], dim=0)) for j in order if j != i}
        best = sorted(cosine, key=lambda j: -cosine[j])[:near]
        rows.append(x[i] + sum((attn[j] * x[j] for j in best), torch.zeros_like(x[i])))
    rest = (attn[j] * x[j] for j in order[count:])
    return torch.stack([*rows, sum(rest, torch.zeros_like(x[0]))])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(2, 20), st.integers(1, 40), st.data())
def test_merging_by_a_slow_reference(seed: int, n: int, near: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    x, key, attn = draw(seed, 1, n, 5), draw(seed + 1, 1, n, 4), peaked(seed + 2, 1, n)
    order = by_attention(attn)
    want = slowly(x[0], key[0], attn[0], order[0].tolist(), count, near)
    torch.testing.assert_close(merge(x, key, attn, order, count, near)[0], want)


def test_more_rows_than_are_held_at_once() -> None:
    x, key, attn = draw(0, 1, 300, 3), draw(1, 1, 300, 4), peaked(2, 1, 300)
    order = by_attention(attn)
    want = slowly(x[0], key[0], attn[0], order[0].tolist(), 280, 6)
    torch.testing.assert_close(merge(x, key, attn, order, 280, 6)[0], want)


@pytest.mark.parametrize("plus", [False, True])
def test_the_count_of_a_tile_does_not_depend_on_the_others(plus: bool) -> None:
    attn = torch.cat([peaked(0, 1, 64), (5 * draw(1, 1, 64)).softmax(-1), torch.ones(1, 64) / 64])
    together = adaptive(attn, plus)
    for tile in range(3):
        alone = adaptive(attn[tile : tile + 1], plus)
        assert alone.counts == together.counts[tile : tile + 1]
        assert alone.order[0].equal(together.order[tile])
    assert len(set(together.counts)) > 1
    assert len(set(adaptive(attn, plus, shared=True).best)) == 1


@pytest.mark.parametrize("plus", [False, True])
def test_flat_attention_leaves_a_patch(plus: bool) -> None:
    found = adaptive(torch.full((1, 36), 1 / 37), plus)
    assert found.best == [1]
    assert found.order[0, 0] == 0
    # a grid of a twelfth of all patches: 0, 12, 24, and 0 is chosen already
    assert found.counts == ([3] if plus else [1])


def test_evenly_spaced_patches_beside_the_best() -> None:
    attn = torch.zeros(1, 12)
    attn[0, [3, 7]] = 1.0
    order = spread(attn, 2, 3)[0].tolist()
    left = [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert order[:5] == [3, 7] + [left[math.floor((i + 0.5) * 10 / 3)] for i in range(3)]
    assert order[5:] == [patch for patch in left if patch not in order[:5]]
    with pytest.raises(ValueError, match="at most 12"):
        spread(attn, 10, 3)


def test_too_many_outliers_are_capped_with_a_warning() -> None:
    attn = torch.ones(1, 64)
    attn[0, ::5] = 9.0  # 13 of 64 patches: a grid of step 1
    attn = attn / attn.sum()
    with pytest.warns(UserWarning, match=r"63 of the 64 patches.*max_keep=0.5 leaves 31"):
        order, counts = PruMerge(plus=True).choose(attn, None)
    assert counts == [31]
    assert order[0, :13].tolist() == list(range(0, 64, 5))
    assert order[0].sort().values.equal(torch.arange(64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PruMerge(plus=True, max_keep=64).choose(attn, None)[1] == [63]


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"keep=9 and ratio=0\.5"):
        PruMerge(keep=9, ratio=0.5)
    model = tiny_family("qwen2-vl").build()
    with pytest.raises(ValueError, match="ratio_scope='call' is for towers"):
        tokprune.patch(model, PruMerge(keep=4, ratio_scope="call"))


def test_a_model_reads_the_features_of_one_layer_merged_by_the_last() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6]])
    tower = model.model.vision_tower
    with torch.no_grad():
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        last = getattr(tower, "vision_model", tower).encoder.layers[-1]
        normed = last.layer_norm1(states[-2])
        query, key = last.self_attn.q_proj(normed[:, 0]), last.self_attn.k_proj(normed)
        attn = cls_attention(query, key)
        rows = merge(states[-2][:, 1:], key[:, 1:], attn, by_attention(attn), 8, 32)
        want = model.model.multi_modal_projector(rows)[0]
    with tokprune.compress(model, "prumerge", keep=9), torch.no_grad():
        entered = model(**inputs, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(entered[0, 4:13], want, rtol=1e-4, atol=1e-5)
