"""Properties of the selecting operators: attention, top-k, diversity, relevance, transition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import few, generator, normal, seeds
from reference import attention as slow_attention
from reference import diversity as slow_diversity
from torch import Tensor

from tokprune.operators import diversity, relevance, topk, transition
from tokprune.operators.attention import attention_rows, mean_rows


def assert_chosen(order: Tensor, n: int, k: int) -> None:
    assert order.shape[-1] == k
    assert order.dtype == torch.long
    assert ((order >= 0) & (order < n)).all()
    for row in order.reshape(-1, k).tolist():
        assert len(set(row)) == k


# ------------------------------------------------------------------------------ attention


@few
@given(seeds, st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.booleans())
def test_attention_rows_equal_dense_softmax(
    seed: int, heads: tuple[int, int], per_row: bool
) -> None:
    h, key_heads = heads
    q, k = normal(seed, 2, h, 3, 8), normal(seed + 1, 2, key_heads, 7, 8)
    allowed = torch.rand(2, 3 if per_row else 1, 7, generator=generator(seed)) < 0.6
    allowed[0, 0] = False
    got = attention_rows(q, k, 0.3, allowed)
    assert got.dtype == torch.float32
    keys = k.repeat_interleave(h // key_heads, dim=1)
    logits = torch.einsum("bhrd,bhld->bhrl", q, keys).double() * 0.3
    mask = allowed[:, None].expand_as(logits)
    weight = logits.exp() * mask
    total = weight.sum(-1, keepdim=True)
    want = torch.where(total > 0, weight / total, torch.zeros_like(weight))
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
    assert (got[0, :, 0] == 0).all()
    one = attention_rows(q[1:], k[1:], 0.3, allowed[1:])
    torch.testing.assert_close(one[0], got[1])


def test_attention_rows_scale_defaults_to_head_width() -> None:
    q, k = normal(0, 1, 2, 3, 16), normal(1, 1, 2, 5, 16)
    assert torch.equal(attention_rows(q, k), attention_rows(q, k, 0.25))


def test_mean_rows_counts_valid_rows_only() -> None:
    probs = torch.rand(2, 3, 4, 5, generator=generator(0))
    valid = torch.tensor([[True, False, True, False], [False] * 4])
    got = mean_rows(probs, valid)
    torch.testing.assert_close(got[0], probs[0, :, [0, 2]].mean((0, 1)))
    assert (got[1] == 0).all()
    assert (mean_rows(probs[:, :, :0]) == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_rows(torch.ones(1, 3, 2, 4), torch.ones(1, 2, 5, 4)), "3 query heads"),
        (lambda: attention_rows(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 5, 6)), "k has shape"),
        (
            lambda: attention_rows(
                torch.ones(1, 2, 2, 4), torch.ones(1, 2, 5, 4), allowed=torch.ones(1, 2, 5)
            ),
            "allowed has dtype",
        ),
        (lambda: mean_rows(torch.ones(1, 2, 3, 4), torch.ones(1, 4).bool()), "row_valid is"),
        (lambda: topk.keep_topk(torch.ones(4), 5), "k is 5"),
        (lambda: topk.keep_topk(torch.ones(4), -1), "k is -1"),
        (
            lambda: topk.segment_topk(torch.ones(1, 4), torch.zeros(1, 3).long(), torch.ones(1, 1)),
            "segment has shape",
        ),
        (
            lambda: topk.segment_topk(
                torch.ones(2, 4), torch.zeros(2, 4).long(), torch.ones(1, 1).long()
            ),
            "budget has shape",
        ),
        (lambda: diversity.divprune(torch.ones(4, 2), 0), "k is 0"),
        (lambda: diversity.divprune(torch.ones(4, 2), 5), "k is 5"),
        (lambda: diversity.divprune(torch.ones(4), 1), "x has shape"),
        (lambda: diversity.max_sum(torch.ones(4, 2), 0, torch.tensor(0)), "k is 0"),
        (lambda: diversity.max_sum(torch.ones(4, 2), 2, torch.tensor([0])), "pivot is"),
        (lambda: diversity.k_center(torch.ones(4, 2), 2, torch.tensor(0.0)), "pivot is"),
        (
            lambda: diversity.divprune(torch.ones(4, 2), 2, torch.ones(3).bool()),
            "candidates is",
        ),
        (lambda: diversity.cls_scores(torch.ones(4)), "attn_row has shape"),
        (lambda: diversity.random_pivot(0), "k is 1"),
        (
            lambda: relevance.ratio_from_rows(
                torch.ones(1, 1, 2, 4), torch.ones(1, 3).bool(), torch.ones(1, 4).bool()
            ),
            "row_valid has shape",
        ),
        (lambda: transition.transition_weight(torch.ones(2, 3), torch.ones(2, 4)), "after has"),
        (
            lambda: transition.transition_weight(
                torch.ones(2, 3), torch.ones(2, 3), normalize="image"
            ),
            "normalize='image' is unknown",
        ),
        (
            lambda: transition.transition_weight(
                torch.ones(2, 3), torch.ones(2, 3), direction="none"
            ),
            "direction='none' is unknown",
        ),
        (lambda: transition.transition_score([], None), "ttv is empty"),
        (lambda: transition.transition_score([], torch.ones(2), alpha=1.5), "alpha is 1.5"),
        (
            lambda: transition.image_share(torch.ones(1, 4), torch.zeros(1, 3).long()),
            r"segment has shape \(1, 3\) and value",
        ),
    ],
)
def test_errors_name_the_argument_and_its_value(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


# ------------------------------------------------------------------------------------ topk


@few
@given(seeds, st.integers(1, 12), st.data())
def test_keep_topk_prefers_lower_positions(seed: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    score = torch.randint(0, 3, (2, n), generator=generator(seed)).float()
    got = topk.keep_topk(score, k)
    for row, values in zip(got.tolist(), score.tolist()):
        best = sorted(range(n), key=lambda i, v=values: (-v[i], i))[:k]
        assert row == sorted(best)


@few
@given(seeds, st.integers(1, 20), st.integers(1, 4))
def test_segment_topk_equals_slow_loop(seed: int, length: int, segments: int) -> None:
    g = generator(seed)
    score = torch.randint(-2, 3, (3, length), generator=g).float()
    segment = torch.randint(-1, segments, (3, length), generator=g)
    budget = torch.randint(-1, 6, (3, segments), generator=g)
    want = slow_attention.segment_topk(score, segment, budget)
    assert torch.equal(topk.segment_topk(score, segment, budget), want)


# ------------------------------------------------------------------------------- diversity


@pytest.fixture(params=["dense", "streaming"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of making similarity rows."""
    if request.param == "streaming":
        monkeypatch.setattr(diversity, "DENSE_LIMIT", 0)
        monkeypatch.setattr(diversity, "_CHUNK", 5)
    return request.param


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["max_sum", "k_center"])
def test_greedy_equals_brute_force(path: str, name: str, seed: int) -> None:
    n, k = 17, 9
    x = normal(seed, 3, n, 6) + seed
    allowed = torch.rand(3, n, generator=generator(seed)) < 0.7
    allowed[:, :10] = True
    pivot = torch.randint(10, (3,), generator=generator(seed))
    operator, slow = getattr(diversity, name), getattr(slow_diversity, name)
    got = operator(x, k, pivot, allowed)
    assert_chosen(got, n, k)
    for b in range(3):
        assert torch.equal(got[b], slow(x[b].double(), int(pivot[b]), k, allowed[b]))
        assert torch.equal(operator(x[b], k, pivot[b], allowed[b]), got[b])
    # a candidate mask of all ones changes nothing
    everything = torch.ones(3, n, dtype=torch.bool)
    assert torch.equal(operator(x, n, pivot, everything), operator(x, n, pivot))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_mask", [False, True])
