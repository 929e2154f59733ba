"""FlowCut and MustDrop: budgets, coupling between images, settings, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference.flow import llm_select
from tiny import BUILDERS, PATCHES, llava, llava_next, make_inputs, single

import tokprune
from tokprune.engine.contracts import ModelFacts
from tokprune.families import family_of
from tokprune.methods.flowcut import FlowCut, TowerStage
from tokprune.methods.mustdrop import MustDrop
from tokprune.methods.scoring import ScorerRun
from tokprune.testing.checks.declaration import PUBLISHED
from tokprune.testing.oracle import (
    assert_same_logits,
    compressed_logits,
    continuation_tokens,
    oracle_logits,
)

PROMPTS = [[4, "image", 6], [7, "image", 9], [2, "image", 3]]
SIZES = [(20, 40), (40, 20), (30, 30)]
LLAVA, NEXT = PUBLISHED["llava-1.5"], PUBLISHED["llava-next"]


def facts_of(model: Any) -> ModelFacts:
    family = family_of(model)
    return family.facts(model, family.parts(model))


def tower_counts(last: Any) -> list[list[list[int]]]:
    """Patches alive after each cut, per image and tile."""
    return [
        [(slots >= 0).sum(1).tolist() for _, slots in record.history] for record in last.records
    ]


def patches_after_each_layer(record: Any, facts: ModelFacts) -> list[list[int]]:
    """Patches alive per tile after each encoder layer."""
    after = dict(record.history)
    now, counts = [facts.tower.patches] * record.layout.tiles, []
    for layer in range(facts.tower.encoder_layers):
        now = (after[layer] >= 0).sum(1).tolist() if layer in after else now
        counts.append(now)
    return counts


def logits_of(model: Any, inputs: Any, method: Any) -> tuple[torch.Tensor, Any]:
    continuation = continuation_tokens(len(inputs["input_ids"]), 3)
    with tokprune.compress(model, method) as trace:
        return compressed_logits(model, inputs, continuation), trace.last


def alone(model: Any, inputs: Any, method: Any) -> tuple[torch.Tensor, list[Any]]:
    """The rows of a batch, one by one, with the tokens that they get in the batch."""
    continuation = continuation_tokens(len(inputs["input_ids"]), 3)
    rows, traces = [], []
    for i in range(len(inputs["input_ids"])):
        with tokprune.compress(model, method) as trace:
            one = single(inputs, i, slice(i, i + 1))
            rows.append(compressed_logits(model, one, continuation[i : i + 1]))
        traces.append(trace.last)
    return torch.cat(rows), traces


# ------------------------------------------------------------------------------- flowcut


@pytest.mark.parametrize(
    ("layers", "feature_layer", "period", "cuts"),
    [
        (24, 22, 2, range(1, 22, 2)),
        (7, 5, 2, (0, 2, 4)),
        (8, 6, 2, (1, 3, 5)),
        (8, 7, 2, (0, 2, 4, 6)),
        (24, 22, 3, range(0, 22, 3)),
        (24, 15, 1, range(15)),
    ],
)
def test_flowcut_cuts_every_second_layer_up_to_the_last_but_one(
    layers: int, feature_layer: int, period: int, cuts: Any
) -> None:
    tower = replace(LLAVA.tower, encoder_layers=layers, feature_layer=feature_layer)
    facts = replace(LLAVA, tower=tower)
    (stage,) = FlowCut(64, period=period).plan(facts).encoder
    assert stage.between_layers == frozenset(cuts)
    assert stage.taps == frozenset(range(feature_layer))


@pytest.mark.parametrize(
    ("model", "budget", "facts", "per_tile"),
    [
        ("llava-1.5", 192, LLAVA, 192),
        ("llava-1.5", 128, LLAVA, 128),
        ("llava-1.5", 64, LLAVA, 64),
        ("llava-next", 640, NEXT, 320),
        ("llava-next", 320, NEXT, 160),
        ("llava-next", 160, NEXT, 80),
    ],
)
def test_flowcut_presets(model: str, budget: int, facts: ModelFacts, per_tile: int) -> None:
    plan = FlowCut.preset(model, budget).plan(facts)
    (stage,) = plan.encoder
    assert isinstance(stage, TowerStage)
    assert stage.patches == per_tile
    assert bool(plan.decoder) == facts.tower.tiled
    if facts.tower.tiled:
        assert plan.decoder[0].prune_before == {2}


@pytest.mark.parametrize(
    ("options", "facts", "per_tile"),
    [
        ({"keep": 0.25}, LLAVA, 144),
        ({"keep": 100, "decoder_cut": True}, LLAVA, 200),
        ({"keep": 100, "decoder_cut": True, "tower_keep": 0.5}, LLAVA, 288),
        ({"keep": 641, "decoder_cut": False}, NEXT, 128),
        ({"keep": 0.2}, NEXT, 288),
        ({"keep": 640, "tower_keep": 99}, NEXT, 99),
    ],
)
def test_flowcut_tower_budgets(options: Any, facts: ModelFacts, per_tile: int) -> None:
    assert FlowCut(**options).tower_patches(facts) == per_tile


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("keep", [5, 12])
def test_flowcut_hits_the_budget_exactly(family: str, tower: str, keep: int) -> None:
    model = BUILDERS[family](tower)
    inputs = make_inputs(model, PROMPTS, SIZES)
    with tokprune.compress(model, "flowcut", keep=keep) as trace, torch.no_grad():
        model(**inputs)
    last: Any = trace.last
    per_tile = keep // 2 if family == "llava_next" else keep
    assert all(set(tiles[-1]) == {per_tile} for tiles in tower_counts(last))
    for entering, final in zip(last.layers[0].counts, last.layers[-1].counts):
        assert final == [min(keep, entering[0])]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("family", BUILDERS)
def test_flowcut_images_drop_their_own_number(family: str, tower: str) -> None:
    """Counts differ between the images of a batch, not between the tiles of one, and neither
    counts nor logits depend on batch mates."""
    model = BUILDERS[family](tower, seed=3)
    inputs = make_inputs(model, PROMPTS, SIZES)
    got, last = logits_of(model, inputs, FlowCut(4, period=1))
    want, singles = alone(model, inputs, FlowCut(4, period=1))
    facts = facts_of(model)
    for record, one in zip(last.records, singles):
        counts = patches_after_each_layer(record, facts)
        assert counts == patches_after_each_layer(one.records[0], facts)
        assert all(len(set(tiles)) == 1 for tiles in counts)
    assert len({str([after[0] for after in image]) for image in tower_counts(last)}) > 1
    assert_same_logits(got, want)


def test_flowcut_batch_coupling_is_the_official_one() -> None:
    """With count_reduce="batch" all images drop as many as the one that drops most."""
    model = llava(seed=3)
    inputs = make_inputs(model, PROMPTS)
    _, own = logits_of(model, inputs, FlowCut(4, period=1))
    got, last = logits_of(model, inputs, FlowCut(4, period=1, count_reduce="batch"))
    want, _ = alone(model, inputs, FlowCut(4, period=1, count_reduce="batch"))
    counts = [[after[0] for after in image] for image in tower_counts(last)]
    assert counts[0] == counts[1] == counts[2]
    first = [image[0][0] for image in tower_counts(own)]
    assert counts[0][0] == min(first) < max(first)
    assert (got - want).abs().max() > 1e-3


def test_flowcut_with_a_given_entropy_follows_the_formula() -> None:
    model = llava(vision_layers=9)
    inputs = make_inputs(model, PROMPTS)
    with tokprune.compress(model, "flowcut", keep=5, entropy=0.7) as trace, torch.no_grad():
        model(**inputs)
    alive, want = PATCHES, []
    for remaining in (6, 4, 2):
        alive = max(5, alive - round((alive - 5) / math.sqrt(remaining) * (1 - 0.7**2)))
        want.append(alive)
    assert tower_counts(trace.last) == [[[n] for n in [*want, 5]]] * 3


def test_flowcut_counts_the_class_token_where_the_model_keeps_it() -> None:
    model = llava()
    model.config.vision_feature_select_strategy = "full"
    inputs = make_inputs(model, PROMPTS)
    got, last = logits_of(model, inputs, FlowCut(8))
    assert all(image[-1] == [7] for image in tower_counts(last))
    assert last.layers[0].counts == [[8]] * 3
    assert_same_logits(got, oracle_logits(model, inputs, last, continuation_tokens(3, 3)))


def test_flowcut_packs_crops_in_raster_order_of_the_picture() -> None:
    model = llava_next()
    inputs = make_inputs(model, PROMPTS[:1], [(24, 48)])
    with tokprune.compress(model, "flowcut", keep=20) as trace, torch.no_grad():
        model(**inputs)
    entered = trace.last.images[0].entered
    base = entered.tile == 0
    assert base.tolist() == [True] * 10 + [False] * 20
    cell = entered.row * 6 + entered.col
    assert cell[base].tolist() == sorted(cell[base].tolist())
    across = entered.row * 12 + (entered.tile - 1) * 6 + entered.col
    assert across[~base].tolist() == sorted(across[~base].tolist())
    assert not entered.newline.any()


def test_flowcut_ranks_each_image_of_a_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder cut of a padded batch against the operator, image by image."""
    seen: list[tuple[Any, Any]] = []
    attention = ScorerRun.attention

    def watched(self: Any, layer: int, call: Any, sequence: Any) -> None:
        seen.append((call, sequence))
        attention(self, layer, call, sequence)

    monkeypatch.setattr(ScorerRun, "attention", watched)
    model = llava_next()
    inputs = make_inputs(model, [[3, "image", 2, "image", 5], [4, "image", 6]], SIZES)
    with tokprune.compress(model, "flowcut", keep=13) as trace, torch.no_grad():
        model(**inputs)
    layers = trace.last.layers
    assert layers[-1].counts == [[13, 13], [13]]
    ((call, sequence),) = seen
    for b, images in enumerate(layers[-1].counts):
        last = int((sequence.column[b] >= 0).nonzero()[-1])
        for image in range(len(images)):
            block = (sequence.segment[b] == image).nonzero()[:, 0]
            start, n = int(block[0]), len(block)
            keep = llm_select(call.query[b], call.key[b], call.value[b], start, n, last, 13)
            kept = layers[-1].column[b][layers[-1].segment[b] == image]
            assert sequence.column[b][start + keep].tolist() == kept.tolist()


