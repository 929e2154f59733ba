"""Merging methods and trivial reducers: published counts, exact budgets, options, errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE_SIZE, PATCHES, llava, llava_next, make_inputs

import tokprune
from tokprune.engine.contracts import Attention, ModelFacts
from tokprune.families import family_of
from tokprune.methods import Grid, PiToMe, Pool, ToMe, VisionZip
from tokprune.methods.base import Method
from tokprune.methods.merging.schedule import Step, Steps, removable
from tokprune.methods.merging.stage import MergeStage
from tokprune.operators import attention_rows, grid_sample, share, tile_windows
from tokprune.testing.checks.declaration import PUBLISHED

LLAVA, NEXT = PUBLISHED["llava-1.5"], PUBLISHED["llava-next"]
RATIOS = (0.85, 0.875, 0.9, 0.925, 0.95, 0.975)


def stage_of(method: Method, facts: ModelFacts = LLAVA) -> MergeStage:
    stage = method.plan(facts).encoder[0]
    assert isinstance(stage, MergeStage)
    return stage


def steps_of(method: Method, facts: ModelFacts = LLAVA) -> Steps:
    """The steps that remove something, in order."""
    return tuple(stage_of(method, facts).steps.values())


def layer_counts(steps: Steps, tokens: int) -> list[int]:
    """Tokens, class token included, before the first step and after each."""
    return [tokens - sum(step.r for step in steps[:i]) for i in range(len(steps) + 1)]


def patches_left(method: Method, facts: ModelFacts = LLAVA) -> int:
    return layer_counts(steps_of(method, facts), facts.tower.patches + 1)[-1] - 1


# ------------------------------------------------------------------------------- schedules

#: patches that reach the LLaVA-1.5 projector, by ratio (specification of PiToMe, section 4; it
#: has no row of ToMe after odd layers: that one follows from the same rule)
PUBLISHED_COUNTS: list[tuple[type[Method], str, tuple[int, ...]]] = [
    (PiToMe, "v1", (99, 135, 183, 247, 331, 440)),
    (PiToMe, "head", (17, 30, 54, 101, 183, 330)),
    (ToMe, "pitome_baseline_head", (16, 29, 53, 100, 183, 329)),
    (ToMe, "pitome_baseline", (98, 134, 183, 246, 331, 440)),
]


@pytest.mark.parametrize(("cls", "variant", "counts"), PUBLISHED_COUNTS)
def test_published_patch_counts(cls: Any, variant: str, counts: tuple[int, ...]) -> None:
    assert tuple(patches_left(cls(ratio=r, variant=variant)) for r in RATIOS) == counts


def test_counts_of_every_layer_at_ratio_090() -> None:
    v1 = steps_of(PiToMe(ratio=0.9))
    assert [step.layer for step in v1] == list(range(1, 22, 2))
    assert layer_counts(v1, 577) == [577, 520, 468, 422, 380, 342, 308, 278, 251, 226, 204, 184]
    head = PiToMe(ratio=0.9, variant="head").schedule(577, True, 24, 22)
    assert layer_counts(head, 577) == [
        577, 520, 468, 422, 380, 342, 308, 278, 251, 226, 204, 184, 166, 150, 136, 123, 111, 100,
        91, 82, 74, 67, 61, 55,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "ratio", "count"),
    [
        ("v1", 0.9032, 192),
        ("v1", 0.8699, 128),
        ("v1", 0.8159, 64),
        ("head", 0.9517, 192),
        ("head", 0.9347, 128),
        ("head", 0.9051, 64),
    ],
)
def test_ratios_that_land_exactly(variant: Any, ratio: float, count: int) -> None:
    assert patches_left(PiToMe(ratio=ratio, variant=variant)) == count
    by_keep = steps_of(PiToMe(keep=count, variant=variant))
    by_ratio = steps_of(PiToMe(ratio=ratio, variant=variant))
    # several ratios land on one count: the searched one is the largest of them
    assert len(by_keep) == len(by_ratio)
    assert all(abs(a.r - b.r) <= 1 for a, b in zip(by_keep, by_ratio))


def test_lightcompress_port_keeps_208() -> None:
    assert patches_left(ToMe.preset("llava-1.5", 208)) == 208


@given(
    keep=st.integers(1, 400),
    layers=st.integers(2, 26),
    patches=st.integers(4, 400),
    cls=st.booleans(),
    variant=st.sampled_from(["v1", "head", "paper", "deit", "official", "pitome_baseline"]),
)
@settings(max_examples=300, deadline=None)
def test_keep_is_hit_exactly_or_refused(
    keep: int, layers: int, patches: int, cls: bool, variant: Any
) -> None:
    method: PiToMe | ToMe = (
        PiToMe(keep=keep, variant=variant)
        if variant in ("v1", "head", "paper", "deit")
        else ToMe(keep=keep, variant=variant)
    )
    keep = min(keep, patches - 1)
    tokens, last = patches + cls, layers - 1
    odd = variant in ("v1", "pitome_baseline")
    merging = [i for i in range(layers) if i % 2 or not odd]
    smallest = patches
    for _ in merging:
        smallest -= smallest // 2
    if keep < smallest:
        with pytest.raises(ValueError, match=f"keep should be at least {smallest}$"):
            method.schedule(tokens, cls, layers, last, keep + cls)
        return
    steps = method.schedule(tokens, cls, layers, last, keep + cls)
    counts = layer_counts(steps, tokens)
    assert counts[-1] == keep + cls
    assert [step.layer for step in steps] == merging
    assert all(0 <= step.r <= removable(n, cls) for step, n in zip(steps, counts))


@given(r=st.integers(0, 60), inflect=st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]))
def test_tome_never_merges_more_than_half(r: int, inflect: float) -> None:
    steps = ToMe(r=r, inflect=inflect).schedule(577, True, 24, 22)
    counts = layer_counts(steps, 577)
    assert all(step.r <= removable(n, True) for step, n in zip(steps, counts))
    if inflect == 0:
        assert [step.r for step in steps] == [
            min(r, removable(n, True)) for n in counts[: len(steps)]
        ]


def test_tome_schedules() -> None:
    def removed(**options: Any) -> list[int]:
        return [step.r for step in ToMe(**options).schedule(145, True, 8, 7)]

    assert removed(r=8) == [8] * 8
    assert removed(r=8, inflect=-1.0) == removed(r=(8, -1.0)) == [16, 13, 11, 9, 6, 4, 2, 0]
    assert removed(r=[3, 0, 5]) == [3, 0, 5, 0, 0, 0, 0, 0]
    assert removed(r=100) == [72, 36, 18, 9, 4, 2, 1, 1]


def test_margins_and_matchings() -> None:
    v1 = PiToMe(ratio=0.9).rules(24, 22)
    assert [s.layer for s in v1 if s.matching == "bsm"] == [1, 3, 5, 7, 9, 11]
    assert v1[-1] == Step(21, "protect", 0.9 - 0.9 * 21 / 24)
    head = PiToMe(ratio=0.9, variant="head").rules(24, 22)
    assert [s.layer for s in head if s.matching == "bsm"] == list(range(13))
    assert {s.matching for s in PiToMe(ratio=0.9, variant="paper").rules(24, 22)} == {"protect"}
    deit = PiToMe(ratio=0.9, variant="deit").rules(7, 6)
    assert [s.layer for s in deit if s.matching == "energy_bsm"] == [0, 1, 2, 3]
    assert deit[2].margin == pytest.approx(0.75 - 0.75 * 2 / 7)
    own = PiToMe(ratio=0.9, variant="paper", margin=(0.5, -0.1)).rules(10, 9)
    assert own[5].margin == pytest.approx(0.55)
    # a lower start leaves no layer to plain matching
    low = PiToMe(ratio=0.9, margin=(0.4, 0.4)).rules(24, 22)
    assert {s.matching for s in low} == {"protect"}


def test_variants_merge_where_they_say() -> None:
    v1 = stage_of(PiToMe(keep=192))
    assert v1.after_layers == frozenset(range(1, 22, 2))
    assert not v1.between_layers | v1.taps | v1.bias_layers
    head = stage_of(PiToMe(keep=192, variant="head"))
    assert head.after_layers == frozenset(range(23))
    paper = stage_of(PiToMe(keep=192, variant="paper"))
    assert paper.between_layers == paper.taps == frozenset(range(23))
    assert paper.bias_layers == frozenset(range(1, 23))
    tome = stage_of(ToMe(r=8, prop_attn=False))
    assert tome.between_layers == tome.taps == frozenset(range(23))
    assert not tome.after_layers | tome.bias_layers


# ------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("cls", [PiToMe, Pool, ToMe, VisionZip])
def test_every_preset_fits_its_model(cls: Any) -> None:
    assert cls.presets
    for preset in cls.presets:
        method = cls.preset(preset.model, preset.budget)
        plan = method.plan(LLAVA if preset.model == "llava-1.5" else NEXT)
        assert plan.encoder or plan.prompt or preset.budget in (576, 2880)
        assert preset.source


def test_visionzip_budgets() -> None:
    for preset in VisionZip.presets:
        method = VisionZip.preset(preset.model, preset.budget)
        facts = LLAVA if preset.model == "llava-1.5" else NEXT
        dominant, contextual = method.split(facts)
        assert (dominant + contextual) * facts.tower.max_tiles == preset.budget
        whole = VisionZip(keep=preset.budget, scope="image")
        assert whole.split(facts) == (dominant, contextual)


def test_pitome_preset_with_changes() -> None:
    assert PiToMe.preset("llava-1.5", "r=0.9") == PiToMe(ratio=0.9)
    assert PiToMe.preset("llava-1.5", 64, order="spatial") == PiToMe(ratio=0.8159, order="spatial")


# ------------------------------------------------------------------------------- on models


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        "llava": llava(),
        "llava_next": llava_next(),
        "siglip": llava(tower="siglip"),
    }


def counts_of(model: Any, method: Method | str, size: tuple[int, int] = (20, 40)) -> int:
    inputs = make_inputs(model, [[4, "image", 6]], [size])
    with tokprune.compress(model, method) as trace, torch.no_grad():
        logits = model(**inputs).logits
    assert trace.last is not None
    kept = trace.last.layers[-1].counts[0][0]
    assert logits.shape[1] == 10 + kept
    assert torch.isfinite(logits).all()
    return kept


@pytest.mark.parametrize("keep", [36, 35, 20, 11, 9, 0.5, 1.0])
@pytest.mark.parametrize(
    "method",
    [
        PiToMe(keep=1, variant="v1"),
        PiToMe(keep=1, variant="head"),
        PiToMe(keep=1, variant="paper"),
        PiToMe(keep=1, variant="deit", order="spatial"),
        ToMe(keep=1),
        ToMe(keep=1, inflect=-1.0),
        ToMe(keep=1, variant="pitome_baseline"),
        VisionZip(keep=1),
        VisionZip(keep=1, score="mean_received", order="spatial"),
    ],
    ids=repr,
)
def test_keep_counts_tokens_of_a_tile(models: Any, method: Any, keep: float | int) -> None:
    method = dataclasses.replace(method, keep=keep)
    want = keep if isinstance(keep, int) else int(keep * PATCHES)
    assert counts_of(models["llava"], method) == want
    assert counts_of(models["siglip"], method) == want
    if want < PATCHES:  # base and 1×2 crops; a full budget leaves the model's own packing alone
        assert counts_of(models["llava_next"], method) == 3 * want


@pytest.mark.parametrize(
    "method",
    [
        PiToMe(keep=PATCHES),
        PiToMe(ratio=1.0),
        ToMe(keep=1.0),
        ToMe(r=0),
        VisionZip(keep=1.0),
        Pool(keep=1.0),
        Pool(window=1, place="before"),
        Grid(keep=1.0),
    ],
    ids=repr,
)
def test_keeping_everything_changes_nothing(models: Any, method: Method) -> None:
    for name in ("llava", "siglip"):
        model = models[name]
        inputs = make_inputs(model, [[4, "image", 6]])
        with torch.no_grad():
            want = model(**inputs).logits
            with tokprune.compress(model, method):
                assert torch.equal(model(**inputs).logits, want)


def test_image_scope_shares_the_budget_between_the_most_tiles(models: Any) -> None:
    model = models["llava_next"]
    family = family_of(model)
    most = family.facts(model, family.parts(model)).tower.max_tiles
    method = PiToMe(keep=most * 9 + 3, variant="head", scope="image")
    assert counts_of(model, method, (20, 40)) == 3 * 9
    assert counts_of(model, method, (40, 40)) == 5 * 9
    with pytest.raises(ValueError, match=f"keep={most - 1} with scope='image'"):
        tokprune.patch(model, "pitome", keep=most - 1, scope="image")


@pytest.mark.parametrize("method", [PiToMe(keep=12), ToMe(keep=12), VisionZip(keep=12)], ids=repr)
def test_spatial_order_follows_the_prompt(models: Any, method: Any) -> None:
    model = models["llava"]
    inputs = make_inputs(model, [[4, "image", 6]])
    columns = {}
    for order in ("published", "spatial"):
        with (
            tokprune.compress(model, dataclasses.replace(method, order=order)) as trace,
            torch.no_grad(),
        ):
            model(**inputs)
        assert trace.last is not None
        columns[order] = trace.last.layers[0].column[0].tolist()
    assert columns["published"] != columns["spatial"]
    assert sorted(columns["published"]) == sorted(columns["spatial"])
    image = columns["spatial"][4:-6]
    # VisionZip's class token has no cell: it stands at the image's first column, and comes last
    cls = int(isinstance(method, VisionZip))
    assert image[: len(image) - cls] == sorted(image[: len(image) - cls])


def test_sizes_add_up_and_merging_a_constant_field_keeps_it(models: Any) -> None:
    """Mass is conserved: what 16 tokens stand for are all 37 rows."""
    from golden_checks.towers import run_tower, tower_facts

    model = models["llava"]
    facts = tower_facts(6, 6, 4)
    stage = ToMe(keep=15).plan(facts).encoder[0]
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    run = run_tower(model.model.vision_tower, pixels, [stage], facts)
    size: Any = run.tower.runs[0].size  # type: ignore[attr-defined]
    assert size.shape == (2, 16, 1)
    assert size.sum(1).flatten().tolist() == [37, 37]
    group = run.tower.tokens.group
    counted = torch.zeros(2, 16).scatter_add_(1, group, torch.ones(2, 36))
    assert torch.equal(counted[:, 1:], size[:, 1:, 0])
    assert counted[:, 0].tolist() == [0, 0]  # nothing joins the class token


def test_proportional_attention_matters(models: Any) -> None:
    model = models["llava"]
    inputs = make_inputs(model, [[4, "image", 6]])
    logits = []
    for prop_attn in (True, False):
        with tokprune.compress(model, "tome", r=5, prop_attn=prop_attn), torch.no_grad():
            logits.append(model(**inputs).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------- VisionZip


def test_visionzip_where_the_model_keeps_its_class_token() -> None:
    """Strategy "full": the class token is a feature already, so it needs no copy."""
    model = llava()
    plain = llava()
    model.config.vision_feature_select_strategy = "full"
    options = {"dominant": 7, "contextual": 3}
    inputs = make_inputs(model, [[4, "image", 6]])
    other = make_inputs(plain, [[4, "image", 6]])
    assert inputs["input_ids"].shape[1] == other["input_ids"].shape[1] + 1
    text = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10, 11, 12, 13, 14])
    for given_ in (inputs, other):
        given_["input_ids"][0, :4], given_["input_ids"][0, -6:] = text
        given_["pixel_values"] = inputs["pixel_values"]
    with torch.no_grad():
        with tokprune.compress(model, "visionzip", **options):
            full = model(**inputs).logits
        with tokprune.compress(plain, "visionzip", **options):
            default = plain(**other).logits
    assert full.shape[1] == 20
    torch.testing.assert_close(full, default)


def test_visionzip_without_contextual_tokens(models: Any) -> None:
    assert counts_of(models["llava"], VisionZip(dominant=5, contextual=0)) == 5
    assert counts_of(models["llava_next"], VisionZip(dominant=5, contextual=0)) == 15
    assert counts_of(models["llava"], VisionZip(dominant=1, contextual=30)) == 31


@pytest.mark.parametrize("width", [1, 5, 64])
def test_mean_received_streams_the_whole_map(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 17, width, generator=generator) for _ in range(2))
    attention = Attention(q, k, k, 8**-0.5, causal=False)
    assert attention.rows_at_once == width
    whole = attention_rows(q, k, 8**-0.5).sum(1)
    off = whole * (1 - torch.eye(17))
    torch.testing.assert_close(attention.received(True), off.sum(1) / 16 / 3)
    torch.testing.assert_close(attention.received(False), whole.mean(1) / 3)


# ------------------------------------------------------------------------------- grid, pool

SIZES = [
    (20, 40),
    (40, 20),
    (30, 30),
    (24, 72),
    (10, 70),
    (70, 10),
    (23, 71),
    (7, 96),
    (22, 55),
    (55, 22),
]


@pytest.mark.parametrize("size", SIZES)
def test_windows_are_the_cells_the_model_packs(models: Any, size: tuple[int, int]) -> None:
    model = models["llava_next"]
    family = family_of(model)
    parts = family.parts(model)
    facts = family.facts(model, parts)
    (layout,) = family.images(parts, facts, {"image_sizes": [size]})
    packed = {p for p in layout.packed.tolist() if p >= 0}
    windows = tile_windows(facts.tower.grid, layout.tile_grid, layout.size)
    cells = {
        tile * PATCHES + y * 6 + x
        for tile, (top, bottom, left, right) in enumerate(windows)
        for y in range(top, bottom)
        for x in range(left, right)
    }
    assert cells == packed


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", [1, 5, 17, 40, 0.3])
def test_grid_keeps_exactly_and_spreads(models: Any, size: tuple[int, int], keep: Any) -> None:
    model = models["llava_next"]
    inputs = make_inputs(model, [[4, "image", 6]], [size])
    with tokprune.compress(model, "grid", keep=keep) as trace, torch.no_grad():
        model(**inputs)
    assert trace.last is not None
    image = trace.last.images[0]
    family = family_of(model)
    facts = trace.last.facts
    (layout,) = family.images(family.parts(model), facts, {"image_sizes": [size]})
    patches = int((layout.packed >= 0).sum())
    want = keep if isinstance(keep, int) else int(keep * patches)
    entered = image.entered
    assert entered is not None
    assert entered.count == min(want, patches)
    assert not entered.newline.any()
    column = entered.column.tolist()
    assert column == sorted(set(column))
    windows = tile_windows(facts.tower.grid, layout.tile_grid, layout.size)
    for tile, (top, bottom, left, right) in enumerate(windows):
        here = int((entered.tile == tile).sum())
        fair = want * (bottom - top) * (right - left) / patches
        assert abs(here - fair) < 1


def test_grid_on_one_tile_is_grid_sample(models: Any) -> None:
    model = models["llava"]
    inputs = make_inputs(model, [[4, "image", 6]])
    with tokprune.compress(model, "grid", keep=9) as trace, torch.no_grad():
        model(**inputs)
    assert trace.last is not None
    entered = trace.last.images[0].entered
    assert entered is not None
    assert (entered.row * 6 + entered.col).tolist() == grid_sample(6, 6, 9).tolist()
    # keep = (6/2)² are the centres of all 2×2 windows
    assert entered.row.unique().tolist() == entered.col.unique().tolist() == [1, 3, 5]


@given(st.data())
def test_share_adds_up_and_is_fair(data: Any) -> None:
    sizes = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    total = data.draw(st.integers(0, sum(sizes)))
    shares = share(total, sizes)
    assert sum(shares) == total
    for own, size in zip(shares, sizes):
        assert 0 <= own <= size
        assert abs(own * sum(sizes) - total * size) < max(1, sum(sizes))


def test_pool_words(models: Any) -> None:
    assert [Pool(keep=n).window_of(LLAVA) for n in (576, 144, 64, 36, 16, 9, 4, 1)] == [
        1, 2, 3, 4, 6, 8, 12, 24,
    ]  # fmt: skip
    assert Pool(keep=0.25).window_of(LLAVA) == 2
    assert Pool(keep=1 / 9).window_of(LLAVA) == 3
    assert counts_of(models["llava"], Pool(keep=9)) == 9
    assert counts_of(models["llava"], Pool(window=3, place="before")) == 4
    # base 9, crops 3×6 pooled cells for a 20×40 image: no padding, 3 newlines
    assert counts_of(models["llava_next"], Pool(keep=9)) == 9 + 3 * 6 + 3


def test_pool_keeps_original_positions_of_centres(models: Any) -> None:
    model = models["llava"]
    inputs = make_inputs(model, [[4, "image", 6]])
    with tokprune.compress(model, "pool", window=3, positions="preserve") as trace:
        with torch.no_grad():
            model(**inputs)
    assert trace.last is not None
    position = trace.last.layers[0].position[0].tolist()
    centres = [4 + y * 6 + x for y in (1, 4) for x in (1, 4)]
    assert position == [0, 1, 2, 3, *centres, *range(40, 46)]


# ------------------------------------------------------------------------------- errors

ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("pitome", {}, r"exactly one of keep and ratio; got none"),
    ("pitome", {"keep": 10, "ratio": 0.9}, r"exactly one of keep and ratio; got keep=10, ratio"),
    ("pitome", {"ratio": 0.4}, r"ratio=0.4 should be in \[0.5, 1\]"),
    ("pitome", {"ratio": 1.1}, r"ratio=1.1 should be in \[0.5, 1\]"),
    ("pitome", {"keep": 10, "variant": "v2"}, r"variant='v2' should be one of 'v1', 'head'"),
    ("pitome", {"keep": 10, "energy": "relu"}, r"energy='relu' should be one of"),
    ("pitome", {"keep": 10, "margin": 0.9}, r"margin=0.9 should be a pair \(start, slope\)"),
    ("pitome", {"keep": 10, "alpha": -1.0}, r"alpha=-1.0 should be in"),
    ("pitome", {"keep": 10, "split": "odd"}, r"split='odd' should be one of"),
    ("pitome", {"keep": 10, "order": "raster"}, r"order='raster' should be one of"),
    ("pitome", {"keep": 10, "scope": "batch"}, r"scope='batch' should be one of"),
    ("pitome", {"keep": 37}, r"keep=37 is larger than the 36 visual tokens"),
    ("pitome", {"keep": 8}, r"keep=8 tokens of 36 cannot be reached: 2 .* at least 9$"),
    (
        "pitome",
        {"keep": 20, "variant": "paper", "energy": "gauss", "margin": (1.2, 0.1)},
        r"margin=\(1.2, 0.1\) gives 1.2 in layer 0; .* below 1",
    ),
    ("tome", {}, r"exactly one of r and keep and ratio"),
    ("tome", {"r": -1}, r"r=-1 should be a count"),
    ("tome", {"r": "8"}, r"r='8' should be a count"),
    ("tome", {"r": (8, 2.0)}, r"r\[1\] \(inflect\)=2.0 should be in"),
    ("tome", {"r": [1, 2, 3, 4, 5, 6, 7]}, r"r lists 7 layers; the vision tower has 6"),
    ("tome", {"r": [4, 4], "inflect": 0.5}, r"inflect=0.5 bends a single r"),
    ("tome", {"ratio": 0.9}, r"ratio=0.9 drives the baseline variants"),
    ("tome", {"keep": 1}, r"keep=1 tokens of 36 cannot be reached: 5 .* at least 2$"),
    ("visionzip", {}, r"exactly one of keep and dominant"),
    ("visionzip", {"dominant": 5}, r"dominant=5 and contextual=None should be given together"),
    ("visionzip", {"keep": 5, "contextual": 5}, r"should be given together"),
    (
        "visionzip",
        {"dominant": 0, "contextual": 2},
        r"dominant=0 should be a whole .* at least 1",
    ),
    ("visionzip", {"dominant": 30, "contextual": 8}, r"are more than the 37 tokens of a tile"),
    ("visionzip", {"keep": 10, "score": "sum"}, r"score='sum' should be one of"),
    ("grid", {"keep": 37}, r"keep=37 is larger than the 36"),
    ("grid", {}, r"'keep' is required by grid"),
    ("pool", {}, r"exactly one of keep and window"),
    ("pool", {"keep": 10}, r"keep=10 .* should be one of 36, 9, 4, 1$"),
    ("pool", {"keep": 0.3}, r"keep=0.3 .* should be one of 36, 9, 4, 1$"),
    ("pool", {"window": 4}, r"window=4 does not divide the 6×6 grid .* 1, 2, 3, 6$"),
    ("pool", {"window": 0}, r"window=0 should be a whole number"),
    ("pool", {"keep": 9, "place": "inside"}, r"place='inside' should be one of"),
]


@pytest.mark.parametrize(
    ("method", "options", "pattern"), ERRORS, ids=[f"{m}-{o}" for m, o, _ in ERRORS]
)
def test_errors_name_the_option(
    models: Any, method: str, options: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ValueError, match=pattern):
        tokprune.patch(models["llava"], method, **options)
    assert not tokprune.is_patched(models["llava"])


def test_pool_before_the_projector_needs_a_model_without_tiles(models: Any) -> None:
    with pytest.raises(ValueError, match="place='before' is not possible on a model with tiles"):
        tokprune.patch(models["llava_next"], "pool", keep=9, place="before")


@pytest.mark.parametrize("method", ["pitome", "tome", "visionzip"])
def test_models_that_read_several_layers_are_refused(method: str) -> None:
    model = llava()
    model.config.vision_feature_layer = [-2, -3]
    with pytest.raises(tokprune.UnsupportedModelError, match="several encoder layers"):
        tokprune.patch(model, method, keep=12)


def test_towers_without_an_odd_layer_to_merge_in() -> None:
    facts = dataclasses.replace(LLAVA, tower=dataclasses.replace(LLAVA.tower, feature_layer=0))
    with pytest.raises(ValueError, match=r"variant='v1' merges after odd layers only"):
        PiToMe(ratio=0.9).plan(facts)
    with pytest.raises(ValueError, match=r"variant='pitome_baseline' merges after odd layers"):
        ToMe(keep=400, variant="pitome_baseline").plan(facts)
