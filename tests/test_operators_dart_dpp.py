"""Properties of CDPruner's and DART's operators: greedy MAP, relevance, pivots and their shares."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import few, generator, normal, seeds
from torch import Tensor

from tokprune.operators import cdpruner, dart, dpp

# ------------------------------------------------------------------------------- greedy MAP


def brute_map(kernel: Tensor, k: int, allowed: list[int]) -> list[int]:
    """Each step adds the token of the largest determinant, computed afresh in float64."""
    order: list[int] = []
    for _ in range(k):
        rest = [i for i in allowed if i not in order]

        def det(i: int, order: list[int] = order) -> float:
            at = torch.tensor([*order, i])
            return float(torch.linalg.det(kernel.double()[at][:, at]))

        order.append(max(rest, key=det))
    return order


@few
@given(seeds, st.integers(2, 12), st.data())
def test_map_equals_brute_force_determinants(seed: int, n: int, data: st.DataObject) -> None:
    x = normal(seed, n, 16)
    relevance = torch.rand(n, generator=generator(seed)) * 0.9 + 0.1
    allowed = torch.rand(n, generator=generator(seed + 1)) < 0.8
    allowed[0] = True
    k = data.draw(st.integers(1, int(allowed.sum())))
    kernel = dpp.conditional_kernel(x, relevance)
    want = brute_map(kernel, k, allowed.nonzero().view(-1).tolist())
    assert dpp.dpp_map(x, k, relevance, allowed).tolist() == want
    assert dpp.dpp_map_from_kernel(kernel, k, allowed).tolist() == want


@few
@given(seeds, st.integers(2, 30))
def test_map_nests_and_rows_of_a_batch_are_alone(seed: int, n: int) -> None:
    x, relevance = normal(seed, 2, 3, n, 40), torch.rand(2, 3, n, generator=generator(seed)) + 0.1
    whole = dpp.dpp_map(x, n, relevance)
    assert whole.shape == (2, 3, n)
    assert whole.sort(-1).values.tolist() == torch.arange(n).expand(2, 3, n).tolist()
    for k in (1, n // 2 + 1):
        assert torch.equal(dpp.dpp_map(x, k, relevance), whole[..., :k])
    assert torch.equal(dpp.dpp_map(x[1, 2], n, relevance[1, 2]), whole[1, 2])


@few
@given(seeds, st.integers(1, 4), st.integers(1, 5))
def test_map_of_a_small_rank_goes_on_without_repeating(seed: int, rank: int, copies: int) -> None:
    """More tokens asked for than the kernel's rank: gains are noise, picks stay distinct."""
    x = normal(seed, rank, 8).repeat(copies, 1)
    x = torch.cat([x, torch.zeros(1, 8)])
    order = dpp.dpp_map(x, len(x)).tolist()
    assert sorted(order) == list(range(len(x)))
    # one of each kind first: repeats have no gain left
    assert {i % rank for i in order[:rank] if i < rank * copies} == set(range(rank))


def test_map_takes_the_most_relevant_token_first_and_repels() -> None:
    x = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0]])
    relevance = torch.tensor([0.9, 1.0, 0.3])
    assert dpp.dpp_map(x, 3, relevance).tolist() == [1, 2, 0]
    assert dpp.dpp_map(x, 3).tolist() == [0, 2, 1]  # equal gains: the lower index