# ------------------------------------------------------------------------------- mustdrop

FILTER: dict[str, Any] = {"spatial": False, "prune_before": (2, 4, 5, 7)}


@pytest.mark.parametrize(
    ("keep", "want"),
    [(4, [12, 6, 4, 4]), (0.5, [22, 19, 18, 18]), ((30, 0.5, 7, 2), [30, 18, 7, 2])],
)
def test_mustdrop_budget_form_leaves_exactly_the_schedule(keep: Any, want: list[int]) -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6], [2, "image", 3, "image", 9]])
    with tokprune.compress(model, "mustdrop", keep=keep, **FILTER) as trace, torch.no_grad():
        model(**inputs)
    counts = [trace.last.layers[cut].counts for cut in FILTER["prune_before"]]
    assert counts == [[[n], [n, n]] for n in want]


def test_mustdrop_budget_form_protects_key_tokens_as_far_as_it_goes() -> None:
    from golden_checks.models import Watched

    model = llava()
    inputs = make_inputs(model, PROMPTS)
    for keep, kept in ((6, 4), (2, 2)):
        watched = Watched(MustDrop(keep=keep, key_rate=0.1, **FILTER))
        with tokprune.compress(model, watched), torch.no_grad():
            model(**inputs)
        last = watched.runs[0].filters[-1]  # type: ignore[attr-defined]
        assert last.keep.sum(1).tolist() == [keep] * 3
        assert (last.keep & last.sequence.tag).sum(1).tolist() == [kept] * 3