def test_divprune_is_k_center_from_the_most_isolated(path: str, seed: int, with_mask: bool) -> None:
    n, k = 15, 6
    x = normal(seed, 2, n, 5)
    allowed = None
    if with_mask:
        allowed = torch.ones(2, n, dtype=torch.bool)
        allowed[:, ::3] = False
    got = diversity.divprune(x, k, allowed)
    distance = slow_diversity.cosine_distance(x)
    for b in range(2):
        own = list(range(n)) if allowed is None else allowed[b].nonzero().view(-1).tolist()
        nearest = {i: min(float(distance[b, i, j]) for j in own if j != i) for i in own}
        assert got[b, 0] == max(own, key=nearest.__getitem__)
    assert torch.equal(got, diversity.k_center(x, k, got[:, 0], allowed))
    before = distance.clone()
    if not with_mask:
        assert torch.equal(got, diversity.k_center_from_distance(distance, k, got[:, 0]))
        assert torch.equal(before, distance), "the input was overwritten"


@few
@given(seeds, st.integers(2, 40), st.sampled_from(["max_sum", "k_center", "divprune"]), st.data())
def test_greedy_orders_nest_and_follow_the_batch(
    seed: int, n: int, name: str, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    x = normal(seed, 4, n, 12)
    pivot = torch.randint(n, (4,), generator=generator(seed))

    def run(x: Tensor, k: int, pivot: Tensor) -> Tensor:
        if name == "divprune":
            return diversity.divprune(x, k)
        return getattr(diversity, name)(x, k, pivot)

    full = run(x, n, pivot)
    assert_chosen(full, n, n)
    assert torch.equal(run(x, k, pivot), full[:, :k])
    shuffle = torch.randperm(4, generator=generator(seed))
    assert torch.equal(run(x[shuffle], k, pivot[shuffle]), full[shuffle, :k])
    square = run(x.unflatten(0, (2, 2)), k, pivot.unflatten(0, (2, 2)))
    assert torch.equal(square.flatten(0, 1), full[:, :k])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_the_float32_selection(dtype: torch.dtype) -> None:
    x = normal(3, 60, 64).to(dtype)
    pivot = diversity.farthest_pivot(x)
    assert torch.equal(pivot, diversity.farthest_pivot(x.float()))
    for operator in (diversity.max_sum, diversity.k_center):
        assert torch.equal(operator(x, 20, pivot), operator(x.float(), 20, pivot))
    assert torch.equal(diversity.divprune(x, 20), diversity.divprune(x.float(), 20))
    score = torch.randperm(60, generator=generator(0)).to(dtype)
    assert torch.equal(topk.keep_topk(score, 7), topk.keep_topk(score.float(), 7))


def test_duplicates_are_never_chosen_twice() -> None:
    x = normal(0, 20, 8).repeat(3, 1)
    order = diversity.divprune(x, 30)
    assert_chosen(order, 60, 30)
    assert set((order[:20] % 20).tolist()) == set(range(20))


def test_single_token() -> None:
    x = normal(0, 1, 4)
    zero = torch.tensor(0)
    for got in (
        diversity.divprune(x, 1),
        diversity.max_sum(x, 1, zero),
        diversity.k_center(x, 1, zero),
    ):
        assert got.tolist() == [0]


def test_k_center_covers_what_is_left() -> None:
    x = normal(5, 2, 12, 6)
    order = diversity.k_center(x, 5, torch.tensor([1, 2]))
    radius = slow_diversity.selection_radius(x, order)
    assert (radius[:, 0] == torch.inf).all()
    assert (radius[:, 1:].diff() <= 1e-6).all()
    # what is left is no farther away than the last chosen token was
    near = slow_diversity.min_distance(x, order)
    assert (near.amax(-1) <= radius[:, -1] + 1e-6).all()


def test_pivots() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.4], [0.9, 0.2, 0.3]])
    assert diversity.cls_pivot(scores).tolist() == [1, 0]
    only = torch.tensor([[False, False, True], [False, True, True]])
    assert diversity.cls_pivot(scores, only).tolist() == [2, 2]
    x = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [-9.0, -9.0]])
    most = torch.tensor([True, True, True, False])
    assert diversity.center_pivot(x, most) == 1
    assert diversity.farthest_pivot(x, most) == 2
    assert diversity.center_pivot(x) == 3
    row = torch.rand(2, 3, 5, generator=generator(0))
    torch.testing.assert_close(diversity.cls_scores(row), row[..., 1:].mean(-2))