def test_rows_made_one_by_one_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, relevance = normal(0, 3, 25, 32), torch.rand(3, 25, generator=generator(0))
    allowed = torch.rand(3, 25, generator=generator(1)) < 0.9
    want = dpp.dpp_map(x, 12, relevance, allowed), dpp.dpp_map(x[0], 12)
    monkeypatch.setattr(dpp, "DENSE_LIMIT", 10)
    assert torch.equal(dpp.dpp_map(x, 12, relevance, allowed), want[0])
    assert torch.equal(dpp.dpp_map(x[0], 12), want[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_map_computes_in_float32(dtype: torch.dtype) -> None:
    x, relevance = normal(3, 40, 64).to(dtype), torch.rand(40, generator=generator(3)).to(dtype)
    got = dpp.dpp_map(x, 30, relevance)
    assert torch.equal(got, dpp.dpp_map(x.float(), 30, relevance.float()))


# ------------------------------------------------------------------------------- relevance


@few
@given(seeds, st.integers(1, 4))
def test_similarity_is_the_mean_of_cosines(seed: int, parts: int) -> None:
    image, text = normal(seed, 2, 5, 6), normal(seed + 1, parts, 6)
    got = cdpruner.text_similarity(image, text)
    pairs = torch.nn.functional.cosine_similarity(image[:, :, None], text, dim=-1)
    torch.testing.assert_close(got, pairs.mean(-1))
    own = cdpruner.text_similarity(image, torch.stack([text, -text]))
    torch.testing.assert_close(own[0], got[0])
    torch.testing.assert_close(own[1], -got[1])


def test_similarity_to_no_text_is_zero() -> None:
    assert (cdpruner.text_similarity(normal(0, 4, 6), torch.zeros(0, 6)) == 0).all()


@few
@given(seeds, st.integers(2, 20))
def test_relevance_is_stretched_over_counted_tokens(seed: int, n: int) -> None:
    score = normal(seed, 3, n)
    counted = torch.rand(3, n, generator=generator(seed)) < 0.7
    counted[:, 0], counted[:, 1] = True, True
    r = cdpruner.minmax_relevance(score, counted)
    for row in range(3):
        own, want = r[row][counted[row]], score[row][counted[row]]
        assert float(own.min()) > 0
        assert float(own.max()) <= 1 + 1e-6 / float(want.max() - want.min()) + 1e-6
        assert own.argsort().tolist() == want.argsort().tolist()
        torch.testing.assert_close(own, cdpruner.minmax_relevance(want))
    assert (r >= 0).all()
    bent = cdpruner.minmax_relevance(score, counted, theta=0.6)
    torch.testing.assert_close(bent, torch.exp(0.75 * r))


def test_equal_scores_are_all_relevant() -> None:
    """The official code divides by the range, 0 here."""
    assert cdpruner.minmax_relevance(torch.full((2, 5), 0.3)).tolist() == [[1.0] * 5] * 2


# ------------------------------------------------------------------------------- DART


def slow_dart(
    norms: Tensor, hidden: Tensor, image: list[int], text: list[int], keep: int,
    v: int, t: int, official: bool, gap: int = 0, centre: bool = False,
) -> set[int]:  # fmt: skip
    """One image, by loops."""
    keep = min(keep, len(image))
    strongest = lambda rows: sorted(rows, key=lambda i: (-float(norms[i]), i))  # noqa: E731
    own = strongest(image)[: min(v, keep)]
    pivots = own + strongest(text)[:t]
    if official:
        pivots = [i + gap for i in set([i - gap for i in pivots])]  # noqa: C403 (a list, as there)
    free, kept = [i for i in image if i not in own], set(own)
    x = hidden.double()
    x = x - x[image].mean(0) if centre else x
    unit = torch.nn.functional.normalize(x, dim=-1)
    each, rest = divmod(keep - len(own), len(pivots)) if pivots else (0, 0)
    for turn, pivot in enumerate(pivots):
        free.sort(key=lambda i: (float(unit[i] @ unit[pivot]), i))
        n = each + (turn < rest)
        kept |= set(free[:n])
        free = sorted(free[n:])
    return kept


@few
@given(seeds, st.integers(1, 5), st.integers(0, 5), st.booleans(), st.booleans(), st.data())
def test_dart_equals_slow_loop(
    seed: int, v: int, t: int, official: bool, centre: bool, data: st.DataObject
) -> None:
    """Two samples of up to two images, padded on the left, every budget."""
    length = 48
    norms = torch.rand(2, length, generator=generator(seed))
    hidden = normal(seed, 2, length, 12) + 1
    spans = [[(4, 20), (24, 40)], [(13, 31)]]
    gaps = [0, data.draw(st.integers(0, 8))]
    image = torch.zeros(2, 2, length, dtype=torch.bool)
    text = torch.zeros_like(image)
    keep = torch.zeros(2, 2, dtype=torch.long)
    for b, row in enumerate(spans):
        visual = {i for start, end in row for i in range(start, end)}
        for s, (start, end) in enumerate(row):
            image[b, s, start:end] = True
            after = [i for i in range(end, length) if i not in visual]
            text[b, s, after] = True
            keep[b, s] = data.draw(st.integers(1, end - start))
    place = torch.stack([torch.arange(length) - gap for gap in gaps])
    order = "official" if official else "norm"
    got = dart.dart(norms, hidden, image, text, keep, v, t, order, place, centre)
    for b, row in enumerate(spans):
        for s in range(len(row)):
            tokens = [m[b, s].nonzero().view(-1).tolist() for m in (image, text)]
            want = slow_dart(
                norms[b], hidden[b], *tokens, int(keep[b, s]), v, t, official, gaps[b], centre
            )  # fmt: skip
            assert set(got.mask[b, s].nonzero().view(-1).tolist()) == want
            assert len(want) == int(keep[b, s])
    assert not got.mask[1, 1].any()
    assert (got.image_pivots[1, 1] == -1).all()


def test_pivots_are_not_there_where_there_is_no_text() -> None:
    norms, hidden = torch.arange(10.0)[None], normal(0, 1, 10, 4)
    image = torch.ones(1, 1, 10, dtype=torch.bool)
    text = torch.zeros_like(image)
    got = dart.dart(norms, hidden, image, text, torch.tensor([[6]]), 2, 3)
    assert got.image_pivots.tolist() == [[[9, 8]]]
    assert got.text_pivots.tolist() == [[[-1, -1, -1]]]
    assert got.order.tolist() == [[[9, 8, -1, -1, -1]]]
    assert int(got.mask.sum()) == 6


def test_official_order_is_that_of_a_python_set() -> None:
    """Order of the places modulo 32 (the set's table), image pivots not first."""
    norms = torch.zeros(1, 100)
    for i, at in enumerate([60, 67, 36, 39, 80, 83, 87, 74]):
        norms[0, at] = 8 - i
    image = (torch.arange(100) < 70)[None, None]
    got = dart.dart(
        norms, normal(0, 1, 100, 4), image, ~image, torch.tensor([[12]]), 4, 4, "official"
    )
    assert got.order.tolist() == [[list(set([60, 67, 36, 39, 80, 83, 87, 74]))]]  # noqa: C405


def test_key_norms_sum_in_float32() -> None:
    keys = torch.full((1, 2, 3, 4096), 30.0, dtype=torch.float16)  # 245760: more than fp16 holds
    assert dart.key_norms(keys).tolist() == [[2 * 4096 * 30.0] * 3]


# ------------------------------------------------------------------------------- errors, meta


def call_dart(**changes: object) -> Callable[[], object]:
    options: dict[str, object] = {
        "norms": torch.ones(1, 4),
        "hidden": torch.ones(1, 4, 2),
        "image": torch.ones(1, 1, 4, dtype=torch.bool),
        "text": torch.zeros(1, 1, 4, dtype=torch.bool),
        "keep": torch.ones(1, 1, dtype=torch.long),
        **changes,
    }
    return lambda: dart.dart(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dpp.dpp_map(torch.ones(4, 2), 0), "k is 0"),
        (lambda: dpp.dpp_map(torch.ones(4, 2), 5), "k is 5"),
        (lambda: dpp.dpp_map(torch.ones(4), 1), "x has shape"),
        (lambda: dpp.dpp_map(torch.ones(4, 2), 1, torch.ones(3)), "relevance has shape"),
        (lambda: dpp.dpp_map(torch.ones(4, 2), 1, None, torch.ones(4)), "candidates is"),
        (lambda: dpp.dpp_map_from_kernel(torch.ones(3, 4), 1), "kernel has shape"),
        (lambda: cdpruner.text_similarity(torch.ones(3, 4), torch.ones(2, 5)), "image has width 4"),
        (lambda: cdpruner.minmax_relevance(torch.ones(3), theta=1.0), "theta is 1.0"),
        (lambda: cdpruner.minmax_relevance(torch.ones(3), torch.ones(3)), "counted is"),
        (call_dart(image_pivots=0), "image_pivots is 0"),
        (call_dart(text_pivots=-1), "text_pivots -1"),
        (call_dart(hidden=torch.ones(1, 5, 2)), "norms has shape"),
        (call_dart(image=torch.ones(1, 4, dtype=torch.bool)), "image is"),
        (call_dart(text=torch.ones(1, 1, 4)), "text is torch.float32"),
        (call_dart(keep=torch.ones(1, 2, dtype=torch.long)), "image is torch.bool"),
        (call_dart(keep=torch.ones(2, 1, dtype=torch.long)), "keep has shape"),
    ],
)
def test_errors_name_the_argument_and_its_value(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_operator_reads_the_device() -> None:
    """Meta tensors hold no data, so any read of values on the host raises."""
    meta = torch.device("meta")
    x = torch.empty(2, 30, 8, device=meta, dtype=torch.float16)
    score, mask = torch.empty(2, 30, device=meta), torch.empty(2, 30, dtype=torch.bool, device=meta)
    relevance = cdpruner.minmax_relevance(cdpruner.text_similarity(x, x[:, :3]), mask)
    assert dpp.dpp_map(x, 7, relevance, mask).shape == (2, 7)
    keep = torch.empty(2, 1, dtype=torch.long, device=meta)
    got = dart.dart(score, x, mask[:, None], mask[:, None], keep)
    assert got.mask.shape == (2, 1, 30)
    with pytest.raises((RuntimeError, NotImplementedError)):
        dart.dart(score, x, mask[:, None], mask[:, None], keep, pivot_order="official")
