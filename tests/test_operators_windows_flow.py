"""Properties of the FlowCut, MustDrop, VisionZip and pooling operators."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import flow as slow_flow
from reference import mustdrop as slow_mustdrop
from reference import visionzip as slow_visionzip
from reference import windows as slow_windows
from reference.packing import raster_pack
from torch import Tensor

from tokprune.operators.anyres import raster_position, unpad_bounds
from tokprune.operators.flow import (
    accumulate,
    attention_entropy,
    attn_terms,
    encoder_keep,
    flow_score,
    global_query_terms,
    prune_count,
    text_terms,
)
from tokprune.operators.mustdrop import (
    filter_score,
    key_mask,
    key_tokens,
    text_attention,
)
from tokprune.operators.pooling import (
    exact_scales,
    grid_avg_pool,
    grid_sample,
    nested_scales,
)
from tokprune.operators.topk import keep_topk
from tokprune.operators.visionzip import compress, contextual, dominant, token_scores
from tokprune.operators.windows import (
    WindowMerge,
    spatial_merge,
    spatial_merge_fixed,
    window_similarity,
)

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10_000)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def peaked(seed: int, *shape: int, spread: float = 2.0) -> Tensor:
    return (spread * randn(seed, *shape)).softmax(-1)


def padded(rows: list[Tensor], fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Stack rows of different length, filled at the end, and their validity."""
    most = max(len(r) for r in rows)
    valid = torch.tensor([[i < len(r) for i in range(most)] for r in rows])
    return torch.stack([torch.cat([r, r.new_full((most - len(r),), fill)]) for r in rows]), valid


# ------------------------------------------------------------------------------------ flow


def test_attn_terms_are_rows_of_the_whole_map() -> None:
    q, k, v = (randn(i, 2, 6, 11, 8) for i in range(3))
    k, v = k[:, :3], v[:, :3]
    for got, want in zip(attn_terms(q, k, v), slow_flow.attn_terms(q, k, v)):
        torch.testing.assert_close(got, want)
    per_head = attn_terms(q, k, v, value_norm="per_head").value
    assert torch.equal(per_head, v[:, :, 1:].transpose(1, 2).flatten(2))
    cosine = torch.cosine_similarity(v[:, :, :1], v[:, :, 1:], dim=-1).mean(1).clamp(min=0)
    torch.testing.assert_close(attn_terms(q, k, v, semantic="cosine").semantic, cosine)


@pytest.mark.parametrize("semantic", ["dot", "cosine"])
def test_padding_has_no_part_in_terms(semantic: str) -> None:
    lengths = [9, 5, 1]
    q, k, v = (randn(i, 3, 2, 10, 4) for i in range(3))
    allowed = torch.arange(10) <= torch.tensor(lengths)[:, None]
    for x in (k, v):  # whatever lies there
        x.masked_fill_(~allowed[:, None, :, None], torch.nan)
    batch = attn_terms(q, k, v, semantic=semantic, allowed=allowed)
    score = flow_score(*batch)
    assert torch.isfinite(score).all()
    for i, n in enumerate(lengths):
        own = (x[i : i + 1, :, : n + 1] for x in (q, k, v))
        single = attn_terms(*own, semantic=semantic)
        for got, want in zip(batch, single):
            torch.testing.assert_close(got[i, :n], want[0])
            assert not got[i, n:].any()
        torch.testing.assert_close(score[i, :n], flow_score(*single)[0])


def test_semantic_underflow_counts_as_zero() -> None:
    v = torch.zeros(1, 1, 6, 4)
    v[:, :, 0] = 1000
    v[:, :, 1:] = randn(0, 5, 4)
    q, k = randn(1, 1, 1, 6, 4), randn(2, 1, 1, 6, 4)
    terms = attn_terms(q, k, v)
    assert terms.semantic.sum() == 0
    torch.testing.assert_close(flow_score(*terms), flow_score(terms[0], None, terms[2]))


