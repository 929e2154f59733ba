"""TOPS: a slow twin of its choice, budgets and layers of its steps, who rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import few, normal, seeds
from tiny import llava, llava_next, make_inputs
from torch import Tensor
from torch.nn.functional import normalize

import tokprune
from tokprune.families import bind
from tokprune.methods import TOPS, make_method
from tokprune.operators.tops import Normalise, preservation_set

PROMPT = [[4, "image", 6]]


def slowly(
    x: Tensor, r: Tensor, k: int, alpha: float, lam: float, normalise: Normalise
) -> list[int]:
    """One set, token by token, in float64."""
    unit = normalize(x.double(), dim=-1)
    cosine = unit @ unit.T
    chosen = [int(r.argmax())]
    while len(chosen) < k:
        free = [i for i in range(len(x)) if i not in chosen]
        covered = cosine[:, chosen].amax(1)
        score = torch.zeros(len(free), dtype=torch.double)
        gain = [sum(max(0.0, float(cosine[i, j] - covered[j])) for j in free) for i in free]
        for weight, own in (
            (1.0, r.double()[free]), (alpha, 1 - covered[free]), (lam, torch.tensor(gain)),
        ):  # fmt: skip
            low = own.min() if normalise == "minmax" else 0.0
            scale = own.max() - low if normalise == "minmax" else own.mean()
            if scale > 0:
                score = score + weight * (own - low) / scale
        chosen.append(free[int(score.argmax())])
    return chosen


@few
@given(
    seeds, st.integers(2, 20), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 0.4, 2.0]),
    st.sampled_from(["mean", "minmax"]), st.booleans(), st.data(),
)  # fmt: skip
def test_choice_equals_the_slow_twin(
    seed: int, n: int, alpha: float, lam: float, normalise: Normalise, dense: bool,
    data: st.DataObject,
) -> None:  # fmt: skip
    """Gains made anew in every step, as on a GPU, and those brought up to date, as on the host."""
    k = data.draw(st.integers(1, n))
    x, r = normal(seed, 2, n, 6), normal(seed + 1, 2, n).mul(2).softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: dense)
        got = preservation_set(x, r, k, alpha, lam, normalise)
    for i in range(2):
        assert got[i].tolist() == slowly(x[i], r[i], k, alpha, lam, normalise)
        alone = preservation_set(x[i], r[i] * 1e-4, max(1, k - 1), alpha, lam, normalise)
        assert alone.tolist() == got[i].tolist()[: max(1, k - 1)]


def test_sets_too_many_for_one_map_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, r = normal(1, 5, 30, 6), normal(2, 5, 30).softmax(-1)
    want = preservation_set(x, r, 11)
    monkeypatch.setattr("tokprune.operators.tops.DENSE_LIMIT", 45)
    monkeypatch.setattr("tokprune.operators.tops._CHUNK", 7)
    assert torch.equal(preservation_set(x, r, 11), want)


@pytest.mark.parametrize("dense", [False, True])
def test_rounding_decides_nothing_once_all_is_covered(
    dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of three tokens: after one of each, relevance alone, of equals the first."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: dense)
    x = normal(5, 3, 64).repeat(100, 1)
    r = torch.linspace(1, 2, 100).repeat_interleave(3).flip(0)
    got = preservation_set(x, r, 40).tolist()
    assert sorted(i % 3 for i in got[:3]) == [0, 1, 2]
    assert got[3:] == [i for i in range(300) if i not in got[:3]][:37]


def test_numbers_out_of_range_are_named() -> None:
    x = torch.zeros(1, 6, 4)
    with pytest.raises(ValueError, match=r"alpha is -1 and lam 0\.5; both should be at least 0"):
        preservation_set(x, x[..., 0], 2, -1)
    with pytest.raises(ValueError, match=r"relevance has shape \(1, 5\); it should be \(1, 6\)"):
        preservation_set(x, x[:, 1:, 0], 2)
    with pytest.raises(ValueError, match="normalise='max' is unknown"):
        preservation_set(x, x[..., 0], 2, normalise="max")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- method


def traced(method: Any, model: Any = None, **inputs: Any) -> Any:
    model = model or llava()
    with tokprune.compress(model, method) as trace:
        model(**make_inputs(model, PROMPT, **inputs))
    return trace.last


def test_the_nominal_budget_is_not_the_mean() -> None:
    """Twice T in 3 of 8 layers, T in 3, a quarter in 2: the shares of 12, 12 and 8 of 32."""
    found = traced(TOPS(keep=8, prune_before=(3, 6)))
    counts = [layer.counts[0][0] for layer in found.layers]
    assert counts == [16] * 3 + [8] * 3 + [2] * 2
    assert sum(counts) / 8 == 8 * 1.1875
    for preset in TOPS.presets[:6]:
        method = TOPS(**preset.options)
        of_32 = [method.entering] * 12 + [method.budgets[0]] * 12 + [method.budgets[1]] * 8
        assert sum(of_32) / 32 == 1.1875 * preset.budget
        assert f"nominal {preset.budget}, {1.1875 * preset.budget:.0f} on the mean" in preset.source


def test_budgets_of_the_steps() -> None:
    assert (TOPS(keep=32).entering, TOPS(keep=32).budgets) == (64, (32, 8))
    assert (TOPS(keep=0.6).entering, TOPS(keep=0.6).budgets) == (1.0, (0.6, 0.15))
    assert TOPS(keep=2).budgets == (2, 1)
    several = TOPS(keep=(30, 20, 9), prune_before=(2, 4, 6), input_keep=40)
    assert (several.entering, several.budgets) == (40, (30, 20, 9))
    assert TOPS(keep=7, prune_before=5).budgets == (7,)
    # a fraction is one of the image's patches, in every step
    assert [TOPS(keep=0.25).count(step, 288) for step in (0, 1)] == [144, 36]


@pytest.mark.parametrize(
    "options", [{"keep": 9, "input_keep": 8}, {"keep": 0.3, "input_keep": 9}, {"keep": (9, 0.2)}]
)
def test_budgets_that_do_not_fit_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="input_keep no less than keep"):
        TOPS(**options)


def test_one_number_is_no_schedule_of_three_cuts() -> None:
    with pytest.raises(ValueError, match=r"with 3 layers in prune_before it should be a sequence"):
        TOPS(keep=9, prune_before=(2, 4, 6))


def test_tiles_compete_for_one_budget_at_the_input() -> None:
    """Relevance alone: the patches of the image that class tokens attend to most."""
    model, size = llava_next(), [(30, 22)]
    own = {"keep": 9, "prune_before": 4, "alpha": 0, "lam": 0}
    (few,) = traced(TOPS(**own), model, sizes=size).images
    (most,) = traced(TOPS(**own, input_keep=80), model, sizes=size).images
    best = most.entered.score.sort(descending=True, stable=True).indices[:18].sort().values
    assert torch.equal(few.entered.column, most.entered.column[best])
    assert not few.entered.newline.any()
    shares = torch.bincount(few.entered.tile).tolist()
    assert len(shares) > 1
    assert max(shares) > min(shares) + 1


@pytest.mark.parametrize(
    ("raters", "name", "options"),
    [
        ("all", "fastv", {"rows": "text"}),
        ("last", "fastv", {"rows": "last"}),
        ("sparsevlm", "sparsevlm", {"recycle": 0, "positions": "preserve"}),
    ],
)
def test_relevance_alone_is_what_others_rank_by(
    raters: Any, name: str, options: dict[str, Any]
) -> None:
    model, cut = llava(), {"keep": 7, "prune_before": 3}
    mine = TOPS(**cut, input_keep=1.0, decoder_alpha=0, decoder_lam=0, raters=raters)
    got, want = traced(mine, model), traced(make_method(name, **cut, **options), model)
    assert torch.equal(got.layers[-1].column, want.layers[-1].column)
    assert torch.equal(got.layers[-1].position, want.layers[-1].position)


@pytest.mark.parametrize("positions", [None, "compact", "preserve"])
def test_positions_close_up_at_the_input_and_stay_inside_the_decoder(positions: Any) -> None:
    found = traced(TOPS(keep=6, prune_before=(2, 4), positions=positions))
    first, last = found.layers[0], found.layers[-1]
    closed = [bool((layer.position[0].diff() == 1).all()) for layer in (first, last)]
    want = {None: [True, False], "compact": [True, True], "preserve": [False, False]}
    assert closed == want[positions]


def test_cuts_keep_their_depth_in_shallow_decoders() -> None:
    assert TOPS.options_for_depth(32) == {}
    assert TOPS.options_for_depth(8) == {"prune_before": (4, 7)}
    depth = bind(llava()).facts.decoder_layers
    TOPS(keep=4, **TOPS.options_for_depth(depth)).plan(bind(llava()).facts)
