"""PyramidDrop and SparseVLM: budgets, settings, presets, later turns, composition, errors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_methods_stages import LLAVA, NEXT, SIZES
from tiny import BUILDERS, PATCHES, llava, make_inputs, single

import tokprune
from tokprune.methods import make_method
from tokprune.methods.pyramiddrop import PyramidDrop
from tokprune.methods.registry import options_for_depth
from tokprune.methods.schedule import tokens_after
from tokprune.methods.sparsevlm import SparseVLM
from tokprune.testing.oracle import assert_same_logits, compressed_logits, continuation_tokens

PROMPTS = [[4, "image", 6], [7, "image", 9], [2, "image", 3]]
METHODS = {
    "pyramiddrop": PyramidDrop(keep=5, prune_before=(1, 3, 5)),
    "sparsevlm": SparseVLM(keep=5, prune_before=(2, 4, 6)),
    "sparsevlm-spatial": SparseVLM(
        keep=5, prune_before=(1, 4), recycle=0.8, cluster_size=3, order="spatial"
    ),
    "sparsevlm-plus": SparseVLM(keep=5, prune_before=(2, 4), version="plus"),
    "sparsevlm-rank": SparseVLM(keep=None, prune_before=(2, 4), rank_scale=1.0),
}


def counts_of(model: Any, method: Any, inputs: Any = None) -> list[list[list[int]]]:
    inputs = make_inputs(model, PROMPTS) if inputs is None else inputs
    with tokprune.compress(model, method) as trace, torch.no_grad():
        model(**inputs)
    last: Any = trace.last
    return [layer.counts for layer in last.layers]


# ------------------------------------------------------------------------------- schedules


def test_published_schedule_of_pyramiddrop() -> None:
    for keep in (0.125, (0.5, 0.25, 0.125), 72):
        method = PyramidDrop(keep)
        assert [method.count(step, 576) for step in range(3)] == [288, 144, 72]
    # floors of the first number, not halves of the last
    assert PyramidDrop((0.5, 0.25), prune_before=(1, 2)).count(1, 45) == 11


@given(
    st.integers(1, 3000), st.integers(1, 5),
    st.one_of(st.integers(1, 3000), st.floats(0.001, 1.0)),
)  # fmt: skip
def test_schedules_fall_and_rise_with_their_number(
    tokens: int, steps: int, keep: int | float
) -> None:
    left = [tokens_after(keep, step, steps, tokens) for step in range(steps)]
    assert left == sorted(left, reverse=True)
    assert left[-1] >= 1
    assert left[0] <= tokens
    last = min(keep, tokens) if isinstance(keep, int) else max(1, int(keep * tokens))
    assert left[-1] == last
    more = keep + 1 if isinstance(keep, int) else min(1.0, keep * 1.1)
    assert all(tokens_after(more, s, steps, tokens) >= left[s] for s in range(steps))
    assert tokens_after(keep, 0, steps, 0) == 0


@given(st.integers(2, 800), st.integers(1, 799), st.floats(0, 1), st.integers(1, 12))
def test_tokens_of_sparsevlm_rise_with_keep(
    tokens: int, keep: int, recycle: float, size: int
) -> None:
    """Merged tokens included, step by step: a sweep can search for a budget."""

    def left(keep: int) -> list[int]:
        method = SparseVLM(keep, recycle=recycle, cluster_size=size)
        now, seen = tokens, []
        for step in range(3):
            kept, chosen, merged = method.counts(step, tokens, now)
            assert merged <= chosen <= now - kept or (merged, chosen) == (0, 0)
            now = kept + merged
            seen.append(now)
        return seen

    low, high = left(keep), left(keep + 1)
    assert low == sorted(low, reverse=True)
    assert size == 1 or all(a <= b for a, b in zip(low, high))


# ------------------------------------------------------------------------------- presets


def mean_tokens(layers: list[int]) -> float:
    return sum(layers) / len(layers)


def leaving(method: Any, tokens: int, earlier: int = 0) -> list[int]:
    """Tokens per layer of 32; ``earlier``: 1 where a cut counts from the layer that ranks on."""
    steps = [layer - earlier for layer in method.steps]
    now, seen = tokens, []
    for layer in range(32):
        if layer in steps:
            step = steps.index(layer)
            if isinstance(method, SparseVLM):
                kept, _, merged = method.counts(step, tokens, now)
                now = kept + merged
            else:
                now = method.count(step, tokens)
        seen.append(now)
    return seen


@pytest.mark.parametrize("preset", SparseVLM.presets, ids=lambda p: f"{p.model}-{p.budget}")
def test_presets_of_sparsevlm(preset: Any) -> None:
    method = SparseVLM.preset(preset.model, preset.budget)
    facts = LLAVA if preset.model == "llava-1.5" else NEXT
    assert method.plan(facts).decoder[0].taps == {layer - 1 for layer in method.steps}
    if preset.budget == "rank":
        return
    name, tokens = preset.budget, 576 if preset.model == "llava-1.5" else 2880
    number = int(str(name).removeprefix("plus-"))
    # as published: the layer whose attention ranks counts as pruned
    seen = mean_tokens(leaving(method, tokens, earlier=1))
    assert seen == pytest.approx(number, rel=0.015 if tokens == 576 else 0.04)
    if name == 192:
        assert round(seen, 1) == 192.0
        true = leaving(method, tokens)
        assert mean_tokens(true) == 206.5
        assert sorted(set(true)) == [113, 204, 309, 576]


@pytest.mark.parametrize("preset", PyramidDrop.presets, ids=lambda p: f"{p.model}-{p.budget}")
def test_presets_of_pyramiddrop(preset: Any) -> None:
    method = PyramidDrop.preset(preset.model, preset.budget)
    facts = LLAVA if preset.model == "llava-1.5" else NEXT
    assert method.plan(facts).decoder[0].prune_before == set(method.steps)
    tokens = 576 if preset.model == "llava-1.5" else 2880
    seen = leaving(method, tokens)
    if isinstance(preset.budget, int):
        assert mean_tokens(seen) == pytest.approx(preset.budget, abs=0.75 * tokens / 576)
    elif tokens == 576:
        from tokprune.trace.flops import paper_flops

        flops = paper_flops(seen, 4096, 11008, gated=True) / 1e12
        assert round(flops, 2) == {"S=4": 1.78, "S=3": 2.13}[preset.budget]


# ------------------------------------------------------------------------------- behaviour


def test_counts_hold_for_every_image() -> None:
    model = llava()
    inputs = make_inputs(model, [[3, "image", 2, "image", 8], [5, "image", 4]])
    got = counts_of(model, PyramidDrop(keep=(20, 9), prune_before=(2, 5)), inputs)
    full = [[PATCHES, PATCHES], [PATCHES]]
    assert got == [full] * 2 + [[[20, 20], [20]]] * 3 + [[[9, 9], [9]]] * 3
    # 36 → 20 and 5 of the 16 dropped into one; 21 → 9 and 4 of the 12 dropped into one
    got = counts_of(model, SparseVLM((20, 9), prune_before=(2, 5)), inputs)
    assert got == [full] * 2 + [[[21, 21], [21]]] * 3 + [[[10, 10], [10]]] * 3


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(
    "method",
    [
        PyramidDrop(keep=1.0, prune_before=(1, 3)),
        PyramidDrop(keep=36, prune_before=(1, 3)),
        SparseVLM(keep=1.0, prune_before=(2, 4)),
        SparseVLM(keep=1.0, prune_before=(2, 4), version="plus"),
        SparseVLM(keep=None, prune_before=(2, 4), rank_scale=1e3),
    ],
    ids=str,
)
def test_settings_that_keep_everything_change_nothing(family: str, method: Any) -> None:
    model = BUILDERS[family]()
    if getattr(method, "keep", 0) == 36 and family == "llava_next":
        method = PyramidDrop(keep=tiny.tokens_of(model, (20, 40)), prune_before=(1, 3))
    inputs = make_inputs(model, PROMPTS)
    continuation = continuation_tokens(3, 3)
    want = compressed_logits(model, inputs, continuation)
    with tokprune.compress(model, method):
        assert torch.equal(compressed_logits(model, inputs, continuation), want)


def test_always_drop_drops_at_least_one() -> None:
    model = llava()
    method = SparseVLM(keep=1.0, prune_before=(2, 4, 6), recycle=0, always_drop=True)
    counts = counts_of(model, method)
    assert [c[0] for c in counts] == [[36]] * 2 + [[35]] * 2 + [[34]] * 2 + [[33]] * 2


def test_rank_counts_follow_the_number_of_raters() -> None:
    """A few raters attend to many image tokens: the rank is their number."""
    model = llava()
    prompts = [[4, "image", 1], [4, "image", 12], [3, "image", 5]]
    counts = counts_of(
        model, SparseVLM(None, prune_before=(3,), recycle=0, rank_scale=1.0),
        make_inputs(model, prompts),
    )  # fmt: skip
    last = [row[0] for row in counts[-1]]
    assert last[0] == 1
    assert 1 < last[1] < 12
    assert 1 <= last[2] < 5


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("family", BUILDERS)
def test_a_batch_equals_its_rows_alone(family: str, case: str) -> None:
    model = BUILDERS[family]()
    inputs = make_inputs(model, PROMPTS, SIZES)
    continuation = continuation_tokens(3, 4)
    with tokprune.compress(model, METHODS[case]) as trace:
        got = compressed_logits(model, inputs, continuation)
        together = [trace.kept(None, b) for b in range(3)]
        for b in range(3):
            one = single(inputs, b, slice(b, b + 1))
            want = compressed_logits(model, one, continuation[b : b + 1])
            assert_same_logits(got[b : b + 1], want)
            alone = trace.kept()
            assert [t.sources for t in alone] == [t.sources for t in together[b]]


@pytest.mark.parametrize("case", METHODS)
def test_later_turns_with_images(case: str) -> None:
    """A second turn of a padded batch, with images: every row gets what it gets alone."""
    model = llava()
    start = make_inputs(model, [[4, "image", 6], [7, "image", 9]])
    more = make_inputs(model, [[3, "image", 5], [6, "image", 9]], seed=7)

    def turns(rows: slice) -> torch.Tensor:
        one = rows != slice(0, 2)
        cache, held = None, None
        for turn in (start, more):
            ids, real = turn["input_ids"][rows], turn["attention_mask"][rows]
            if one:
                ids, real = ids[:, real[0] != 0], real[:, real[0] != 0]
            mask = real if held is None else torch.cat([held, real], dim=1)
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=position,
                past_key_values=cache, pixel_values=turn["pixel_values"][rows], use_cache=True,
            )  # fmt: skip
            cache, held = out.past_key_values, mask
        for step in range(3):
            held = torch.cat([held, torch.ones_like(held[:, :1])], dim=1)
            out = model(
                input_ids=torch.full((len(ids), 1), 11 + step), attention_mask=held,
                position_ids=held.cumsum(1)[:, -1:] - 1, past_key_values=cache, use_cache=True,
            )  # fmt: skip
        return out.logits[:, -1]

    with tokprune.compress(model, METHODS[case]), torch.no_grad():
        together = turns(slice(0, 2))
        apart = torch.cat([turns(slice(0, 1)), turns(slice(1, 2))])
    assert_same_logits(together, apart)


@pytest.mark.parametrize("case", METHODS)
def test_rows_without_an_image_stay_whole(case: str) -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6], [9]])
    continuation = continuation_tokens(2, 2)
    plain = compressed_logits(model, inputs, continuation)
    with tokprune.compress(model, METHODS[case]) as trace:
        got = compressed_logits(model, inputs, continuation)
    last: Any = trace.last
    assert last.layers[-1].lengths[1] == 9
    assert last.layers[-1].lengths[0] < 46
    assert_same_logits(got[1:], plain[1:])


@pytest.mark.parametrize("family", BUILDERS)
def test_under_an_encoder_stage_that_merges(family: str) -> None:
    """VisionZip then SparseVLM: sources are followed through both."""
    model = BUILDERS[family]()
    both = tokprune.compose(
        tokprune.VisionZip(keep=14), SparseVLM(keep=(8, 4), prune_before=(2, 5))
    )
    inputs = make_inputs(model, PROMPTS, SIZES)
    with tokprune.compress(model, both) as trace, torch.no_grad():
        model(**inputs)
    entered = {cell for token in trace.kept(0) for cell in token.sources}
    for layer in (2, 5):
        held = [cell for token in trace.kept(layer) for cell in token.sources]
        assert len(held) == len(set(held))
        assert set(held) < entered
    assert max(len(t.sources) for t in trace.kept()) > 1
    stages = trace.to_dict()["images"][0]["stages"]
    assert any("sources" in token for token in stages[-1]["tokens"])


def test_two_decoder_methods_do_not_compose() -> None:
    both = tokprune.compose(METHODS["sparsevlm"], METHODS["pyramiddrop"])
    with pytest.raises(tokprune.CompositionError, match="inside the decoder"):
        tokprune.patch(llava(), both)


def test_gravity_and_heads_change_the_ranking_alone() -> None:
    model = llava()
    kept = {}
    for name, options in {
        "v1": {}, "gravity": {"gravity": True}, "heads": {"heads": 1},
        "plus": {"version": "plus"},
    }.items():  # fmt: skip
        method = SparseVLM(keep=9, prune_before=(3,), recycle=0, **options)
        with tokprune.compress(model, method) as trace, torch.no_grad():
            model(**make_inputs(model, PROMPTS))
        kept[name] = [t.column for b in range(3) for t in trace.kept(None, b)]
        assert len(kept[name]) == 27
        seen: Any = trace.last.layers[-1]
        positions = seen.position[0][seen.column[0] >= 0].tolist()
        assert positions == sorted(set(positions))
        gapless = positions == list(range(positions[0], positions[0] + 19))
        assert gapless is (name != "plus")  # compact but for plus
    # four heads are fewer than 14: "plus" is the correction alone
    assert kept["plus"] == kept["gravity"] != kept["v1"]
    assert kept["heads"] != kept["v1"]


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(case: str, dtype: torch.dtype) -> None:
    model = llava().to(dtype)
    inputs = make_inputs(model, PROMPTS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with tokprune.compress(model, METHODS[case]), torch.no_grad():
        out = model(**inputs)
    assert out.logits.dtype == dtype
    assert torch.isfinite(out.logits[:, -1]).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("pyramiddrop", {}), ("sparsevlm", {}), ("sparsevlm", {"version": "plus"})],
)
def test_a_sweep_can_turn_keep_on_six_layers(name: str, options: dict[str, Any]) -> None:
    """Measured tokens, merged ones included, rise with keep from layer to layer."""
    model = llava(layers=6)
    inputs = make_inputs(model, PROMPTS[:1])
    options = {**options_for_depth(name, 6), **options}
    seen = [
        [sum(row) for (row,) in counts_of(model, make_method(name, keep=keep, **options), inputs)]
        for keep in range(1, PATCHES + 1, 5)
    ]
    for low, high in pairwise(seen):
        assert all(a <= b for a, b in zip(low, high))
        assert low[-1] < high[-1]
    assert seen[-1] == [PATCHES] * 6


# (method, options, exception, pattern)
ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("pyramiddrop", {}, ValueError, r"prune_before=\(8, 16, 24\) should lie between 0 and 7"),
    ("pyramiddrop", {"keep": 0}, ValueError, r"keep=0 should be at least 1"),
    ("pyramiddrop", {"keep": (5, 4)}, ValueError, r"one budget per layer of prune_before, 3 in"),
    ("pyramiddrop", {"keep": (5, 9), "prune_before": (1, 2)}, ValueError, r"should not rise"),
    ("pyramiddrop", {"keep": (5, 0.0), "prune_before": (1, 2)}, ValueError, r"keep\[1\]=0.0"),
    ("pyramiddrop", {"keep": 37, "prune_before": (1,)}, ValueError, r"keep=37 is larger than"),
    ("pyramiddrop", {"prune_before": (-1, 2)}, ValueError, r"prune_before=\(-1, 2\) .* from 0 on"),
    ("pyramiddrop", {"prune_before": (3, 2)}, ValueError, r"prune_before=\(3, 2\) .*ascending"),
    ("pyramiddrop", {"prune_before": ()}, ValueError, r"prune_before=\(\) should be a layer"),
    ("pyramiddrop", {"positions": "x"}, ValueError, r"positions='x' should be one of"),
    ("sparsevlm", {}, ValueError, r"'keep' is required by sparsevlm"),
    ("sparsevlm", {"keep": "3"}, TypeError, r"keep='3' should be a number of tokens"),
    ("sparsevlm", {"keep": 5}, ValueError, r"prune_before=\(3, 7, 16\) should lie.* 1 and 7"),
    ("sparsevlm", {"keep": (5, 4)}, ValueError, r"one budget per layer of prune_before, 3 in"),
    ("sparsevlm", {"keep": 40, "prune_before": (1,)}, ValueError, r"keep=40 is larger than the"),
    ("sparsevlm", {"keep": 5, "prune_before": 0}, ValueError, r"prune_before=0 should .* 1 and 7"),
    ("sparsevlm", {"keep": 5, "gravity": 2}, ValueError, r"gravity=2 should be one of True, False"),
    ("sparsevlm", {"keep": 5, "version": "v3"}, ValueError, r"version='v3' should be one of"),
    ("sparsevlm", {"keep": 5, "recycle": 1.5}, ValueError, r"recycle=1.5 should be in \[0, 1\]"),
    ("sparsevlm", {"keep": 5, "cluster_size": 0}, ValueError, r"cluster_size=0 should be a whole"),
    ("sparsevlm", {"keep": 5, "cluster_size": None}, ValueError, r"cluster_size=None should be"),
    ("sparsevlm", {"keep": 5, "heads": 0}, ValueError, r"heads=0 should be a whole number"),
    ("sparsevlm", {"keep": 5, "order": "x"}, ValueError, r"order='x' should be one of"),
    ("sparsevlm", {"keep": 5, "rank_scale": 0}, ValueError, r"rank_scale=0 should be in \(0"),
    ("sparsevlm", {"keep": 5, "rank_bias": float("nan")}, ValueError, r"rank_bias=nan should be"),
    ("sparsevlm", {"keep": 5, "positions": "x"}, ValueError, r"positions='x' should be one of"),
    ("sparsevlm", {"keep": 5, "recylce": 0}, ValueError, r"Did you mean 'recycle'"),
]


@pytest.mark.parametrize(("method", "options", "error", "pattern"), ERRORS)
def test_bad_options(
    method: str, options: dict[str, Any], error: type[Exception], pattern: str
) -> None:
    model = llava()
    with pytest.raises(error, match=f"(?s){pattern}"):
        tokprune.patch(model, method, **options)
    assert not tokprune.is_patched(model)
