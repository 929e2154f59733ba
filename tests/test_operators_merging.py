"""Properties that every matching and merge plan must have."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import merging as slow
from torch import Tensor

from tokprune.operators.bipartite import bipartite_soft_matching, parse_r, removed_by_ratio
from tokprune.operators.energy import energy, energy_bsm, pitome
from tokprune.operators.merging import MergePlan, proportional_bias

# name -> (metric, r) -> plan; every one of them covers all tokens at the sizes drawn below
MATCHINGS = {
    "bsm": lambda m, r: bipartite_soft_matching(m, r),
    "bsm_cls": lambda m, r: bipartite_soft_matching(m, r, class_token=True),
    "bsm_distill": lambda m, r: bipartite_soft_matching(m, r, True, True),
    "kth": lambda m, r: slow.kth_bipartite(m[:, : m.shape[1] // 3 * 3], 3),
    "protect": lambda m, r: pitome(m, r=r, margin=0.4, kind="gauss"),
    "protect_cls": lambda m, r: pitome(m, r=r, margin=0.4, class_token=True),
    "protect_halves": lambda m, r: pitome(m, r=r, margin=0.4, kind="paper", split="halves"),
    "energy_bsm": lambda m, r: energy_bsm(m, r=r, margin=0.4),
    "energy_bsm_cls": lambda m, r: energy_bsm(m, r=r, margin=0.4, class_token=True),
}
every_matching = pytest.mark.parametrize("name", MATCHINGS)
quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31 - 1)
lengths = st.integers(9, 30)
batches = st.integers(1, 3)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(name: str, metric: Tensor, r: int = 3) -> MergePlan:
    plan = MATCHINGS[name](metric, r)
    assert plan is not None
    return plan


@quick
@given(seed=seeds, length=lengths, class_token=st.booleans())
def test_matching_equals_the_plain_one(seed: int, length: int, class_token: bool) -> None:
    metric = draw(seed, 2, length, 5)
    plan = bipartite_soft_matching(metric, 3, class_token)
    assert plan is not None
    for got, want in zip(
        (plan.keep, plan.src, plan.dst, plan.slot), slow.bsm(metric, 3, class_token)
    ):
        assert torch.equal(got, want)


@every_matching
@quick
@given(seed=seeds, batch=batches, length=lengths)
def test_every_token_has_one_place(name: str, seed: int, batch: int, length: int) -> None:
    plan = make(name, draw(seed, batch, length, 5))
    lists = torch.cat([plan.keep, plan.src, plan.dst], dim=1).sort(-1).values
    assert torch.equal(lists, torch.arange(plan.tokens).expand(batch, -1))
    assert plan.kept == plan.tokens - plan.src.shape[1]
    if name != "kth":
        assert plan.src.shape[1] == 3
    assert (plan.slot >= 0).all()
    assert (plan.slot < plan.dst.shape[1]).all()


@every_matching
@quick
@given(seed=seeds, batch=batches, length=lengths)
def test_mass_is_conserved(name: str, seed: int, batch: int, length: int) -> None:
    plan = make(name, draw(seed, batch, length, 5))
    x = draw(seed + 1, batch, plan.tokens, 4)
    size = draw(seed + 2, batch, plan.tokens, 1).exp()
    merged, total = plan.weighted(x, size)
    torch.testing.assert_close(total.sum(1), size.sum(1))
    torch.testing.assert_close((merged * total).sum(1), (x * size).sum(1))
    torch.testing.assert_close(plan.apply(x, "sum").sum(1), x.sum(1))
    assert (plan.counts().sum(1) == plan.tokens).all()
    assert torch.equal(plan.weighted(x)[1][..., 0], plan.counts().float())


@every_matching
@quick
@given(seed=seeds, value=st.floats(-100, 100))
def test_constant_field_stays_constant(name: str, seed: int, value: float) -> None:
    plan = make(name, draw(seed, 2, 17, 5))
    x = torch.full((2, plan.tokens, 3), value, dtype=torch.float64)
    size = draw(seed + 1, 2, plan.tokens, 1).exp()
    want = torch.full((2, plan.kept, 3), value, dtype=torch.float64)
    for got in (
        plan.apply(x, "mean"),
        plan.apply(x, "amax"),
        plan.apply(x, "prune"),
        plan.weighted(x, size)[0],
    ):
        torch.testing.assert_close(got, want)


@every_matching
@quick
@given(seed=seeds, length=lengths)
def test_batch_equals_singles_and_permutes(name: str, seed: int, length: int) -> None:
    metric = draw(seed, 3, length, 5)
    plan = make(name, metric)
    singles = [make(name, metric[b : b + 1]) for b in range(3)]
    turned = make(name, metric[[2, 0, 1]])
    x = draw(seed + 1, 3, plan.tokens, 4)
    for field in ("keep", "src", "dst", "slot"):
        together = getattr(plan, field)
        assert torch.equal(together, torch.cat([getattr(s, field) for s in singles]))
        assert torch.equal(together[[2, 0, 1]], getattr(turned, field))
    torch.testing.assert_close(plan.apply(x)[[2, 0, 1]], turned.apply(x[[2, 0, 1]]))


@every_matching
@quick
@given(seed=seeds, length=lengths)
def test_group_and_representatives_fit_apply(name: str, seed: int, length: int) -> None:
    plan = make(name, draw(seed, 2, length, 5))
    group, stands = plan.group(), plan.representatives()
    member = F.one_hot(group, plan.kept).double().mT
    eye = torch.eye(plan.tokens, dtype=torch.float64).expand(2, -1, -1)
    assert torch.equal(plan.apply(eye, "amax"), member)
    assert torch.equal(plan.apply(eye, "sum"), member)
    ids = torch.arange(plan.tokens, dtype=torch.float64)[None, :, None].expand(2, -1, -1)
    assert torch.equal(plan.apply(ids, "prune")[..., 0], stands.double())
    assert torch.equal(group.gather(1, stands), torch.arange(plan.kept).expand(2, -1))
    assert torch.equal(member.sum(-1).long(), plan.counts())


@every_matching
@quick
@given(seed=seeds, length=lengths)
def test_unmerge_inverts_apply_on_piecewise_constant_fields(
    name: str, seed: int, length: int
) -> None:
    plan = make(name, draw(seed, 2, length, 5))
    rows = draw(seed + 1, 2, plan.kept, 4)
    field = plan.unmerge(rows)
    torch.testing.assert_close(plan.apply(field, "mean"), rows)
    torch.testing.assert_close(plan.unmerge(plan.apply(field, "mean")), field)
    assert torch.equal(plan.apply(field, "amax"), rows)


@every_matching
@quick
@given(seed=seeds, length=lengths)
def test_apply_equals_a_slow_loop(name: str, seed: int, length: int) -> None:
    plan = make(name, draw(seed, 2, length, 5))
    x, size = draw(seed + 1, 2, plan.tokens, 3), draw(seed + 2, 2, plan.tokens, 1).exp()
    before = x.clone(), size.clone()
    merged, total = plan.weighted(x, size)
    mean, top = plan.apply(x, "mean"), plan.apply(x, "amax")
    for b in range(2):
        rows = [*plan.keep[b].tolist(), *plan.dst[b].tolist()]
        if plan.distill:
            k = plan.keep.shape[1]
            rows = [rows[0], rows[k], *rows[1:k], *rows[k + 1 :]]
        target = {s: plan.dst[b, m].item() for s, m in zip(plan.src[b].tolist(), plan.slot[b])}
        for i, row in enumerate(rows):
            members = [row] + [s for s, d in target.items() if d == row]
            mass = sum(size[b, t] for t in members)
            torch.testing.assert_close(total[b, i], mass)
            torch.testing.assert_close(
                merged[b, i], sum(x[b, t] * size[b, t] for t in members) / mass
            )
            torch.testing.assert_close(mean[b, i], x[b, members].mean(0))
            assert torch.equal(top[b, i], x[b, members].amax(0))
    assert torch.equal(x, before[0])
    assert torch.equal(size, before[1])


def test_half_precision_is_averaged_in_float32() -> None:
    """1001 values of 1000 add up to more than half precision can hold; their mean does not."""
    count = 1000
    plan = MergePlan(
        keep=torch.empty(1, 0, dtype=torch.long),
        src=torch.arange(1, count + 1)[None],
        dst=torch.zeros(1, 1, dtype=torch.long),
        slot=torch.zeros(1, count, dtype=torch.long),
        tokens=count + 1,
    )
    x = torch.full((1, count + 1, 2), 1000, dtype=torch.float16)
    size = torch.full((1, count + 1, 1), 2, dtype=torch.float16)
    assert torch.equal(plan.apply(x, "mean"), x[:, :1])
    merged, total = plan.weighted(x, size)
    assert torch.equal(merged, x[:, :1])
    assert total.dtype == torch.float32
    assert total.item() == 2 * (count + 1)


def test_distill_order_holds_for_sources_of_the_leading_destination() -> None:
    plan = MergePlan(
        keep=torch.tensor([[0, 4]]),
        src=torch.tensor([[2, 5]]),
        dst=torch.tensor([[1, 3]]),
        slot=torch.tensor([[0, 1]]),
        tokens=6,
        distill=True,
    )
    assert plan.representatives().tolist() == [[0, 1, 4, 3]]
    assert plan.group().tolist() == [[0, 1, 1, 3, 2, 3]]
    x = torch.arange(6.0)[None, :, None]
    assert plan.apply(x, "sum").flatten().tolist() == [0, 3, 4, 8]
    assert plan.unmerge(plan.apply(x, "amax")).flatten().tolist() == [0, 2, 2, 5, 4, 5]


@pytest.mark.parametrize("inputs", [("x",), ("size",), ("x", "size")])
def test_weighted_has_right_gradients(inputs: tuple[str, ...]) -> None:
    plan = make("bsm", draw(0, 1, 9, 4))
    tensors = {"x": draw(1, 1, 9, 2), "size": draw(2, 1, 9, 1).exp()}
    for name in inputs:
        tensors[name].requires_grad_()
    assert torch.autograd.gradcheck(plan.weighted, (tensors["x"], tensors["size"]))


def test_distillation_token_unmerges_to_itself() -> None:
    plan = make("bsm_distill", draw(3, 2, 20, 5))
    x = draw(4, 2, 20, 6)
    merged = plan.apply(x)
    assert torch.equal(merged[:, :2], x[:, :2])
    assert torch.equal(plan.unmerge(merged)[:, :2], x[:, :2])


def test_class_token_is_never_merged() -> None:
    for name in ("bsm_cls", "protect_cls", "energy_bsm_cls"):
        for seed in range(10):
            plan = make(name, draw(seed, 2, 16, 4))
            assert (plan.keep[:, 0] == 0).all()
            assert (plan.counts()[:, 0] == 1).all()


def test_protected_tokens_are_those_of_least_energy() -> None:
    metric = draw(5, 2, 24, 6)
    plan = make("protect", metric, r=4)
    scores = energy(metric, 0.4, "gauss")
    pool = torch.cat([plan.src, plan.dst], dim=1)
    assert (scores.gather(1, pool).amin(1) >= scores.gather(1, plan.keep).amax(1)).all()


def test_splits_of_the_energy_order() -> None:
    metric = draw(6, 1, 20, 6)
    order = energy(metric, 0.4).argsort(dim=-1, descending=True)
    alternate = pitome(metric, r=4, margin=0.4)
    halves = pitome(metric, r=4, margin=0.4, split="halves")
    assert alternate is not None
    assert halves is not None
    assert torch.equal(alternate.src, order[:, [0, 2, 4, 6]])
    assert torch.equal(alternate.dst, order[:, [1, 3, 5, 7]])
    assert torch.equal(halves.src, order[:, :4])
    assert torch.equal(halves.dst, order[:, 4:8])


def test_dropped_tokens_stay_dropped() -> None:
    plan = slow.kth_bipartite(draw(0, 2, 14, 4), 4)
    group = plan.group()
    assert (group[:, 12:] == -1).all()
    assert (group[:, :12] >= 0).all()
    assert (plan.unmerge(plan.apply(draw(1, 2, 14, 3)))[:, 12:] == 0).all()


@pytest.mark.parametrize("kind", ["elu", "gauss", "gauss_text", "paper", "elu_sharp"])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@quick
@given(seed=seeds, margin=st.floats(-0.5, 0.9), block=st.integers(1, 40))
def test_streamed_energy_equals_dense(
    kind: str, alpha: float, seed: int, margin: float, block: int
) -> None:
    metric = draw(seed, 2, 23, 6)
    before = metric.clone()
    got = energy(metric, margin, kind, alpha, block)
    torch.testing.assert_close(got, slow.energy(metric, margin, kind, alpha))
    assert torch.equal(metric, before)


def test_half_precision_metric_is_scored_in_float32() -> None:
    metric = draw(0, 1, 40, 8, dtype=torch.float16)
    got = energy(metric, 0.4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, energy(metric.float(), 0.4))
    half, full = (pitome(m, 0.8, margin=0.4) for m in (metric, metric.float()))
    assert half is not None
    assert full is not None
    assert torch.equal(half.src, full.src)


@quick
@given(seed=seeds, sizes=st.lists(st.integers(1, 4), min_size=2, max_size=8))
def test_proportional_attention_equals_duplicated_keys(seed: int, sizes: list[int]) -> None:
    count = torch.tensor(sizes)
    length = len(sizes)
    q, k, v = (draw(seed + i, 2, 3, length, 4, dtype=torch.float32) for i in range(3))
    bias = proportional_bias(count.float().expand(2, -1))
    assert torch.equal(bias, proportional_bias(count[None, :, None].expand(2, -1, 1)))
    got = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    k, v = (t.repeat_interleave(count, dim=2) for t in (k, v))
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_parse_r() -> None:
    assert parse_r(3, 5) == [5, 5, 5]
    assert parse_r(3, [1, 2]) == [1, 2, 0]
    assert parse_r(2, [1, 2, 3]) == [1, 2, 3]
    assert parse_r(5, (4, -1)) == [8, 6, 4, 2, 0]
    assert parse_r(5, (4, 1)) == [0, 2, 4, 6, 8]
    assert parse_r(1, (4, -1)) == [4]


def test_published_token_counts_of_llava() -> None:
    """577 tokens at ratio 0.9 through eleven merges: 183 patches and the class token."""
    counts, tokens = [], 577
    for merge in range(11):
        # the class token counts in bipartite matching (layers up to 12), not in `protect`
        tokens -= removed_by_ratio(tokens if merge < 6 else tokens - 1, 0.9)
        counts.append(tokens)
    assert counts == [520, 468, 422, 380, 342, 308, 278, 251, 226, 204, 184]


def test_nothing_to_merge_is_none() -> None:
    metric = draw(0, 1, 9, 4)
    assert bipartite_soft_matching(metric, 0) is None
    assert bipartite_soft_matching(metric[:, :2], 1, class_token=True) is None
    assert pitome(metric, 0.9, margin=0.5) is None
    assert energy_bsm(metric, 1.2, margin=0.5) is None
    assert removed_by_ratio(577, 2.0) == 0


def plan_of_nine() -> MergePlan:
    return make("bsm", draw(0, 1, 9, 4))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: bipartite_soft_matching(m[0], 1), r"metric has shape \(8, 4\)"),
        (lambda m: removed_by_ratio(8, 0.0), "ratio=0.0 must be positive"),
        (lambda m: removed_by_ratio(8, math.nan), "ratio=nan must be positive"),
        (lambda m: parse_r(0, 8), "layers=0"),
        (lambda m: parse_r(3, (1, 2, 3)), r"\(r, inflect\)"),
        (lambda m: pitome(m, 0.4, margin=0.5), r"ratio=0.4 removes 4 of 7"),
        (lambda m: pitome(m, r=4, margin=0.5), r"r=4 removes 4 of 7"),
        (lambda m: pitome(m, margin=0.5), "give one of ratio and r"),
        (lambda m: pitome(m, 0.9, r=1, margin=0.5), "give one of ratio and r"),
        (lambda m: pitome(m, 0.8, margin=0.5, split="thirds"), "split='thirds'"),
        (lambda m: energy_bsm(m, 0.2, margin=0.5), "ratio=0.2 removes 5 of 7"),
        (lambda m: energy(m, 0.5, "relu"), "kind='relu'"),
        (lambda m: energy(m, 1.0, "gauss"), "margin=1.0 must be below 1"),
        (lambda m: energy(m, 0.5, block=0), "block=0"),
        (lambda m: plan_of_nine().apply(m), r"x has shape \(1, 8, 4\).*\[1, 9, C\]"),
        (lambda m: plan_of_nine().apply(draw(0, 1, 9, 4), "median"), "mode='median'"),
        (lambda m: plan_of_nine().weighted(draw(0, 1, 9, 4), m), "size has shape"),
        (lambda m: plan_of_nine().weighted(*[draw(0, 1, 9, 4)] * 2), r"must be \[B, T, 1\]"),
        (lambda m: plan_of_nine().unmerge(m), r"y has shape .*\[1, 6, C\]"),
        (lambda m: proportional_bias(m), "size has shape"),
    ],
)
def test_errors_name_the_argument(call, says: str) -> None:
    metric = draw(0, 1, 8, 4)
    if "of 7" in says:
        metric = metric[:, 1:]
    with pytest.raises(ValueError, match=says):
        call(metric)
