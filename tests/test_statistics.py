"""Intervals, tests and the bootstrap against scipy, known values and their own laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tokprune.eval.report.frontier import frontier
from tokprune.eval.report.resampling import Resampler, interval, macro, macro_samples
from tokprune.eval.report.statistics import agreement, flips, holm, mcnemar, wilson

NAN = math.nan
scores = st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=1, max_size=60)
light = settings(max_examples=60, deadline=None)


# ------------------------------------------------------------------------------ Wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),  # textbook value
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_known_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


@light
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
       st.sampled_from([0.8, 0.95, 0.99]))  # fmt: skip
def test_wilson_is_scipy_and_holds_the_share(pair: tuple[int, int], level: float) -> None:
    correct, n = pair
    low, high = wilson(correct, n, level)
    theirs = stats.binomtest(correct, n).proportion_ci(level, method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert 0 <= low <= correct / n <= high <= 1
    assert wilson(n - correct, n, level) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(("correct", "n", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_refuses(correct: float, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="should be"):
        wilson(correct, n, level)


# ------------------------------------------------------------------------------ McNemar, Holm


@light
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    n = lost + gained
    expected = stats.binomtest(lost, n, 0.5).pvalue if n else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mcnemar_vectorised_and_known() -> None:
    p = mcnemar(np.array([[10, 0], [3, 5]]), np.array([[1, 0], [3, 0]]))
    assert p.shape == (2, 2)
    assert p == pytest.approx(np.array([[2 * 12 / 2**11, 1.0], [1.0, 2 / 2**5]]))


@light
@given(scores, st.data())
def test_flips_swap_with_the_variants(first: list[float], data: st.DataObject) -> None:
    second = data.draw(st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=len(first),
                                max_size=len(first)))  # fmt: skip
    forth, back = flips(first, second), flips(second, first)
    assert (forth.lost, forth.gained, forth.n) == (back.gained, back.lost, back.n)
    assert forth.p == back.p
    order = data.draw(st.permutations(range(len(first))))
    assert flips([first[i] for i in order], [second[i] for i in order]) == forth
    a, b = np.array(first), np.array(second)
    both = ~np.isnan(a) & ~np.isnan(b)
    assert forth.n == both.sum()
    assert forth.gained - forth.lost == b[both].sum() - a[both].sum()


def test_holm_known_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.02, NAN, 0.01])
    assert adjusted[[0, 2]] == pytest.approx([0.02, 0.02])
    assert math.isnan(adjusted[1])
    assert holm([]).shape == (0,)


@light
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.data())
def test_holm_laws(p: list[float], data: st.DataObject) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-15).all()
    assert (adjusted <= np.minimum(1, len(p) * np.array(p)) + 1e-12).all()
    order = data.draw(st.permutations(range(len(p))))
    assert holm([p[i] for i in order]) == pytest.approx(adjusted[list(order)])
    # as many rejections as the step-down procedure itself makes
    ranked, rejected = sorted(p), 0
    while rejected < len(p) and ranked[rejected] * (len(p) - rejected) < 0.05:
        rejected += 1
    assert (adjusted < 0.05).sum() == rejected


def test_agreement() -> None:
    same = agreement(["a", "b", "c", "d"], ["a", "b", "x", "y"], [True, True, True, False])
    assert same == pytest.approx(2 / 3)
    assert math.isnan(agreement(["a"], ["a"], [False]))


# ------------------------------------------------------------------------------ frontier

points = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from([0, 1, 2, 3, NAN])),
    min_size=1, max_size=25,
)  # fmt: skip


@light
@given(points, st.booleans())
def test_frontier_is_nondominated_and_complete(
    found: list[tuple[float, float, float]], single: bool
) -> None:
    cost = np.array([[a, b] for a, b, _ in found], float)[:, : 1 if single else 2]
    gain = np.array([g for _, _, g in found], float)

    def beats(i: int, j: int) -> bool:
        return (
            bool((cost[i] <= cost[j]).all())
            and gain[i] >= gain[j]
            and (bool((cost[i] < cost[j]).any()) or gain[i] > gain[j])
        )

    real = [i for i in range(len(found)) if not math.isnan(gain[i])]
    expected = [i for i in real if not any(beats(j, i) for j in real)]
    assert np.flatnonzero(frontier(cost, gain)).tolist() == expected
    for i in set(real) - set(expected):  # whatever is left out, a point on the frontier beats
        assert any(beats(j, i) for j in expected)


def test_frontier_edges() -> None:
    assert frontier([], []).tolist() == []
    assert frontier([1, 1, 2], [5, 5, 5]).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="2 costs and 3"):
        frontier([1, 2], [1, 2, 3])


# ------------------------------------------------------------------------------ bootstrap


def _plain(score: np.ndarray, draws: int = 4000, **changes: list[str]) -> Resampler:
    n = len(score)
    images = changes.get("images", [f"i{k}" for k in range(n)])
    return Resampler(images, changes.get("tasks", ["t"] * n), draws=draws)


def test_bootstrap_of_independent_items_is_binomial() -> None:
    score = np.repeat([1.0, 0.0], [140, 60])[:, None]
    _, samples = _plain(score).task_means(score, ["t"])
    assert samples[:, 0, 0].std() == pytest.approx(math.sqrt(0.7 * 0.3 / 200), rel=0.06)
    low, high = interval(samples[:, 0, 0], 0.7)
    assert (low, high) == pytest.approx(wilson(140, 200), abs=0.012)


def test_bootstrap_draws_images() -> None:
    """Four equal answers per image hold the information of one."""
    score = np.repeat(np.repeat([1.0, 0.0], [35, 15]), 4)[:, None]
    images = [f"i{k // 4}" for k in range(200)]
    _, samples = _plain(score, images=images).task_means(score, ["t"])
    assert samples[:, 0, 0].std() == pytest.approx(math.sqrt(0.7 * 0.3 / 50), rel=0.06)


def test_bootstrap_is_stratified_where_images_have_one_task() -> None:
    """Every resample has as many questions of each task as there are."""
    score = np.zeros((60, 1))
    tasks = ["a"] * 20 + ["b"] * 40
    made = _plain(score, draws=50, tasks=tasks)
    assert (made._weights[:, made.group[:20]].sum(1) == 20).all()
    assert (made._weights[:, made.group[20:]].sum(1) == 40).all()


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(1)
    first = (rng.random(300) < 0.6).astype(float)
    second = first.copy()
    second[:3] = 1 - second[:3]
    made = _plain(first)
    _, samples = made.task_means(np.stack([first, second, first - second], 1), ["t"])
    assert samples[:, 0, 2] == pytest.approx(samples[:, 0, 0] - samples[:, 0, 1])
    assert samples[:, 0, 2].std() < 0.4 * samples[:, 0, 0].std()


@light
@given(scores, st.integers(1, 4), st.integers(0, 3))
def test_interval_holds_the_estimate(given_scores: list[float], per: int, seed: int) -> None:
    n = len(given_scores)
    tasks = [("a", "b")[k % 2] for k in range(n)]
    made = Resampler([f"i{k // per}" for k in range(n)], tasks, draws=40, seed=seed)
    score = np.array(given_scores)[:, None]
    means, samples = made.task_means(score, sorted(set(tasks)), chunk=7)
    for t, task in enumerate(sorted(set(tasks))):
        own = [s for s, name in zip(given_scores, tasks) if name == task and not math.isnan(s)]
        assert means[t, 0] == pytest.approx(np.mean(own) if own else NAN, nan_ok=True)
    estimate = float(macro(means)[0])
    low, high = interval(macro_samples(samples)[:, 0], estimate)
    if math.isnan(estimate):
        assert math.isnan(low)
    else:
        assert 0 <= low <= estimate <= high <= 1


def test_chunks_change_nothing() -> None:
    rng = np.random.default_rng(2)
    score = rng.random((50, 3))
    score[4, 1] = NAN
    made = _plain(score, draws=97, tasks=["a", "b"] * 25)
    one, many = (made.task_means(score, ["a", "b", "none"], chunk=c) for c in (97, 10))
    assert np.allclose(one[1], many[1], equal_nan=True)
    assert np.isnan(one[0][2]).all()


def test_resampler_refuses() -> None:
    with pytest.raises(ValueError, match="as many"):
        Resampler(["a"], ["t", "t"])
    with pytest.raises(ValueError, match="draws=0"):
        Resampler(["a"], ["t"], draws=0)