@few
@given(seeds, st.lists(st.integers(2, 60), min_size=1, max_size=4), st.integers(1, 22))
def test_prune_count_of_ragged_images(seed: int, lengths: list[int], remaining: int) -> None:
    rows = [peaked(seed + i, n) for i, n in enumerate(lengths)]
    for r in rows:
        r[0] = 0.0  # a patch without attention must not make the entropy undefined
    target = max(1, min(lengths) // 2)
    attention, valid = padded(rows, fill=0.7)
    single = prune_count(attention, remaining, target, valid)
    batch = prune_count(attention, remaining, target, valid, reduce="batch")
    raw = [slow_flow.raw_prune_count(r, remaining, target) for r in rows]
    for got, want, n in zip(single.tolist(), raw, lengths):
        assert abs(got - want) <= 0.5 + 1e-3
        assert 0 <= got <= max(0, n - target)
    excess = torch.tensor(lengths) - target
    assert batch.tolist() == torch.minimum(single.amax(), excess).tolist()


def test_rows_of_one_image_share_the_largest_count() -> None:
    attention, image = peaked(5, 4, 30), torch.tensor([7, 2, 7, 2])
    own = prune_count(attention, 2, 5).tolist()
    shared = prune_count(attention, 2, 5, reduce=image).tolist()
    assert shared == [max(own[0], own[2]), max(own[1], own[3])] * 2
    assert len(set(own)) > 2
    with pytest.raises(ValueError, match="reduce has shape"):
        prune_count(attention, 2, 5, reduce=image[:2])


def test_prune_count_half_rounds_to_even() -> None:
    # all attention on one patch: h = 0, so the number is (N - target) / sqrt(remaining)
    for n, want in ((6, 2), (8, 4), (10, 4), (12, 6)):  # 2.5, 3.5, 4.5, 5.5
        assert prune_count(torch.eye(n)[:1], 4, 1).tolist() == [want]


def test_one_target_per_image() -> None:
    attention, target = peaked(3, 3, 40), torch.tensor([10, 40, 25])
    got = prune_count(attention, 3, target)
    want = [prune_count(attention[i : i + 1], 3, int(t)).item() for i, t in enumerate(target)]
    assert got.tolist() == want
    assert want[1] == 0


def test_uniform_attention_drops_nothing() -> None:
    uniform = torch.full((1, 30), 1 / 30)
    torch.testing.assert_close(attention_entropy(uniform), torch.ones(1))
    assert prune_count(uniform, 1, 5).item() == 0
    assert attention_entropy(torch.ones(1, 1)).item() == 1
    assert prune_count(torch.zeros(1, 30), 1, 5).item() == 25  # no attention at all: no NaN


@few
@given(seeds, st.lists(st.integers(3, 40), min_size=1, max_size=4), st.sampled_from([0, 2, 6]))
def test_encoder_keep_of_ragged_images(seed: int, lengths: list[int], remaining: int) -> None:
    target = 8
    score, valid = padded([randn(seed + i, n).abs() for i, n in enumerate(lengths)], 1e6)
    attention = padded([peaked(seed + 9 + i, n) for i, n in enumerate(lengths)], 1.0)[0]
    batch = encoder_keep(score, attention, remaining, target, valid)
    for i, n in enumerate(lengths):
        single = encoder_keep(score[i : i + 1, :n], attention[i : i + 1, :n], remaining, target)
        want = list(range(n)) if single is None else single.index[0].tolist()
        assert len(want) == min(n, target) if remaining == 0 else len(want) >= min(n, target)
        if batch is None:
            assert want == list(range(n))
            continue
        kept = batch.counts[i]
        assert batch.index[i, :kept].tolist() == want
        assert (batch.index[i, kept:] == -1).all()
        assert want == sorted(want)


def test_encoder_keep_keeps_the_best() -> None:
    score, attention = randn(0, 2, 30), peaked(1, 2, 30)
    assert encoder_keep(score, attention, 3, 10) is None  # odd: a layer between two cuts
    assert encoder_keep(score, attention, 4, 30) is None  # nothing to drop
    last = encoder_keep(score, attention, 0, 10)
    assert last is not None
    assert last.counts == [10, 10]
    for i in range(2):
        assert set(last.index[i].tolist()) == set(score[i].topk(10).indices.tolist())
    ties = encoder_keep(torch.ones(1, 9), attention[:1, :9], 0, 4)
    assert ties is not None
    assert ties.index.tolist() == [[0, 1, 2, 3]]


def test_batch_count_is_the_largest() -> None:
    attention = torch.stack([peaked(0, 40), peaked(1, 40, spread=6.0)])
    score = randn(2, 2, 40)
    shared = encoder_keep(score, attention, 2, 5, reduce="batch")
    own = encoder_keep(score, attention, 2, 5, reduce="image")
    assert shared is not None
    assert own is not None
    assert own.counts[0] != own.counts[1]
    assert shared.counts == [min(own.counts)] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flow_in_half_precision_is_flow_of_the_same_numbers(dtype: torch.dtype) -> None:
    q, k, v = (randn(i, 2, 4, 51, 8).to(dtype) for i in range(3))
    half, full = attn_terms(q, k, v), attn_terms(q.float(), k.float(), v.float())
    assert all(t.dtype == torch.float32 for t in half)
    score = accumulate(None, flow_score(*half))
    torch.testing.assert_close(score, flow_score(*full))
    assert torch.equal(keep_topk(score, 12), keep_topk(flow_score(*full), 12))
    attention = peaked(5, 3, 500).to(dtype)
    assert torch.equal(prune_count(attention, 3, 60), prune_count(attention.float(), 3, 60))


def test_accumulate_halves_the_history() -> None:
    first, second, third = (randn(i, 2, 5) for i in range(3))
    history = accumulate(accumulate(accumulate(None, first), second), third)
    torch.testing.assert_close(history, first / 4 + second / 4 + third / 2)
    torch.testing.assert_close(accumulate(first, second, 0.9), 0.9 * first + 0.1 * second)


def test_decoder_cut_sees_only_the_visual_tokens() -> None:
    q, k, v = randn(0, 4, 40, 8), randn(1, 2, 40, 8), randn(2, 2, 40, 8)
    block, last = slice(6, 26), slice(33, 34)

    def chosen() -> Tensor:
        terms = text_terms(q[:, last], k[:, block], v[:, last], v[:, block])
        return keep_topk(flow_score(*terms), 7)

    got = chosen()
    assert torch.equal(got, slow_flow.llm_select(q, k, v, 6, 20, 33, 7))
    k[:, :6], v[:, :6] = 50.0, 50.0  # other tokens have no part
    k[:, 26:33], k[:, 34:] = -50.0, 50.0
    assert torch.equal(chosen(), got)
    assert torch.equal(slow_flow.llm_select(q, k, v, 6, 20, 33, 7), got)


def test_text_terms_of_spans_in_a_batch() -> None:
    q, k, v = (randn(i, 2, 2, 12, 4) for i in range(3))
    spans = [(1, 7), (4, 9)]
    allowed = torch.zeros(2, 12, dtype=torch.bool)
    for i, (a, b) in enumerate(spans):
        allowed[i, a:b] = True
    batch = text_terms(q[:, :, 11:], k, v[:, :, 11:], v, allowed=allowed)
    for i, (a, b) in enumerate(spans):
        single = text_terms(q[i, :, 11:], k[i, :, a:b], v[i, :, 11:], v[i, :, a:b])
        for got, want in zip(batch, single):
            torch.testing.assert_close(got[i, a:b], want)
        torch.testing.assert_close(batch.attention[i].sum(), torch.tensor(1.0))


def test_global_query_of_one_image_among_two() -> None:
    q, k, v = (randn(i, 2, 3, 10, 4) for i in range(3))
    allowed = torch.arange(10) < torch.tensor([[6], [10]])
    attention, value = global_query_terms(q, k, v, allowed=allowed)
    alone = global_query_terms(q[0, :, :6], k[0, :, :6], v[0, :, :6])
    torch.testing.assert_close(attention[0, :6], alone[0])
    torch.testing.assert_close(value[0, :6], alone[1])
    assert not attention[0, 6:].any()
    for got, want in zip((attention, value), slow_flow.global_query_terms(q, k, v)):
        torch.testing.assert_close(got[1], want[1])


# ------------------------------------------------------------------------------------ windows


def check_sample(
    merge: WindowMerge, i: int, tokens: Tensor, groups: list[list[int]], cls: int
) -> None:
    out = torch.stack([tokens[members].mean(0) for members in groups])
    m, r = len(groups), int(merge.r[i])
    assert merge.counts[i] == m + cls == int(merge.valid[i].sum())
    torch.testing.assert_close(merge.out[i, cls : cls + m], out)
    assert not merge.out[i, cls + m :].any()
    assert merge.size[i, cls:, 0].tolist()[:m] == [len(g) for g in groups]
    assert merge.size[i].sum() == merge.group.shape[1] + cls
    assert merge.rows[i].tolist() == [g[-1] for g in groups] + [-1] * (merge.rows.shape[1] - m)
    assert merge.dst[i, :r].tolist() == [g[-1] for g in groups[:r]]
    assert (merge.dst[i, r:] == -1).all()
    free = [g[0] for g in groups[r:]]
    assert merge.unmerged[i].tolist() == free + [-1] * (merge.unmerged.shape[1] - len(free))
    for row, members in enumerate(groups):
        assert merge.group[i, members].tolist() == [row] * len(members)


def grid_tokens(seed: int, batch: int, n: int) -> Tensor:
    """Tokens with a common part, so that some windows are alike, more in some samples."""
    common = randn(seed, batch, 1, 5) * torch.linspace(0.3, 1.5, batch)[:, None, None]
    return common + 0.5 * randn(seed + 1, batch, n, 5)


@settings(max_examples=25, deadline=None)
@given(
    seeds,
    st.sampled_from([((2, 2), (4, 6)), ((1, 3), (3, 6)), ((3, 3), (6, 6)), ((2, 1), (4, 3))]),
    st.booleans(),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
def test_spatial_merge_is_the_slow_loop(
    seed: int,
    shape: tuple[tuple[int, int], tuple[int, int]],
    class_token: bool,
    images: list[int],
) -> None:
    window, grid = shape
    cls, n, batch = int(class_token), grid[0] * grid[1], len(images)
    x = grid_tokens(seed, batch, n)
    lead = randn(seed + 2, batch, cls, 5)
    boxes = slow_windows.windows(window, grid)
    similar = [[slow_windows.similarity(t.double(), m) for m in boxes] for t in x]
    similarity = torch.tensor(similar)
    torch.testing.assert_close(window_similarity(x, window, grid), similarity, atol=1e-5, rtol=1e-5)
    threshold = similarity.flatten().sort().values.unfold(0, 2, 1)  # between two neighbours
    threshold = float(threshold[len(threshold) // 2].mean()) if len(threshold) else 0.0
    own = (similarity >= threshold).sum(1).tolist()
    whole = torch.cat([lead, x], dim=1)
    merge = spatial_merge(whole, threshold, window, class_token, torch.tensor(images), grid)
    for i, image in enumerate(images):
        r = min(o for o, other in zip(own, images) if other == image)
        assert merge.r[i] == r
        check_sample(merge, i, x[i], slow_windows.groups_of(boxes, similar[i], r), cls)
    assert torch.equal(merge.out[:, :cls], lead)
    shared = spatial_merge(whole, threshold, window, class_token, "batch", grid)
    assert shared.r.tolist() == [min(own)] * batch
    assert shared.valid.all()
    flipped = spatial_merge(
        whole.flip(0), threshold, window, class_token, torch.tensor(images).flip(0), grid
    )
    torch.testing.assert_close(flipped.out.flip(0), merge.out)
    assert torch.equal(flipped.group.flip(0), merge.group)


def test_merge_reads_one_number_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "nonzero"):
        real = getattr(Tensor, name)

        def spy(self: Tensor, *args: object, real: Callable = real, name: str = name) -> object:
            reads.append(name)
            return real(self, *args)

        monkeypatch.setattr(Tensor, name, spy)
    x = grid_tokens(0, 3, 36)
    spatial_merge(x, 0.5, class_token=False, share=torch.arange(3))
    assert reads == ["tolist"]
    spatial_merge_fixed(x, (3, 3), 20, class_token=False)
    assert reads == ["tolist"]


@pytest.mark.parametrize(("retained", "left"), [(145, 144), (64, 64), (70, 72), (16, 16)])
def test_fixed_merge_reaches_its_count(retained: int, left: int) -> None:
    x = torch.cat([randn(0, 2, 1, 5), grid_tokens(1, 2, 144)], dim=1)
    merge = spatial_merge_fixed(x, (3, 3), retained)
    assert merge.out.shape[1] == 1 + left
    for i in range(2):
        boxes = slow_windows.windows((3, 3), (12, 12))
        similar = [slow_windows.similarity(x[i, 1:].double(), m) for m in boxes]
        groups = slow_windows.groups_of(boxes, similar, int(merge.r[i]))
        check_sample(merge, i, x[i, 1:], groups, 1)
        single = spatial_merge_fixed(x[i : i + 1], (3, 3), retained)
        torch.testing.assert_close(single.out[0], merge.out[i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_in_half_precision_takes_the_float32_windows(dtype: torch.dtype) -> None:
    x = grid_tokens(3, 3, 36).to(dtype)
    own = torch.arange(3)
    half = spatial_merge(x, 0.8, class_token=False, share=own)
    full = spatial_merge(x.float(), 0.8, class_token=False, share=own)
    assert half.r.unique().tolist() == [0, 3, 4]
    assert half.out.dtype == dtype
    assert torch.equal(half.group, full.group)
    torch.testing.assert_close(half.out, full.out.to(dtype))


# ------------------------------------------------------------------------------------ mustdrop


def test_key_tokens_of_ragged_samples() -> None:
    lengths = [25, 13, 24, 1]
    rows = peaked(0, 4, 3, 26)
    valid = torch.arange(25) < torch.tensor(lengths)[:, None]
    batch = key_tokens(rows, 0.3, valid)
    assert batch.shape == (4, 8)
    for i, n in enumerate(lengths):
        single = key_tokens(rows[i : i + 1, :, : n + 1], 0.3)[0].tolist()
        assert len(single) == math.ceil(0.3 * n)
        assert batch[i].tolist() == single + [-1] * (8 - len(single))
        score = rows[i, :, 1 : n + 1].mean(0)
        assert single == score.sort(descending=True, stable=True).indices[: len(single)].tolist()
    mask = key_mask(batch, 25)
    assert mask.sum(1).tolist() == [math.ceil(0.3 * n) for n in lengths]


def stays(
    attn: Tensor, gamma: float, alpha: float, rows: Any = None, columns: Any = None
) -> Tensor:
    return filter_score(*text_attention(attn, rows, columns), gamma, alpha) >= 1


@few
@given(
    seeds,
    st.integers(1, 30),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.02, 0.05, 0.25, 1.0]),
    st.sampled_from([0.0, 0.003, 0.02, 1.0]),
    st.booleans(),
)
def test_filter_score_says_what_the_filter_does(
    seed: int, n: int, rows: int, gamma: float, alpha: float, coarse: bool
) -> None:
    attn = peaked(seed, 2, rows, n + 5)[..., :n]
    if coarse:  # exact ties with the limits
        attn = (attn * 8).round() / 8
    q = filter_score(*text_attention(attn), gamma, alpha)
    assert not q.isnan().any()
    assert torch.equal(q >= 1, slow_mustdrop.dual_filter(attn, gamma, alpha))


def test_a_probability_equal_to_the_limit_is_kept() -> None:
    for i in range(1, 200):
        alpha = i / 201
        attn = torch.tensor([[[alpha, 0.0, 1.0]]])
        assert stays(attn, 1.0, alpha).tolist() == [True, False, True]


def test_filter_of_a_ragged_batch() -> None:
    attn = peaked(1, 3, 2, 4, 20)
    rows = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    columns = torch.arange(20) < torch.tensor([[20], [12], [7]])
    keep = stays(attn, 0.06, 0.08, rows, columns)
    for i in range(3):
        own = attn[i][:, rows[i]][..., columns[i]]
        assert torch.equal(keep[i][columns[i]], stays(own, 0.06, 0.08))
    assert keep[2].all()  # no text after the image: everything stays
    assert 0 < keep[1].sum() < 12
    assert stays(attn[:, :, :0], 0.5, 0.5).all()
    assert torch.equal(stays(attn.flip(0), 0.06, 0.08).flip(0), stays(attn, 0.06, 0.08))


# ------------------------------------------------------------------------------------ visionzip


@few
@given(seeds, st.integers(1, 12), st.integers(0, 12), st.booleans())
def test_compress_is_the_slow_loop(seed: int, kept: int, count: int, class_token: bool) -> None:
    tokens = 24
    hidden, metric = randn(seed, 2, tokens, 6), randn(seed + 1, 2, tokens, 4)
    attn = peaked(seed + 2, 2, 3, tokens)
    got = compress(hidden, metric, attn, kept, count, class_token=class_token)
    assert got.out.shape[1] == kept + count
    for i in range(2):
        score = attn[i].sum(0)
        if class_token:
            score[0] = torch.inf
        indices = score.sort(descending=True, stable=True).indices[:kept].tolist()
        assert got.indices[i].tolist() == indices
        merged, groups = slow_visionzip.contextual(hidden[i], metric[i], indices, count)
        kept_tokens = sorted(indices)
        torch.testing.assert_close(got.out[i], torch.cat([hidden[i, kept_tokens], merged]))
        groups = [[token] for token in kept_tokens] + groups
        assert got.rows[i].tolist() == [g[0] for g in groups]
        where = {token: row for row, members in enumerate(groups) for token in members}
        assert got.group[i].tolist() == [where.get(t, -1) for t in range(tokens)]
        single = compress(
            hidden[i : i + 1], metric[i : i + 1], attn[i : i + 1], kept, count, "cls", class_token
        )
        torch.testing.assert_close(single.out[0], got.out[i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compress_in_half_precision_takes_the_float32_tokens(dtype: torch.dtype) -> None:
    hidden, metric = randn(0, 2, 60, 6).to(dtype), randn(1, 2, 60, 4).to(dtype)
    attn = peaked(2, 2, 3, 60).to(dtype)
    half = compress(hidden, metric, attn, 10, 5)
    full = compress(hidden.float(), metric.float(), attn.float(), 10, 5)
    assert half.out.dtype == dtype
    assert torch.equal(half.indices, full.indices)
    assert torch.equal(half.group, full.group)
    torch.testing.assert_close(half.out, full.out.to(dtype))


def test_mean_received_leaves_the_own_row_out() -> None:
    attn = peaked(0, 2, 3, 7, 7)
    want = torch.stack(
        [attn[:, :, [i for i in range(7) if i != j], j].sum(1).mean(-1) for j in range(7)], dim=1
    )
    torch.testing.assert_close(token_scores(attn, "mean_received"), want)
    got = dominant(attn, 4, "mean_received", class_token=False)
    assert torch.equal(got, dominant(want, 4, class_token=False))
    assert torch.equal(dominant(attn, 4), dominant(attn[:, :, 0], 4))


def test_all_tokens_dominant() -> None:
    hidden = randn(0, 1, 5, 3)
    got = compress(hidden, hidden, peaked(1, 1, 1, 5), 5, 0)
    assert torch.equal(got.out, hidden)
    with pytest.raises(ValueError, match="count is 1"):
        contextual(hidden, hidden, got.indices, 1)


# ------------------------------------------------------------------------------------ packing


@few
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 2000), st.integers(1, 2000))
def test_unpad_keeps_the_image(height: int, width: int, w: int, h: int) -> None:
    top, bottom, left, right = unpad_bounds(height, width, (w, h))
    assert top == height - bottom
    assert left == width - right
    assert top == 0 or left == 0
    shown_height, shown_width = min(height, h * width / w), min(width, w * height / h)
    assert -1e-6 <= bottom - top - shown_height + 1 <= 2
    assert -1e-6 <= right - left - shown_width + 1 <= 2


def test_positions_read_the_stitched_map_row_by_row() -> None:
    side, tiles = 6, (2, 3)
    kept = randn(0, 6, side * side).argsort(-1)[:, :11].sort(-1).values
    order = raster_position(kept, tiles, side).flatten().argsort()
    at = torch.stack([order // 11 + 1, order % 11], dim=1)
    assert torch.equal(at, raster_pack(kept, tiles, side, base=0))
    top, bottom, left, right = unpad_bounds(12, 18, (900, 300))
    assert (top, left) != (0, 0)
    place = raster_position(kept, tiles, side).flatten()[order]
    y, x = place // 18, place % 18
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    cropped = raster_pack(kept, tiles, side, 0, (top, bottom, left, right))
    assert torch.equal(at[inside], cropped)


# ------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize("grid", [(24, 24), (16, 16), (6, 12), (9, 15)])
def test_pooling_nests(grid: tuple[int, int]) -> None:
    x = randn(0, 2, grid[0] * grid[1], 3)
    fine, size = x, grid
    for scale in nested_scales(*grid)[1:]:
        p = round((size[0] * size[1] / scale) ** 0.5)
        fine = grid_avg_pool(fine, window=p, grid=size)
        size = (size[0] // p, size[1] // p)
        assert fine.shape[1] == scale
        torch.testing.assert_close(fine, grid_avg_pool(x, scale, grid=grid))
    assert set(nested_scales(*grid)) <= set(exact_scales(*grid))


def test_published_scales() -> None:
    assert nested_scales(24, 24) == [576, 144, 36, 9, 1]
    assert exact_scales(24, 24) == [576, 144, 64, 36, 16, 9, 4, 1]


def test_pooling_is_a_mean_in_float32() -> None:
    x = randn(0, 1, 6 * 4, 2) * 100
    got = grid_avg_pool(x, window=2, grid=(6, 4))
    for y in range(3):
        for column in range(2):
            block = x.view(6, 4, 2)[2 * y : 2 * y + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(got[0, 2 * y + column], block.mean((0, 1)))
    half = x.half()
    torch.testing.assert_close(
        grid_avg_pool(half, window=2, grid=(6, 4)),
        grid_avg_pool(half.float(), window=2, grid=(6, 4)).half(),
        rtol=0,
        atol=0,
    )
    rest = grid_avg_pool(x[:, :20], window=3, grid=(5, 4), official_rounding=True)
    assert rest.shape == (1, 1, 2)
    torch.testing.assert_close(rest[0, 0], x[0, :20].view(5, 4, 2)[:3, :3].mean((0, 1)))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_grid_sample_is_even(height: int, width: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, height * width))
    index = grid_sample(height, width, keep)
    assert index.shape == (keep,)
    assert index.dtype == torch.long
    assert torch.equal(index, index.unique())  # ascending, distinct
    assert index[0] >= 0
    assert index[-1] < height * width
    # no cell is far from a sample: at most about one mean spacing in either direction
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    far_y, far_x = (y[:, None] - index // width).abs(), (x[:, None] - index % width).abs()
    spacing = max((height * width / keep) ** 0.5, height / keep, width / keep)
    assert torch.maximum(far_y, far_x).amin(1).max() <= spacing + 1


@pytest.mark.parametrize(("height", "width"), [(3, 20), (20, 3), (1, 9), (9, 1), (7, 8), (24, 24)])
def test_grid_sample_never_repeats(height: int, width: int) -> None:
    for keep in range(1, height * width + 1):
        assert len(set(grid_sample(height, width, keep).tolist())) == keep
    assert grid_sample(height, width, height * width).tolist() == list(range(height * width))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (16, 16), (12, 18), (5, 5)])
def test_grid_sample_at_exact_scales_takes_window_centres(height: int, width: int) -> None:
    for scale in exact_scales(height, width):
        p = round((height * width / scale) ** 0.5)
        want = [y * width + x for y in range(p // 2, height, p) for x in range(p // 2, width, p)]
        assert grid_sample(height, width, scale).tolist() == want
    assert grid_sample(height, width, 0).tolist() == []


# ------------------------------------------------------------------------------------ errors

ROW, MAP = torch.ones(1, 2, 5), torch.ones(1, 9, 4)
Q = torch.ones(1, 2, 5, 4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: attn_terms(Q, Q, Q, semantic="sine"), "semantic='sine' is unknown"),
        (lambda: attn_terms(Q, Q, Q, value_norm="max"), "value_norm='max' is unknown"),
        (lambda: attn_terms(Q, Q, Q[:, :, :4]), "v has shape"),
        (lambda: attn_terms(Q, Q, Q, allowed=torch.ones(1, 4).bool()), "allowed is torch.bool"),
        (lambda: flow_score(ROW[0], ROW[0], ROW[0]), "value has shape"),
        (lambda: flow_score(ROW[0], ROW[0, :, :3], Q[0]), "semantic has shape"),
        (lambda: accumulate(ROW, ROW[..., :3]), "previous has shape"),
        (lambda: accumulate(ROW, ROW, 1.5), "history is 1.5"),
        (lambda: prune_count(ROW[0], 0, 1), "remaining is 0"),
        (lambda: prune_count(ROW[0], 2, 0), "target is 0"),
        (lambda: prune_count(ROW, 2, 1), "attention has shape"),
        (lambda: prune_count(ROW[0], 2, 1, reduce="all"), "reduce='all' is unknown"),
        (lambda: prune_count(ROW[0], 2, 1, ROW[0]), "valid is torch.float32"),
        (lambda: encoder_keep(ROW[0], ROW[0, :, :2], 2, 1), "attention has shape"),
        (lambda: encoder_keep(ROW[0], ROW[0], -1, 1), "remaining is -1"),
        (lambda: spatial_merge(MAP, window=(2, 2), class_token=False), r"window is \(2, 2\)"),
        (lambda: spatial_merge(MAP, window=(1, 1), class_token=False), r"window is \(1, 1\)"),
        (lambda: spatial_merge(MAP), "8 tokens are no square"),
        (lambda: spatial_merge(MAP, class_token=False, grid=(3, 2)), r"grid is \(3, 2\)"),
        (lambda: spatial_merge(MAP, class_token=False, share="image"), "share='image' is unknown"),
        (lambda: spatial_merge(MAP, class_token=False, share=torch.ones(2)), "share has shape"),
        (lambda: spatial_merge(MAP[0]), "x has shape"),
        (lambda: spatial_merge_fixed(torch.ones(1, 577, 2), (3, 3), 32), "retained is 32.* 58 and"),
        (lambda: spatial_merge_fixed(MAP, (3, 3), 10, class_token=False), "retained is 10"),
        (lambda: key_tokens(ROW, 0), "rate is 0"),
        (lambda: key_tokens(ROW[0]), "cls_row has shape"),
        (lambda: key_tokens(ROW, 0.1, torch.ones(1, 5).bool()), "valid is torch.bool"),
        (lambda: text_attention(ROW[0]), "attn has shape"),
        (lambda: filter_score(ROW, ROW, gamma=-1), "gamma is -1"),
        (lambda: text_attention(Q, row_valid=torch.ones(5).bool()), "row_valid is torch.bool"),
        (lambda: text_attention(Q, col_valid=torch.ones(1, 5).bool()), "col_valid is torch.bool"),
        (lambda: filter_score(ROW, ROW[0]), "peak has shape"),
        (lambda: token_scores(ROW, "mean_received"), "attn has shape"),
        (lambda: token_scores(ROW, "max"), "score='max' is unknown"),
        (lambda: dominant(ROW, 0), "count is 0"),
        (lambda: dominant(ROW, 6), "count is 6"),
        (lambda: compress(MAP, MAP, torch.ones(1, 1, 9), 4, 6), "count is 6.* 5 other"),
        (lambda: compress(MAP, MAP[:, :3], torch.ones(1, 1, 9), 4, 2), "metric has shape"),
        (lambda: raster_position(torch.ones(3, 2).long(), (2, 2), 6), "patch has shape"),
        (lambda: raster_position(torch.ones(4, 2).long(), (2, 2), 0), "side is 0"),
        (lambda: unpad_bounds(3, 3, (0, 2)), "original_size is"),
        (lambda: grid_avg_pool(MAP, 4), r"scale is 4.*\[9, 1\]"),
        (lambda: grid_avg_pool(MAP, 10, official_rounding=True), "scale is 10"),
        (lambda: grid_avg_pool(MAP, window=2), "window is 2"),
        (lambda: grid_avg_pool(MAP), "exactly one"),
        (lambda: grid_avg_pool(MAP, 9, 1), "exactly one"),
        (lambda: grid_avg_pool(MAP[:, :8], 4), "8 tokens are no square"),
        (lambda: grid_avg_pool(MAP, 1, grid=(2, 4)), r"grid is \(2, 4\)"),
        (lambda: grid_sample(3, 3, 10), "keep is 10"),
        (lambda: grid_sample(0, 3, 0), "grid is 0×3"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