def test_mustdrop_keeps_the_key_set_whatever_the_thresholds() -> None:
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    with tokprune.compress(model, "mustdrop", gamma=9, alpha=9, **FILTER) as trace:
        with torch.no_grad():
            model(**inputs)
    assert trace.last.layers[-1].counts == [[math.ceil(0.08 * PATCHES)]] * 3
    with tokprune.compress(model, "mustdrop", gamma=9, alpha=9, key_rate=0, **FILTER) as trace:
        with torch.no_grad():
            model(**inputs)
    assert trace.last.layers[-1].counts == [[0]] * 3


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("family", BUILDERS)
def test_mustdrop_batch_equals_singles_with_ragged_merges(family: str, tower: str) -> None:
    model = BUILDERS[family](tower)
    inputs = make_inputs(model, PROMPTS, SIZES)
    method = MustDrop(threshold=0.14, window=(2, 2), gamma=0.04, alpha=0.05, prune_before=(2, 4, 5))
    got, last = logits_of(model, inputs, method)
    want, singles = alone(model, inputs, method)
    assert last.layers[0].counts == [one.layers[0].counts[0] for one in singles]
    if (family, tower) != ("llava_next", "clip"):  # tiles of an image merge together or not
        per_tile = [c[0] // r.layout.tiles for c, r in zip(last.layers[0].counts, last.records)]
        assert len(set(per_tile)) > 1, per_tile
    assert_same_logits(got, want)


def test_mustdrop_official_coupling_shares_the_least_number_of_windows() -> None:
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    options: dict[str, Any] = {"threshold": 0.25, "window": (2, 2)}
    with torch.no_grad():
        with tokprune.compress(model, "mustdrop", **options) as trace:
            model(**inputs)
        own = [counts[0] for counts in trace.last.layers[0].counts]
        with tokprune.compress(model, "mustdrop", share_r="batch", **options) as trace:
            model(**inputs)
        shared = [counts[0] for counts in trace.last.layers[0].counts]
    assert min(own) < max(own)
    assert shared == [max(own)] * 3


def test_mustdrop_key_set_without_class_token_is_attention_received() -> None:
    model = llava("siglip", attention="eager")
    inputs = make_inputs(model, PROMPTS)
    tower = model.model.vision_tower
    with torch.no_grad():
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
        with tokprune.compress(model, "mustdrop", gamma=9, alpha=9, **FILTER) as trace:
            model(**inputs)
    want = maps.mean((1, 2)).topk(3, dim=-1).indices.sort(-1).values
    layer = trace.last.layers[-1]
    for b, image in enumerate(trace.last.images):
        kept = layer.column[b][layer.segment[b] >= 0] - image.columns[0]
        assert kept.tolist() == want[b].tolist()


def test_mustdrop_lightcompress_merges_features_of_untiled_models_only() -> None:
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    options = {"variant": "lightcompress", "retained": 13, "window": (3, 3)}
    with torch.no_grad():
        with tokprune.compress(model, "mustdrop", **options) as trace:
            model(**inputs)
        assert trace.last.layers[0].counts == [[37 - 8 * 3 - 1]] * 3
        assert [layer for layer, _ in trace.last.records[0].history] == [4]
        assert trace.last.layers[-1].counts == trace.last.layers[0].counts

        model = llava_next()
        inputs = make_inputs(model, PROMPTS[:1], [(24, 48)])
        native: list[torch.Tensor] = []
        short: list[torch.Tensor] = []
        for seen, method in ((native, None), (short, MustDrop(**options))):
            trace = None if method is None else tokprune.patch(model, method)
            first = model.model.language_model.layers[0]
            handle = first.register_forward_pre_hook(
                lambda m, a, k, seen=seen: seen.append(a[0] if a else k["hidden_states"]),
                with_kwargs=True,
            )
            model(**inputs)
            handle.remove()
        tokprune.unpatch(model)
    last = trace.last
    (columns,) = last.layers[0].column
    assert torch.equal(short[0][0], native[0][0, columns])  # unchanged vectors, some left out
    entered = last.images[0].entered
    assert entered.count == 3 * 12 + 6  # newline tokens stay
    assert not entered.newline[entered.row >= 0].any()
    assert int((entered.row < 0).sum()) == 6


@pytest.mark.parametrize("keep", [None, 5])
def test_mustdrop_without_text_after_the_image_keeps_all_and_warns(keep: int | None) -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6], [7, "image"]])
    method = MustDrop(keep=keep, gamma=0.9, alpha=0.9, **FILTER)
    with tokprune.compress(model, method) as trace, torch.no_grad():
        with pytest.warns(UserWarning, match=r"no text follows the image in batch row\(s\) \[1\]"):
            model(**inputs)
    assert trace.last.layers[-1].counts[0][0] < PATCHES
    assert trace.last.layers[-1].counts[1] == [PATCHES]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decode_positions", ["continue", "cache_length"])
