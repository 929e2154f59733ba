"""Calibration: the search, the measurement, and what methods let it turn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PATCHES, llava, llava_next, llava_next_video, make_inputs

import tokprune
from tokprune.calibration import CLOSE, MeanTokens, bisect, mean_tokens, nearest
from tokprune.methods import DivPrune, FastV, MustDrop, ToDRE

PROMPTS = [[4, "image", 6], [7, "image", 9], [2, "image", 3]]


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


def two_batches(model: Any) -> list[dict[str, Any]]:
    return [make_inputs(model, PROMPTS[:2], seed=1), make_inputs(model, PROMPTS[2:], seed=2)]


# ------------------------------------------------------------------------------- search


@st.composite
def knobs(draw: st.DrawFn) -> tuple[list[float], set[int], float]:
    """A rising measurement of the settings 1…n, which of them there are, a target."""
    n = draw(st.integers(1, 60))
    rises = draw(st.lists(st.floats(0, 9), min_size=n, max_size=n))
    values = [draw(st.floats(0, 50))]
    for rise in rises[1:]:
        values.append(values[-1] + rise)
    there = draw(st.sets(st.integers(1, n), min_size=1))
    return values, there, draw(st.floats(0, 400))


@settings(max_examples=60, deadline=None)
@given(knobs())
def test_nearest_equals_trying_everything(case: Any) -> None:
    values, there, target = case
    tried: list[int] = []

    def measure(k: int) -> float:
        assert k in there, "measured a setting that does not exist"
        tried.append(k)
        return values[k - 1]

    found = nearest(measure, there.__contains__, 1, len(values), target)
    assert found is not None
    k, value = found
    assert value == values[k - 1]
    best = min(abs(values[j - 1] - target) for j in there)
    assert abs(value - target) <= max(best, CLOSE)
    assert len(tried) == len(set(tried)), "measured twice"
    assert len(tried) <= 16  # 3 + 2 · log2(60)


def test_exact_methods_need_one_measurement_and_far_targets_two() -> None:
    tried: list[int] = []

    def measure(k: int) -> float:
        tried.append(k)
        return 200 + k / 2

    assert nearest(measure, lambda k: True, 1, 576, 64) == (1, 200.5)
    assert len(tried) == 2
    assert nearest(float, lambda k: True, 1, 576, 64) == (64, 64.0)
    assert nearest(float, lambda k: False, 1, 576, 64) is None


def test_a_closer_setting_is_looked_for_where_it_is_asked_for() -> None:
    def measure(k: int) -> float:
        return k * 0.9

    assert nearest(measure, lambda k: True, 1, 100, 9.4) == (10, 9.0)  # 9 is within half a token
    found = nearest(measure, lambda k: True, 1, 100, 4.9, close=0.0)
    assert found is not None
    assert found[0] == 5


@pytest.mark.parametrize("power", [1.0, -0.5])
@pytest.mark.parametrize("target", [3.0, 50.0, 900.0])
def test_bisection_finds_settings_of_rising_and_falling_measurements(
    power: float, target: float
) -> None:
    tried: list[float] = []

    def measure(x: float) -> float:
        tried.append(x)
        return 1000 * min(1.0, x) ** power if power > 0 else float(x**power)

    value, measured = bisect(measure, 1e-7, 2.0, target, tolerance=0.01)
    assert measured == pytest.approx(target, rel=0.01)
    assert tried.count(value) == 1
    assert len(tried) <= 26


def test_bisection_stops_at_once_where_the_target_is_out_of_reach() -> None:
    tried: list[float] = []

    def measure(x: float) -> float:
        tried.append(x)
        return 10 - x

    assert bisect(measure, 1.0, 4.0, 2.0) == (4.0, 6.0)
    assert bisect(measure, 1.0, 4.0, 20.0) == (1.0, 9.0)
    assert len(tried) == 4
    assert bisect(lambda x: x, 1.0, 4.0, 2.9, tolerance=0.0, steps=1) == (2.0, 2.0)


# ------------------------------------------------------------------------------- measurement


def test_three_numbers_of_a_method(model: Any) -> None:
    """Entering, leaving and at the end, per image, whatever the batches."""
    got = mean_tokens(model, FastV(6, prune_before=3), two_batches(model))
    assert got == MeanTokens(
        mean=(3 * PATCHES + 5 * 6) / 8, last=6, leaving=(2 * PATCHES + 6 * 6) / 8
    )
    inputs = make_inputs(model, [[4, "image", 2, "image", 6], [5], [3, "image", 9]])
    assert mean_tokens(model, ToDRE(10, stage2=False), [inputs]) == MeanTokens(10, 10, 10)
    text = make_inputs(model, [[5]])
    assert mean_tokens(model, ToDRE(9, stage2=False), [text, inputs]) == MeanTokens(9, 9, 9)
    assert not tokprune.is_patched(model)


# ------------------------------------------------------------------------------- keep


@pytest.mark.parametrize(
    ("count", "target", "keep"), [("mean", 18, 12), ("last", 5, 5), ("leaving", 11.5, 8)]
)
def test_keep_is_turned_in_whole_tokens(model: Any, count: Any, target: float, keep: int) -> None:
    found = tokprune.calibrate(model, "fastv", two_batches(model), target, count=count, rows="text")
    # two layers see all 36 tokens and one leaves them
    assert found == FastV(keep, prune_before=2, rows="text")
    assert tokprune.calibrate(model, FastV(0.3, rows="text"), two_batches(model), target,
                              count=count) == found  # fmt: skip


def test_images_of_other_sizes_meet_the_mean(model: Any) -> None:
    tiled = llava_next()
    inputs = make_inputs(tiled, PROMPTS, [(20, 40), (40, 20), (12, 12)])
    whole = mean_tokens(tiled, ToDRE(None, tau=0.0), [inputs]).mean
    for target in (20, 0.8 * whole):
        found = tokprune.calibrate(
            tiled, "todre", [inputs], target, tolerance=0.005, stage2=False, pivot="farthest"
        )
        assert isinstance(found, ToDRE)
        assert mean_tokens(tiled, found, [inputs]).mean == pytest.approx(target, abs=0.5)
    assert found.keep > target, "small images have fewer tokens than the budget"


def test_methods_that_give_a_budget_in_another_way_take_one(model: Any) -> None:
    batches = two_batches(model)[:1]
    for name, target in (("tome", 18), ("visionzip", 18), ("pool", 9), ("pyramiddrop", 18)):
        options = tokprune.available_methods()[name].options_for_depth(8)
        found = tokprune.calibrate(model, name, batches, target, **options)
        assert mean_tokens(model, found, batches).mean == pytest.approx(target, abs=0.5), name
    coarse = tokprune.calibrate(model, "pool", batches, 20)
    assert mean_tokens(model, coarse, batches).mean == 9, "of 4, 9 and 36 the nearest"


def test_a_video_is_counted_whole_whatever_its_budget_is_of() -> None:
    model = llava_next_video()
    inputs = make_inputs(model, [[4, "video", 6], [3, "video", 5]])
    for unit, keep in (("video", 20), ("frame", 5), (2, 10)):
        found = tokprune.calibrate(model, "divprune", [inputs], 20, video_unit=unit)
        assert found == DivPrune(keep, video_unit=unit)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- MustDrop


def test_mustdrop_turns_its_thresholds_to_a_mean_number(model: Any) -> None:
    batches = two_batches(model)
    start = MustDrop(threshold=0.3, window=(2, 2), prune_before=(2, 4, 5, 7))
    for target in (26, 18):
        found = tokprune.calibrate(model, start, batches, target, count="leaving")
        assert isinstance(found, MustDrop)
        assert found.keep is None
        assert found.alpha == found.gamma  # tied 1 : 1
        total = 0.0
        with tokprune.compress(model, found) as trace, torch.no_grad():
            for batch in batches:
                model(**batch)
                counts = [sum(map(sum, layer.counts)) for layer in trace.last.layers]
                total += (sum(counts[1:]) + counts[-1]) / len(counts)
        assert total / 3 == pytest.approx(target, rel=0.03)
    fixed = MustDrop(alpha=0.03, threshold=0.3, window=(2, 2), prune_before=(2, 4, 5, 7))
    found = tokprune.calibrate(model, fixed, batches, 30, turn="gamma", count="leaving")
    assert found.alpha == 0.03  # type: ignore[attr-defined]
    assert mean_tokens(model, found, batches).leaving == pytest.approx(30, rel=0.03)
    tied = tokprune.calibrate(
        model, MustDrop(gamma=0.02, alpha=0.01, prune_before=(2, 4, 5, 7)), batches, 20
    )
    assert tied.alpha == tied.gamma / 2  # type: ignore[attr-defined]
    assert not tokprune.is_patched(model)


def test_mustdrop_turns_keep_where_that_is_asked_for(model: Any) -> None:
    found = tokprune.calibrate(
        model, "mustdrop", [make_inputs(model, PROMPTS)], 15, turn="keep", spatial=False,
        prune_before=(2, 4, 5, 7), count="last",
    )  # fmt: skip
    assert found == MustDrop(keep=15, spatial=False, prune_before=(2, 4, 5, 7))


def test_few_steps_stop_at_the_nearest_found(model: Any) -> None:
    """One step between the ends: of a range so wide it is far off."""
    batches = two_batches(model)
    method = MustDrop(prune_before=(2, 4, 5, 7), spatial=False)
    rough = tokprune.calibrate(model, method, batches, 15, steps=1, tolerance=0.001)
    close = tokprune.calibrate(model, method, batches, 15, tolerance=0.001)
    off = [abs(mean_tokens(model, found, batches).mean - 15) for found in (rough, close)]
    assert off[0] > off[1]


# ------------------------------------------------------------------------------- errors


def test_mustdrop_names_its_floor(model: Any) -> None:
    batches = [make_inputs(model, PROMPTS)]
    method = MustDrop(prune_before=(2, 4, 5, 7), spatial=False)
    keys = math.ceil(0.08 * PATCHES)
    floor = (PATCHES + 7 * keys) / 8  # one layer leaves all tokens, seven the keys
    with pytest.raises(ValueError, match=rf"target=6 is below the floor of {floor:.1f} tokens.*"
                       "a smaller key_rate or threshold lowers it"):  # fmt: skip
        tokprune.calibrate(model, method, batches, 6, count="leaving")
    fixed = MustDrop(alpha=1e-6, prune_before=(2, 4, 5, 7), spatial=False)
    with pytest.raises(ValueError, match="a larger alpha than 1e-06"):
        tokprune.calibrate(model, fixed, batches, 6, turn="gamma")


BAD: list[tuple[Any, dict[str, Any], str]] = [
    ("fastv", {"target": 8}, r"target=8 is below the floor of 9.8 .* fastv comes to with any keep"),
    ("fastv", {"target": 40}, r"target=40 is above the 36.0 tokens"),
    ("mustdrop", {"target": 40, "prune_before": 3}, r"target=40 is above the 36.0 tokens"),
    ("fastv", {"target": 0}, r"target=0 should be in \(0"),
    ("fastv", {"batches": []}, "at least one batch"),
    ("fastv", {"batches": {"input_ids": None}}, "a list of model inputs"),
    ("fastv", {"turn": "thresholds"}, r"turn='thresholds' should be one of None, 'keep'"),
    ("fastv", {"count": "first"}, r"count='first' should be one of 'mean', 'last', 'leaving'"),
    ("mustdrop", {"turn": "gamma"}, "alpha=0 keeps every token"),
    ("mustdrop", {"variant": "lightcompress"}, "variant='lightcompress' has no thresholds"),
    ("fastv", {"prune_before": 9}, r"prune_before=9 should lie between 1 and 7"),
    ("fastvv", {}, "Did you mean 'fastv'"),
    (tokprune.compose(ToDRE(9), FastV(5)), {}, "compose has no option 'keep'"),
]


@pytest.mark.parametrize(("method", "options", "pattern"), BAD)
def test_what_cannot_be_calibrated(
    model: Any, method: Any, options: dict[str, Any], pattern: str
) -> None:
    batches = [make_inputs(model, PROMPTS)]
    with pytest.raises(ValueError, match=pattern):
        tokprune.calibrate(model, method, **{"target": 20, "batches": batches, **options})
    assert not tokprune.is_patched(model)


@pytest.mark.parametrize("method", ["fastv", "mustdrop"])
def test_batches_without_an_image_are_refused(model: Any, method: str) -> None:
    with pytest.raises(ValueError, match="hold no image"):
        tokprune.calibrate(model, method, [make_inputs(model, [[5]])], 20, prune_before=3)


def test_a_patched_model_is_refused(model: Any) -> None:
    with tokprune.compress(model, "fastv", keep=7), pytest.raises(ValueError, match="unpatch"):
        tokprune.calibrate(model, "fastv", [make_inputs(model, PROMPTS)], 20)