def test_random_pivot_is_seeded_and_uniform() -> None:
    first = diversity.random_pivot(5, generator(1), (400,))
    assert torch.equal(first, diversity.random_pivot(5, generator(1), (400,)))
    assert first.bincount(minlength=5).min() > 40
    only = torch.tensor([False, True, False, True, False]).expand(400, 5)
    masked = diversity.random_pivot(5, generator(1), (400,), only)
    assert set(masked.tolist()) == {1, 3}


# ------------------------------------------------------------------------------- relevance


@few
@given(seeds, st.integers(1, 24))
def test_ratios_equal_those_of_the_full_map(seed: int, length: int) -> None:
    segment = torch.randint(1, 4, (4, length), generator=generator(seed))
    text, visual = segment == 3, segment == 2
    q, k = normal(seed, 4, 4, length, 8), normal(seed + 1, 4, 2, length, 8)
    causal = torch.ones(1, length, length, dtype=torch.bool).tril()
    rows = attention_rows(q, k, None, causal)
    for who, whom in ((text, visual), (visual, text)):
        got = relevance.ratio_from_rows(rows, who, whom)
        want = slow_attention.text_to_image_ratio(q, k, who, whom)
        torch.testing.assert_close(got, want, equal_nan=True, atol=1e-6, rtol=1e-5)
        # rows in parts, divided by what is known of their number
        parts = [
            relevance.ratio_from_rows(part, real, whom, count=torch.ones(4))
            for part, real in zip(rows.split(5, 2), who.split(5, 1))
        ]
        whole = sum(parts, torch.zeros(4)) / who.sum(1)
        torch.testing.assert_close(whole, got, equal_nan=True, atol=1e-6, rtol=1e-5)