def test_mustdrop_cache_policy_under_a_narrow_sliding_window(
    attention: str, decode_positions: str
) -> None:
    window = 16
    model = llava(decoder="mistral", sliding_window=window, attention=attention)
    inputs = make_inputs(model, PROMPTS)
    continuation = continuation_tokens(len(PROMPTS), 6)
    options = {**FILTER, "gamma": 0.03, "alpha": 0.03, "decode_positions": decode_positions}
    with tokprune.compress(model, "mustdrop", **options) as trace:
        got = compressed_logits(model, inputs, continuation)
    want = oracle_logits(model, inputs, trace.last, continuation, window=window)
    assert_same_logits(got, want)


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("decode_positions", ["continue", "cache_length"])
@pytest.mark.parametrize("first", [PROMPTS[:2], [[5], [9]]], ids=["image first", "text first"])
def test_mustdrop_cache_policy_leaves_earlier_turns_alone(
    spatial: bool, decode_positions: str, first: Any
) -> None:
    """A second turn of a padded batch, with images: what the first turn cached stays, and every
    row gets what it gets alone."""
    model = llava()
    method = MustDrop(
        spatial=spatial, threshold=0.14, window=(2, 2), gamma=0.03, alpha=0.03,
        prune_before=(2, 4, 5), decode_positions=decode_positions,  # type: ignore[arg-type]
    )  # fmt: skip
    start = make_inputs(model, first)
    more = make_inputs(model, [[3, "image", 5], [6, "image", 9]], seed=7)
    images = sum("image" in p for p in first)

    def turns(rows: slice) -> torch.Tensor:
        pixels = {"pixel_values": start["pixel_values"][rows]} if images else {}
        ids, mask = start["input_ids"][rows], start["attention_mask"][rows]
        if rows != slice(0, 2):
            ids = ids[:, mask[0] != 0]
            mask = torch.ones_like(ids)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=position, **pixels)
        held = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
        ids, new = more["input_ids"][rows], more["attention_mask"][rows]
        if rows != slice(0, 2):
            ids = ids[:, new[0] != 0]
            new = torch.ones_like(ids)
        for i in range(4):
            mask = torch.cat([mask, new], dim=1)
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            pixels = {"pixel_values": more["pixel_values"][rows]} if i == 0 else {}
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=position,
                past_key_values=out.past_key_values, **pixels,
            )  # fmt: skip
            if i == 0 and rows == slice(0, 2):
                now = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
                last: Any = trace.last
                own = [max(layer.cached) for layer in last.layers]
                assert now == [a + b for a, b in zip(held, own)]
                assert own[1] < max(last.layers[1].lengths)
            ids = torch.full((len(ids), 1), 11 + i)
            new = torch.ones_like(ids)
        return out.logits[:, -1]

    with tokprune.compress(model, method) as trace, torch.no_grad():
        together = turns(slice(0, 2))
        apart = torch.cat([turns(slice(0, 1)), turns(slice(1, 2))])
    assert_same_logits(together, apart)


