"""Operators of SparseVLM and PyramidDrop against loops, and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.sparsevlm import recycle
from torch import Tensor

from tokprune.operators.sparsevlm import (
    attention_rank,
    best_heads,
    fixed_count,
    rank_count,
    rater_attention,
    recycle_counts,
    recycle_merge,
    rotary_weight,
    text_raters,
    text_relevance,
    vision_scores,
)

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10_000)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------- raters


@given(seeds, st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=3))
@few
def test_relevance_is_a_mean_of_softmax_rows(seed: int, shapes: list[tuple[int, int]]) -> None:
    length = max(a + b for a, b in shapes)
    most = max(b for _, b in shapes)
    embeds = randn(seed, len(shapes), length, 6)
    image = torch.zeros(len(shapes), length, dtype=torch.bool)
    text = torch.zeros(len(shapes), most, dtype=torch.long)
    valid = torch.zeros_like(text, dtype=torch.bool)
    for b, (n, t) in enumerate(shapes):
        image[b, :n] = True
        text[b, :t] = torch.arange(n, n + t)
        valid[b, :t] = True
    got = text_relevance(embeds, image, text, valid)
    torch.testing.assert_close(got.sum(1), torch.ones(len(shapes)))
    for b, (n, t) in enumerate(shapes):
        rows = (embeds[b, :n] @ embeds[b, n : n + t].T).softmax(-1)
        torch.testing.assert_close(got[b, :t], rows.mean(0), rtol=1e-4, atol=1e-6)
        assert not got[b, t:].any()


def test_relevance_of_long_images_in_parts() -> None:
    embeds = randn(0, 2, 1300, 4)
    image = torch.zeros(2, 1300, dtype=torch.bool)
    image[0, 3:1250] = image[1, 700:900] = True
    text = torch.arange(1290, 1300).expand(2, -1)
    got = text_relevance(embeds, image, text)
    for b in range(2):
        rows = (embeds[b, image[b]] @ embeds[b, 1290:].T).softmax(-1)
        torch.testing.assert_close(got[b], rows.mean(0))


def test_relevance_without_image_or_text_is_zero() -> None:
    embeds = randn(0, 2, 5, 4)
    image = torch.zeros(2, 5, dtype=torch.bool)
    image[1, :2] = True
    text = torch.tensor([[3, 4], [3, 4]])
    valid = torch.tensor([[True, True], [False, False]])
    assert not text_relevance(embeds, image, text, valid).any()
    assert text_relevance(embeds, image, text[:, :0]).shape == (2, 0)


@given(seeds, st.integers(1, 12), st.integers(0, 4))
@few
def test_raters_are_above_the_average_or_all(seed: int, n: int, gap: int) -> None:
    relevance = torch.cat([randn(seed, 1, n).softmax(-1), torch.full((1, gap), 9.0)], dim=1)
    valid = torch.arange(n + gap)[None] < n
    raters = text_raters(relevance, valid)
    assert not (raters & ~valid).any()
    mean = relevance[0, :n].mean()
    above = relevance[0, :n] > mean
    assert raters[0, :n].tolist() == (above if above.any() else torch.ones(n)).bool().tolist()
    assert raters.any()


def test_a_single_text_token_rates() -> None:
    assert text_raters(torch.ones(2, 1)).all()
    assert not text_raters(torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)).any()


# ------------------------------------------------------------------------------- scores


def rotary(position: Tensor, width: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    angle = position[..., None] * base ** (-torch.arange(width // 2).double() * 2 / width)
    return tuple(x.float().repeat(1, 1, 2) for x in (angle.cos(), angle.sin()))  # type: ignore


@given(seeds, st.sampled_from([4, 16, 128]))
@few
def test_rotary_weight_is_what_rotated_ones_say(seed: int, width: int) -> None:
    position = randn(seed, 2, 40).mul(20).long().abs().sort(-1).values
    rows = torch.tensor([[39, 5], [20, 38]])
    cos, sin = rotary(position, width)
    got, bare = rotary_weight(cos, sin, rows), rotary_weight(cos, sin, rows, least=None)
    half = width // 2
    turned = torch.cat([cos - sin, cos + sin], -1)  # the pairs (1, 1), turned
    turned = torch.cat([turned[..., :half], turned[..., width : width + half]], -1)
    for b in range(2):
        want = turned[b, rows[b]] @ turned[b].T / math.sqrt(width)
        least = 1e-3 * math.sqrt(width)
        torch.testing.assert_close(got[b], want.clamp(min=least), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bare[b], want, rtol=1e-4, atol=1e-4)
    assert (got > 0).all()


def test_rotary_weight_depends_on_distance_alone() -> None:
    a = rotary_weight(*rotary(torch.arange(30)[None], 64), torch.tensor([[29]]))
    b = rotary_weight(*rotary(torch.arange(500, 530)[None], 64), torch.tensor([[29]]))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("heads", [None, 2, 9])
def test_scores_are_means_over_heads_and_raters(heads: int | None, weighted: bool) -> None:
    probs = randn(1, 2, 4, 5, 12).softmax(-1)
    raters = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]).bool()
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 2:9] = image[1, 1:5] = True
    weight = 1 + randn(2, 2, 5, 12).abs() if weighted else None
    total = rater_attention(probs, raters, weight)
    chosen = None if heads is None else best_heads(total, image, heads)
    got = vision_scores(total, raters, chosen)
    for b in range(2):
        rows = [r for r in range(5) if raters[b, r]]
        own = probs[b] if weight is None else probs[b] / weight[b]
        sums = [float(own[h][rows][:, image[b]].sum()) for h in range(4)]
        best = sorted(range(4), key=lambda h: -sums[h])[: heads or 4]
        if chosen is not None:
            assert chosen[b].tolist() == best
        torch.testing.assert_close(got[b], own[best][:, rows].mean((0, 1)))


def test_samples_without_raters_score_zero() -> None:
    probs = randn(0, 1, 2, 3, 6).softmax(-1)
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert not vision_scores(rater_attention(probs, none), none).any()


@given(seeds, st.lists(st.tuples(st.integers(1, 6), st.integers(1, 15)), min_size=1, max_size=4))
@few
def test_rank_is_that_of_the_bare_block(seed: int, shapes: list[tuple[int, int]]) -> None:
    rows, columns = (max(s[i] for s in shapes) + 2 for i in (0, 1))
    probs = randn(seed, len(shapes), 3, rows, columns).softmax(-1)
    probs[:, :, 0] = probs[:, :, min(1, rows - 1)]  # a row twice
    raters = torch.arange(rows) < torch.tensor([[r] for r, _ in shapes])
    image = torch.arange(columns) < torch.tensor([[n] for _, n in shapes])
    got = attention_rank(probs, raters, image)
    for b, (r, n) in enumerate(shapes):
        assert got[b] == torch.linalg.matrix_rank(probs[b].mean(0)[:r, :n])
        assert got[b] <= max(1, min(r - 1, n))


@given(st.integers(1, 40), st.integers(1, 700), st.floats(0.1, 20), st.floats(-9, 9), st.booleans())
def test_rank_counts_stay_in_range(
    rank: int, tokens: int, scale: float, bias: float, always: bool
) -> None:
    k = rank_count(rank, tokens, scale, bias, always)
    assert 1 <= k <= tokens
    if rank >= tokens:
        assert k == tokens
    elif always and tokens > 1:
        assert k < tokens
    assert rank_count(rank, tokens, 1.0, 0.0) == min(rank, tokens)  # the video branch


def test_fixed_counts() -> None:
    assert [fixed_count(k, 20) for k in (3, 20, 66)] == [3, 20, 20]
    assert [fixed_count(k, 20, always_drop=True) for k in (3, 20, 66)] == [3, 19, 19]


# ------------------------------------------------------------------------------- recycling


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(1, 20))
def test_recycled_counts_fit(dropped: int, fraction: float, size: int) -> None:
    chosen, clusters = recycle_counts(dropped, fraction, size)
    if not dropped or not fraction:
        assert (chosen, clusters) == (0, 0)
        return
    assert 1 <= clusters <= chosen <= dropped
    assert chosen == min(dropped, int(fraction * dropped) + 1)


def test_published_recycled_counts() -> None:
    """The numbers behind "192 tokens": 576 → 300 + 9 → 200 + 4 → 110 + 3."""
    assert [recycle_counts(m)[1] for m in (276, 109, 94)] == [9, 4, 3]
    assert recycle_counts(276)[0] == 83


@given(seeds, st.lists(st.integers(1, 24), min_size=1, max_size=3), st.integers(1, 6))
@few
def test_clusters_equal_those_of_the_loops(seed: int, sizes: list[int], most: int) -> None:
    m = max(sizes)
    most = min(most, m)
    x = randn(seed, len(sizes), m, 5) + 3 * randn(seed + 1, 1, 1, 5)
    clusters = [min(most, n) for n in sizes]
    valid = torch.arange(m) < torch.tensor([[n] for n in sizes])
    got = recycle_merge(x.masked_fill(~valid[:, :, None], 1e3), most, torch.tensor(clusters), valid)
    for b, (n, k) in enumerate(zip(sizes, clusters)):
        centres, members = recycle(x[b, :n], k)
        assert got.centre[b].tolist() == centres + [-1] * (most - k)
        for c, group in enumerate(members):
            assert (got.cluster[b] == c).nonzero().view(-1).tolist() == group
            torch.testing.assert_close(got.out[b, c], x[b, group].mean(0))
        assert not got.out[b, k:].any()
        assert (got.cluster[b, n:] == -1).all()


@given(seeds, st.integers(2, 20), st.integers(1, 5), st.sampled_from([1e-3, 1.0, 300.0]))
@few
def test_every_token_is_in_one_cluster(seed: int, m: int, k: int, scale: float) -> None:
    """Also where densities would underflow, and with copies of tokens."""
    assume(k <= m)
    x = scale * randn(seed, 1, m, 4)
    x[:, m // 2] = x[:, 0]
    got = recycle_merge(x, k)
    assert torch.isfinite(got.out).all()
    assert sorted(set(got.cluster[0].tolist())) == list(range(k))
    assert len(set(got.centre[0].tolist())) == k
    assert got.cluster[0, got.centre[0]].tolist() == list(range(k))
    sizes = torch.stack([(got.cluster[0] == c).sum() for c in range(k)])
    total = (got.out[0] * sizes[:, None]).sum(0)
    torch.testing.assert_close(total, x[0].sum(0), rtol=1e-4, atol=1e-4 * scale)


def test_identical_tokens_and_half_precision() -> None:
    x = torch.ones(1, 6, 3, dtype=torch.float16)
    got = recycle_merge(x, 3)
    assert got.out.dtype == torch.float16
    assert torch.equal(got.out, x[:, :3])
    assert got.centre.tolist() == [[0, 1, 2]]
    assert got.cluster.tolist() == [[0, 1, 2, 0, 0, 0]]


def test_far_from_the_origin_clusters_are_the_same() -> None:
    """Hidden states share large components; distances must not drown in them."""
    x = randn(3, 1, 30, 16)
    want = recycle_merge(x, 4)
    got = recycle_merge(x + 500, 4)
    assert torch.equal(got.centre, want.centre)
    assert torch.equal(got.cluster, want.cluster)


def test_two_clusters_do_not_depend_on_rounding() -> None:
    """With two clusters nearest neighbours of each other have the same density, exactly."""
    for seed in range(30):
        x = randn(seed, 1, 21, 64)
        alone = recycle_merge(x, 2)
        many = recycle_merge(torch.cat([randn(99, 6, 21, 64), x]), 2)
        assert torch.equal(alone.centre[0], many.centre[-1])
        assert alone.centre[0].tolist() == recycle(x[0], 2)[0]


# ------------------------------------------------------------------------------- errors


def test_errors_name_what_is_wrong() -> None:
    probs, raters = torch.ones(1, 2, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"image has shape \(1, 4\) and embeds \(1, 5, 2\)"):
        text_relevance(torch.ones(1, 5, 2), torch.ones(1, 4).bool(), torch.zeros(1, 1).long())
    with pytest.raises(ValueError, match=r"valid is torch.bool \(1, 2\); it should be .*\(1, 3\)"):
        text_raters(torch.ones(1, 3), torch.ones(1, 2).bool())
    with pytest.raises(ValueError, match=r"raters is torch.float32 \(1, 3\)"):
        rater_attention(probs, raters.float())
    with pytest.raises(ValueError, match=r"weight has shape \(1, 3\); it should be \(1, 3, 4\)"):
        rater_attention(probs, raters, torch.ones(1, 3))
    with pytest.raises(ValueError, match="heads is 0; it should be at least 1"):
        best_heads(probs[:, :, 0], torch.ones(1, 4).bool(), 0)
    with pytest.raises(ValueError, match=r"image is torch.bool \(1, 5\)"):
        attention_rank(probs, raters, torch.ones(1, 5).bool())
    with pytest.raises(ValueError, match=r"most is 4 and x has shape \(1, 3, 2\)"):
        recycle_merge(torch.ones(1, 3, 2), 4)
    with pytest.raises(ValueError, match=r"valid is torch.bool \(1, 2\)"):
        recycle_merge(torch.ones(1, 3, 2), 1, valid=torch.ones(1, 2).bool())