def test_samples_without_text_or_image_never_drop() -> None:
    nan = torch.nan
    tv, vt = torch.tensor([nan, 0.0, 0.0, 0.2]), torch.tensor([0.0, nan, 0.0, 0.0])
    assert relevance.should_drop(tv, vt, 0.1).tolist() == [False, False, True, False]


# ------------------------------------------------------------------------------ transition


def test_transition_weight_by_definition() -> None:
    before, after = normal(0, 2, 5, 6), normal(1, 2, 5, 6)
    before[0, 1] = 0
    after[0, 2] = 0
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, :2] = False
    got = transition.transition_weight(before, after, valid)
    assert got[0, 1] == 0
    assert got[0, 2] == 0
    assert (got[1, :2] == 0).all()
    alone = transition.transition_weight(before[1:, 2:], after[1:, 2:])
    torch.testing.assert_close(got[1, 2:], alone[0])
    whole = slow_attention.transition_weight(before[:1], after[:1]).nan_to_num(posinf=0)
    torch.testing.assert_close(got[:1], whole)
    torch.testing.assert_close(
        got[1:, 2:], slow_attention.transition_weight(before[1:, 2:], after[1:, 2:])
    )
    e = torch.exp(1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)) * valid
    batch = transition.transition_weight(before, after, valid, normalize="batch")
    torch.testing.assert_close(batch, got * (e.sum(1, keepdim=True) / e.sum()))