@pytest.mark.parametrize("preset", MustDrop.presets, ids=lambda p: str(p.budget))
def test_mustdrop_presets_fit_the_model(preset: Any) -> None:
    method = MustDrop.preset(preset.model, preset.budget)
    plan = method.plan(LLAVA)
    if method.variant == "lightcompress":
        assert plan.encoder[0].after_layers == {22}
        assert not plan.decoder
    else:
        assert plan.encoder[0].after_layers == {0}
        assert plan.encoder[0].taps == {23}
        assert plan.decoder[0].prune_before == {3, 7, 11, 15}


# ------------------------------------------------------------------------------- both


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("flowcut", {"keep": 1.0}),
        ("flowcut", {"keep": 36}),
        ("flowcut", {"keep": 1.0, "tower_keep": 1.0, "decoder_cut": True}),
        ("mustdrop", {"spatial": False}),
        ("mustdrop", {"spatial": False, "gamma": 0.0, "alpha": 0.5}),
        ("mustdrop", {"spatial": False, "keep": 1.0, "prune_before": (2, 4)}),
        ("mustdrop", {"spatial": False, "gamma": 1e-9, "alpha": 1e-9, "prune_before": (2, 4)}),
    ],
)
def test_settings_that_keep_everything_change_nothing(
    family: str, method: str, options: dict[str, Any]
) -> None:
    if family == "llava_next" and options.get("keep") == 36:
        options = {"keep": facts_of(llava_next()).max_visual_tokens}
    model = BUILDERS[family]()
    inputs = make_inputs(model, PROMPTS, SIZES)
    continuation = continuation_tokens(3, 3)
    want = compressed_logits(model, inputs, continuation)
    with tokprune.compress(model, method, **options):
        got = compressed_logits(model, inputs, continuation)
    assert torch.equal(got, want)


