"""What may be called a speed-up: the noise gate and the break-even point, on made-up times."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from tokprune.bench.break_even import Load, break_even
from tokprune.bench.gate import LEAST_ROUNDS, Interval, Verdict, judge, noise_floor

times = st.floats(1e-4, 10.0)
rounds = st.lists(st.tuples(times, times), min_size=1, max_size=40)


def jitter(count: int, scale: float, seed: int) -> list[float]:
    import random

    rng = random.Random(seed)
    return [1 + scale * (2 * rng.random() - 1) for _ in range(count)]


def test_equal_distributions_are_refused_and_say_what_would_do() -> None:
    a, b, c = (jitter(20, 0.05, seed) for seed in (1, 2, 3))
    verdict = judge(a, c, noise_floor(a, b))
    assert verdict.speedup is None
    assert not verdict.faster
    assert verdict.reason is not None
    assert verdict.reason.startswith("within noise (")
    assert "×, needs " in verdict.reason
    assert str(verdict) == verdict.reason
    assert verdict.to_dict()["speedup"] is None


def test_a_clear_speed_up_and_a_clear_slow_down_are_findings() -> None:
    a, b = jitter(20, 0.05, 1), jitter(20, 0.05, 2)
    floor = noise_floor(a, b)
    fast, slow = [t / 2 for t in jitter(20, 0.05, 3)], [t * 2 for t in jitter(20, 0.05, 4)]
    verdict = judge(a, fast, floor)
    assert verdict.speedup == pytest.approx(2, rel=0.05)
    assert verdict.faster
    assert verdict.reason is None
    assert str(verdict) == f"{verdict.speedup:.2f}×"
    slower = judge(a, slow, floor)
    assert slower.speedup == pytest.approx(0.5, rel=0.05)
    assert not slower.faster


def test_a_small_but_steady_gain_drowns_in_a_control_that_is_off_by_more() -> None:
    base, variant = jitter(20, 0.001, 1), [0.97 * t for t in jitter(20, 0.001, 2)]
    assert judge(base, variant, noise_floor(base, jitter(20, 0.001, 3))).faster
    off = [1.05 * t for t in base]  # two equal variants differed by 5 %
    assert noise_floor(base, off) == pytest.approx(1.05)
    verdict = judge(base, variant, noise_floor(base, off))
    assert verdict.speedup is None
    assert verdict.needs is not None
    assert verdict.needs > 1.05


def test_needed_ratio_is_where_the_verdict_turns() -> None:
    base, variant = jitter(20, 0.05, 5), jitter(20, 0.05, 6)
    verdict = judge(base, variant, 1.03)
    assert verdict.needs is not None
    scale = verdict.needs / verdict.ratio.median
    if verdict.needs < 1:  # a slow-down is what it leans to
        assert judge(base, [t / scale * 1.001 for t in variant], 1.03).speedup is not None
        assert judge(base, [t / scale * 0.999 for t in variant], 1.03).speedup is None
    else:
        assert judge(base, [t / scale / 1.001 for t in variant], 1.03).speedup is not None
        assert judge(base, [t / scale / 0.999 for t in variant], 1.03).speedup is None


def test_too_few_rounds_never_claim() -> None:
    verdict = judge([2.0] * (LEAST_ROUNDS - 1), [1.0] * (LEAST_ROUNDS - 1))
    assert verdict.speedup is None
    assert "too few rounds (5; at least 6 are needed)" in str(verdict)
    assert judge([2.0] * LEAST_ROUNDS, [1.0] * LEAST_ROUNDS).speedup == 2
    assert noise_floor([1.0], [1.0]) == math.inf


@given(rounds)
@settings(max_examples=100, deadline=None)
def test_claims_pass_a_sign_test(pairs: list[tuple[float, float]]) -> None:
    base, variant = [a for a, _ in pairs], [b for _, b in pairs]
    verdict = judge(base, variant)
    if verdict.speedup is None:
        return
    wins = sum(a > b for a, b in pairs)
    losses = sum(a < b for a, b in pairs)
    assert wins != losses
    assert binomtest(max(wins, losses), len(pairs)).pvalue <= 0.05
    assert verdict.faster == (wins > losses)


@given(st.lists(st.floats(1.0, 3.0), min_size=1, max_size=20), st.randoms())
@settings(max_examples=50, deadline=None)
def test_ratios_that_straddle_one_are_never_a_finding(above: list[float], random: object) -> None:
    ratios = above + [1 / r for r in above]
    random.shuffle(ratios)  # type: ignore[attr-defined]
    assert judge(ratios, [1.0] * len(ratios)).speedup is None


@given(rounds, st.floats(1, 1.5), st.floats(1, 1.5))
@settings(max_examples=50, deadline=None)
def test_more_noise_never_makes_a_claim(
    pairs: list[tuple[float, float]], one: float, two: float
) -> None:
    base, variant = [a for a, _ in pairs], [b for _, b in pairs]
    low, high = sorted((one, two))
    if judge(base, variant, high).speedup is not None:
        assert judge(base, variant, low).speedup is not None


@given(st.lists(times, min_size=LEAST_ROUNDS, max_size=40))
@settings(max_examples=50, deadline=None)
def test_interval_is_of_order_statistics(values: list[float]) -> None:
    interval = Interval.of(values)
    n, ordered = len(values), sorted(values)
    # the largest k with P(fewer than k of n fair coins) ≤ 2.5 %
    tail, k = 0.0, 0
    while tail + math.comb(n, k) / 2**n <= 0.025:
        tail += math.comb(n, k) / 2**n
        k += 1
    assert interval.low == ordered[k - 1]
    assert interval.high == ordered[n - k]
    assert interval.low <= interval.median <= interval.high


@pytest.mark.parametrize(
    ("base", "variant", "floor", "said"),
    [
        ([1.0], [1.0, 2.0], 1.0, "1 and 2 rounds"),
        ([0.0] * 6, [1.0] * 6, 1.0, "should be positive"),
        ([1.0] * 6, [math.nan] * 6, 1.0, "should be positive"),
        ([1.0] * 6, [1.0] * 6, 0.9, "floor=0.9"),
        ([], [], 1.0, "at least one"),
    ],
)
def test_bad_times(base: list[float], variant: list[float], floor: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        judge(base, variant, floor)


def test_verdicts_survive_json() -> None:
    for variant in ([0.5] * 20, [1.0] * 20, [1.0] * 3):
        verdict = judge([1.0] * len(variant), variant)
        assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict(), allow_nan=False))) == (
            verdict
        )


# --------------------------------------------------------------------------- break-even


def verdict_of(ratio: float) -> Verdict:
    return judge([ratio] * 8, [1.0] * 8, 1.1)


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([1.05, 1.05, 0.5, 1.0], "never in the range measured (batch 1–4, 100–300 prompt tokens)"),
        ([1.05, 1.2, 1.2, 1.2], "from batch 1 × 300 tokens"),
        ([1.2, 1.2, 1.2, 1.2], "all measured, from batch 1 × 100 tokens"),
        ([1.05, 1.2, 1.05, 1.2], "batch 1 × 300 tokens, but not at batch 4 × 100 tokens"),
    ],
)
def test_break_even(ratios: list[float], said: str) -> None:
    loads = [Load.of(b, t) for b in (1, 4) for t in (100, 300)]
    points = list(zip(loads, map(verdict_of, ratios)))
    found = break_even(points[::-1])  # in any order
    assert str(found) == said
    assert found.to_dict()["text"] == said
    assert [m["prompt_tokens"] for m in found.to_dict()["measured"]] == [100, 300, 100, 300]
    with pytest.raises(ValueError, match="empty"):
        break_even([])


def test_the_package_offers_its_functions_by_name() -> None:
    import tokprune.bench
    from tokprune.bench import measure, run

    assert tokprune.bench.bench is run.bench
    assert tokprune.bench.measure_trials is measure.measure_trials
    with pytest.raises(AttributeError, match="benhc"):
        _ = tokprune.bench.benhc  # type: ignore[attr-defined]