def test_transition_direction() -> None:
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    after = torch.tensor([[[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    signed = transition.transition_weight(before, after)[0]
    assert signed[0] > signed[1] > signed[2]
    unsigned = transition.transition_weight(before, after, direction="abs")[0]
    assert unsigned[1] > unsigned[0]
    assert unsigned[0] == unsigned[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_transition_weight_sums_in_float32(dtype: torch.dtype) -> None:
    before, after = (normal(s, 1, 3, 4096).mul(300).to(dtype) for s in (0, 1))
    got = transition.transition_weight(before, after)
    assert torch.equal(got, transition.transition_weight(before.float(), after.float()))
    assert got.isfinite().all()


def test_shares_are_per_image() -> None:
    value = torch.tensor([[1.0, 2.0, 5.0, 3.0, 4.0]])
    segment = torch.tensor([[0, 0, -1, 1, 1]])
    got = transition.image_share(value, segment, 2)
    torch.testing.assert_close(got, torch.tensor([[1 / 3, 2 / 3, 0, 3 / 7, 4 / 7]]))
    for s, place in ((0, slice(0, 2)), (1, slice(3, 5))):
        alone = transition.image_share(value[:, place])
        torch.testing.assert_close(got[:, place], alone, msg=f"image {s}")


def test_transition_score_parts() -> None:
    lists = [torch.rand(2, 4, generator=generator(i)) for i in range(3)]
    iga = torch.rand(2, 4, generator=generator(9))
    share = transition.image_share(lists[0] + lists[1] + lists[2])
    torch.testing.assert_close(
        transition.transition_score(lists, iga, 0.3), 0.3 * share + 0.7 * iga
    )
    torch.testing.assert_close(transition.transition_score(lists, None, 1.0), share)
    torch.testing.assert_close(transition.transition_score([], iga), 0.5 * iga)
    assert transition.transition_score([torch.ones(1, 0)], torch.ones(1, 0)).shape == (1, 0)
    text_only = transition.transition_score(lists, iga, 0.5, torch.full((2, 4), -1))
    assert (text_only == 0).all()


def test_instruction_attention_of_one_image_and_without_text() -> None:
    q, k = normal(0, 3, 4, 9, 8), normal(1, 3, 2, 9, 8)
    segment = torch.full((3, 9), -1)
    segment[:, 3:7] = 0
    causal = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    rows = attention_rows(q, k, None, causal)[:, :, 7:]
    got = transition.instruction_rows(rows, None, segment)
    torch.testing.assert_close(got[:, 3:7], slow_attention.instruction_attention(q, k, 3, 4))
    assert (got[segment < 0] == 0).all()
    assert (transition.instruction_rows(rows[:, :, :0], None, segment) == 0).all()


# --------------------------------------------------------------------------------- no sync


def test_no_operator_reads_the_device() -> None:
    """Meta tensors hold no data, so any read of values on the host raises."""
    meta = torch.device("meta")
    x = torch.empty(2, 30, 8, device=meta, dtype=torch.float16)
    index = torch.empty(2, dtype=torch.long, device=meta)
    mask = torch.empty(2, 30, dtype=torch.bool, device=meta)
    segment = torch.empty(2, 30, dtype=torch.long, device=meta)
    for order in (
        diversity.max_sum(x, 5, index, mask),
        diversity.k_center(x, 5, index, mask),
        diversity.divprune(x, 5, mask),
    ):
        assert order.shape == (2, 5)
    score = torch.empty(2, 30, device=meta)
    assert topk.keep_topk(score, 4).shape == (2, 4)
    budget = torch.empty(2, 3, dtype=torch.long, device=meta)
    assert topk.segment_topk(score, segment, budget).shape == (2, 30)
    q = torch.empty(2, 4, 30, 8, device=meta)
    k = torch.empty(2, 2, 30, 8, device=meta)
    rows = attention_rows(q, k, None, mask[:, None])
    alpha = relevance.ratio_from_rows(rows, mask, mask)
    assert relevance.should_drop(alpha, alpha, 0.1).shape == (2,)
    assert transition.transition_weight(x, x, mask).shape == (2, 30)
    probs = torch.empty(2, 4, 6, 30, device=meta)
    iga = transition.instruction_rows(probs, mask[:, :6], segment, 3)
    assert transition.transition_score([score], iga, 0.5, segment, 3).shape == (2, 30)