@pytest.mark.parametrize("retained", [37, None])
def test_mustdrop_that_merges_no_window_changes_nothing(retained: int | None) -> None:
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    continuation = continuation_tokens(3, 3)
    want = compressed_logits(model, inputs, continuation)
    with tokprune.compress(model, "mustdrop", retained=retained, threshold=1.0):
        assert torch.equal(compressed_logits(model, inputs, continuation), want)


# (method, options, exception, pattern)
ERRORS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("flowcut", {}, ValueError, r"'keep' is required by flowcut"),
    ("flowcut", {"keep": 37}, ValueError, r"keep=37 is larger than the 36"),
    ("flowcut", {"keep": 5, "tower_keep": 40}, ValueError, r"tower_keep=40 is larger than the 36"),
    ("flowcut", {"keep": 5, "tower_keep": 0}, ValueError, r"tower_keep=0 should be at least 1"),
    ("flowcut", {"keep": 5, "period": 0}, ValueError, r"period=0 should be .* at least 1"),
    ("flowcut", {"keep": 5, "ema": 1.5}, ValueError, r"ema=1.5 should be in \[0, 1\]"),
    ("flowcut", {"keep": 5, "entropy": 2}, ValueError, r"entropy=2 should be in \[0, 1\]"),
    ("flowcut", {"keep": 5, "semantic": "l2"}, ValueError, r"semantic='l2' should be one of"),
    ("flowcut", {"keep": 5, "value_norm": 2}, ValueError, r"value_norm=2 should be one of"),
    ("flowcut", {"keep": 5, "count_reduce": "x"}, ValueError, r"count_reduce='x' should be"),
    ("flowcut", {"keep": 5, "prune_before": 0}, ValueError, r"prune_before=0 should .* least 1"),
    (
        "flowcut",
        {"keep": 5, "prune_before": 8, "decoder_cut": True},
        ValueError,
        r"prune_before=8 should lie between 1 and 7",
    ),
    ("mustdrop", {"keep": 5}, ValueError, r"prune_before=\(3, 7, 11, 15\) should lie.* 1 and 7"),
    ("mustdrop", {"prune_before": (4, 2)}, ValueError, r"prune_before=\(4, 2\) .*ascending"),
    ("mustdrop", {"prune_before": ()}, ValueError, r"prune_before=\(\) should be a layer number"),
    ("mustdrop", {"keep": (5, 4)}, ValueError, r"keep=\(5, 4\) should hold one budget per"),
    (
        "mustdrop",
        {"keep": (5, 9), "prune_before": (2, 3)},
        ValueError,
        r"keep=\(5, 9\) should not rise",
    ),
    ("mustdrop", {"keep": 40, "prune_before": (2,)}, ValueError, r"keep=40 is larger than the"),
    ("mustdrop", {"gamma": -1}, ValueError, r"gamma=-1 should be in"),
    ("mustdrop", {"alpha": float("nan")}, ValueError, r"alpha=nan should be in"),
    ("mustdrop", {"window": 3}, ValueError, r"window=3 should be \(rows, columns\)"),
    ("mustdrop", {"window": (1, 1)}, ValueError, r"window=\(1, 1\) should hold at least two"),
    ("mustdrop", {"window": (4, 4)}, ValueError, r"window=\(4, 4\) should divide the grid of 6"),
    ("mustdrop", {"threshold": 1.1}, ValueError, r"threshold=1.1 should be in \[-1, 1\]"),
    ("mustdrop", {"retained": 0}, ValueError, r"retained=0 cannot be reached.*\[1, 37\]"),
    ("mustdrop", {"merge_after_layer": 5}, ValueError, r"merge_after_layer=5 should be in \[0, 4"),
    (
        "mustdrop",
        {"key_layer": 0, "keep": 5, "prune_before": (2,)},
        ValueError,
        r"key_layer=0 should be in \[1, 5\]",
    ),
    ("mustdrop", {"key_rate": 1.2}, ValueError, r"key_rate=1.2 should be in \[0, 1\]"),
    ("mustdrop", {"variant": "x"}, ValueError, r"variant='x' should be one of"),
    ("mustdrop", {"variant": "lightcompress", "keep": 4}, ValueError, r"keep should be None"),
    ("mustdrop", {"variant": "lightcompress", "spatial": False}, ValueError, r"would do nothing"),
]


RENAMED = [
    (FlowCut, {"prune_layer": 3}, {"prune_before": 4}),
    (MustDrop, {"pruning_layers": (2, 6)}, {"prune_before": (3, 7)}),
    (MustDrop, {"pruning_layers": [0]}, {"prune_before": (1,)}),
]


@pytest.mark.parametrize(("cls", "old", "now"), RENAMED)
def test_options_by_their_old_names(cls: Any, old: Any, now: Any) -> None:
    (name,) = old
    with pytest.warns(FutureWarning, match=f"option '{name}' of {cls.name} is called 'prune_bef"):
        made = tokprune.methods.make_method(cls.name, keep=0.5, **old)
    assert made == cls(keep=0.5, **now)


@pytest.mark.parametrize(
    ("depth", "flowcut", "mustdrop"),
    [
        (32, {}, {}),
        (24, {}, {}),
        (16, {}, (2, 4, 6, 8)),
        (6, {}, (1, 2, 3, 4)),
        (3, {"prune_before": 1}, (1, 2)),
        (2, {"prune_before": 1}, (1,)),
    ],
)
def test_layers_in_decoders_of_other_depths(depth: int, flowcut: Any, mustdrop: Any) -> None:
    assert FlowCut.options_for_depth(depth) == flowcut
    assert MustDrop.options_for_depth(depth) == ({"prune_before": mustdrop} if mustdrop else {})


@pytest.mark.parametrize(("method", "options", "error", "pattern"), ERRORS)
def test_bad_options(
    method: str, options: dict[str, Any], error: type[Exception], pattern: str
) -> None:
    model = llava()
    with pytest.raises(error, match=f"(?s){pattern}"):
        tokprune.patch(model, method, **options)
    assert not tokprune.is_patched(model)


@pytest.mark.parametrize("setting", [[-2, -1], -6, -7])
def test_feature_layers_that_do_not_fit(setting: Any) -> None:
    model = llava()
    model.config.vision_feature_layer = setting
    with pytest.raises(tokprune.UnsupportedModelError, match="vision_feature_layer"):
        tokprune.patch(model, "flowcut", keep=5)
    if setting != -6:
        with pytest.raises(tokprune.UnsupportedModelError, match="vision_feature_layer"):
            tokprune.patch(model, "mustdrop")


def test_flowcut_cuts_down_to_a_single_token() -> None:
    """A count of 1 is not the share 1.0, which keeps all."""
    model = llava()
    inputs = make_inputs(model, PROMPTS)
    with tokprune.compress(model, "flowcut", keep=1, decoder_cut=True) as trace, torch.no_grad():
        model(**inputs)
    assert trace.last.layers[0].counts == [[2]] * 3
    assert trace.last.layers[-1].counts == [[1]] * 3


def test_flowcut_needs_a_token_per_tile() -> None:
    with pytest.raises(ValueError, match=r"keep=1 leaves 0 of the tokens of each tile"):
        tokprune.patch(llava_next(), "flowcut", keep=1)
