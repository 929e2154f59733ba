"""ToDRE, DivPrune, TransPrune and FastV: what is special about each of them."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from golden_checks.models import Watched
from tiny import BUILDERS, IMAGE_TOKEN, llava, llava_next, make_inputs, single
from torch import Tensor

import tokprune
from tokprune.engine.contracts import (
    Attention,
    ImageTokens,
    ModelFacts,
    Reduction,
    SequenceView,
    TowerInput,
)
from tokprune.engine.encoder import initial_tokens, reduce_tokens
from tokprune.engine.scoring_layer import LayerAhead
from tokprune.families import family_of
from tokprune.methods import DivPrune, FastV, ToDRE, TransPrune
from tokprune.operators.diversity import divprune, farthest_pivot, max_sum
from tokprune.operators.transition import transition_weight
from tokprune.testing.checks.declaration import PUBLISHED

TINY = {"prune_before": (3, 4, 6), "transition_layers": (2, 3, 4, 5)}


def facts_of(model: Any) -> ModelFacts:
    family = family_of(model)
    return family.facts(model, family.parts(model))


def large_facts(family: str) -> ModelFacts:
    """LLaVA-1.5-7B or LLaVA-NeXT-7B."""
    return PUBLISHED[family]


def image_tokens(tile: list[int], seed: int = 0, width: int = 8, **changes: Any) -> ImageTokens:
    """An image whose tokens lie on the given tiles (−1: a newline token)."""
    n = len(tile)
    tiles = torch.tensor(tile)
    options: dict[str, Any] = {
        "features": torch.randn(n, width, generator=torch.Generator().manual_seed(seed)),
        "tile": tiles,
        "row": torch.where(tiles < 0, -1, torch.arange(n)),
        "col": torch.where(tiles < 0, -1, 0),
        "column": torch.arange(n),
        "newline": tiles < 0,
        "patches": sum(t >= 0 for t in tile),
        "tiles": max(tile) + 1,
        "grid": (n, 1),
        "original": n,
        **changes,
    }
    return ImageTokens(**options)


def prompt_stage(method: Any, facts: ModelFacts | None = None) -> Any:
    return method.plan(facts or large_facts("llava-next")).prompt[0]


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


@pytest.fixture(scope="module")
def tiled() -> Any:
    return llava_next()


# ------------------------------------------------------------------------------- options

ERRORS: list[tuple[str, Any, str]] = [
    ("todre", {"keep": 10, "select": "maxsum"}, r"select='maxsum' should be one of 'max_sum'"),
    ("todre", {"keep": 10, "pivot": "best"}, r"pivot='best' should be one of 'cls'"),
    ("todre", {"keep": 10, "tau": 1.5}, r"tau=1.5 should be in \[0, 1\]"),
    ("todre", {"keep": 10, "tau": float("nan")}, r"tau=nan should be in"),
    ("todre", {"keep": 10, "prune_before": 9}, r"prune_before=9 should lie between 1 and 8"),
    ("todre", {"keep": 10, "prune_before": 0}, r"prune_before=0 should be .* from 1 on"),
    ("todre", {"keep": 10, "prune_before": (4, 9)}, r"prune_before=\(4, 9\) should lie between"),
    ("todre", {"keep": 10, "prune_before": ()}, r"prune_before=\(\) should be a layer number"),
    ("todre", {"keep": 10, "prune_before": 3.5}, r"prune_before=3.5 should be a layer number"),
    ("todre", {"keep": None, "stage2": False}, r"keep=None with stage2=False does nothing"),
    ("todre", {"keep": 10, "positions": "short"}, r"positions='short' should be one of"),
    ("todre", {"keep": 37}, r"keep=37 is larger than the 36"),
    ("todre", {}, r"'keep' is required by todre"),
    ("divprune", {"keep": 0.0}, r"keep=0.0 should be a fraction"),
    ("divprune", {"keep": 37}, r"keep=37 is larger than the 36"),
    ("divprune", {"keep": 9, "order": "raster"}, r"order='raster' should be one of"),
    ("transprune", {}, r"prune_before=\(7, 9, 12\) should lie between 1 and 7: .* 8 decoder"),
    ("transprune", {"prune_before": (3, 4, 8)}, r"prune_before=\(3, 4, 8\) should lie between 1"),
    ("transprune", {**TINY, "prune_before": (4, 3, 6)}, r"prune_before=.* ascending"),
    ("transprune", {**TINY, "prune_before": (0, 3, 6)}, r"prune_before=\(0, 3, 6\) should lie.* 1"),
    ("transprune", {**TINY, "prune_before": 3}, r"keep=.* one budget per layer of prune_before, 1"),
    ("transprune", {**TINY, "prune_before": ()}, r"prune_before=\(\) should be a layer number"),
    ("transprune", {**TINY, "transition_layers": (2, 8)}, r"transition_layers=.* 8 decoder"),
    ("transprune", {**TINY, "transition_layers": (2, 2)}, r"transition_layers=.* ascending"),
    ("transprune", {**TINY, "keep": (0.5, 0.2)}, r"keep=\(0.5, 0.2\) should hold one budget per"),
    ("transprune", {**TINY, "keep": (0.5, 0.6, 0.2)}, r"keep=.* should not rise"),
    ("transprune", {**TINY, "keep": (0.5, 1.2, 0.2)}, r"keep\[1\]=1.2 should be a fraction"),
    ("transprune", {**TINY, "keep": (0.5, 40, 2)}, r"keep=40 is larger than the 36"),
    ("transprune", {**TINY, "keep": 0}, r"keep=0 should be at least 1"),
    ("transprune", {"keep": 0.2, "prune_before": (3, 4)}, r"a sequence of 2 budgets"),
    ("transprune", {**TINY, "alpha": -0.1}, r"alpha=-0.1 should be in \[0, 1\]"),
    ("transprune", {**TINY, "direction": "cos"}, r"direction='cos' should be one of 'signed'"),
    ("transprune", {**TINY, "normalize": "image"}, r"normalize='image' should be one of"),
    (
        "transprune",
        {"prune_before": (3, 4, 6), "transition_layers": (3,), "alpha": 1},
        r"transition_layers=\(3,\) has no layer before the first of prune_before, 3",
    ),
]


@pytest.mark.parametrize(("method", "options", "pattern"), ERRORS)
def test_bad_options(model: Any, method: str, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        tokprune.patch(model, method, **options)
    assert not tokprune.is_patched(model)


def test_todre_layers_by_their_old_name() -> None:
    with pytest.warns(FutureWarning, match="option 'check_layers' of todre is called 'prune_befo"):
        made = tokprune.methods.make_method("todre", keep=9, check_layers=(3, 5))
    assert made == ToDRE(9, prune_before=(3, 5))


def test_only_a_random_pivot_draws() -> None:
    assert [ToDRE(9, pivot=pivot).stochastic for pivot in ("cls", "farthest", "random")] == [
        False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("cls", [ToDRE, DivPrune, TransPrune, FastV])
def test_presets_fit_the_models_they_were_published_for(cls: Any) -> None:
    assert cls.presets
    for preset in cls.presets:
        method = cls.preset(preset.model, preset.budget)
        plan = method.plan(large_facts(preset.model))
        assert plan.prompt or plan.decoder
        assert preset.source


def test_presets_are_the_published_settings() -> None:
    assert ToDRE.preset("llava-next", 288) == ToDRE(288)
    assert ToDRE.preset("llava-next", 720, tau=0.05) == ToDRE(720, tau=0.05)
    assert DivPrune.preset("llava-1.5", 0.098) == DivPrune(0.098)
    assert TransPrune.preset("llava-next", "high") == TransPrune()
    low = TransPrune.preset("llava-1.5", "low")
    assert [low.count(i, 576) for i in range(3)] == [360, 108, 36]
    assert "inferred" in next(p.source for p in TransPrune.presets if p.budget == "low")
    assert FastV.preset("llava-1.5", 128) == FastV(98, prune_before=2)
    with pytest.raises(ValueError, match=r"\('llava-next', 288\)"):
        ToDRE.preset("llava-1.5", 64)


KEEPS_ALL: dict[str, Any] = {
    "todre": ToDRE(1.0, tau=0.0),
    "todre-count": ToDRE(36, tau=0.0),
    "divprune": DivPrune(1.0, order="published"),
    "transprune": TransPrune((1.0, 1.0, 1.0), **TINY),
    "fastv": FastV(1.0),
}


@pytest.mark.parametrize("case", KEEPS_ALL)
def test_keeping_everything_changes_nothing(model: Any, case: str) -> None:
    inputs = make_inputs(model, [[4, "image", 6], [2, "image", 3]])
    with torch.no_grad():
        want = model(**inputs).logits
        with tokprune.compress(model, KEEPS_ALL[case]):
            got = model(**inputs).logits
    assert torch.equal(got, want)


# ------------------------------------------------------------------------------- ToDRE, stage 1


def test_pivot_comes_from_the_base_tile() -> None:
    """The best class attention of a crop, or of a newline token, does not count."""
    tile = [0, 0, 0, 0, 1, 1, -1, 1, 1, -1]
    score = torch.tensor([0.1, 0.2, 0.6, 0.3, 0.9, 0.8, 5.0, 0.7, 0.7, 9.0])
    image = image_tokens(tile, score=score)
    stage = prompt_stage(ToDRE(3))
    (order,) = stage.order([image])
    assert order[0] == 2
    patches = [i for i, t in enumerate(tile) if t >= 0]
    want = max_sum(image.features[patches], 3, torch.tensor(2))
    assert order.tolist() == [patches[i] for i in want]


@pytest.mark.parametrize("family", BUILDERS)
def test_pivot_is_the_argmax_of_the_towers_own_attention(family: str) -> None:
    """Against the attention maps that transformers returns for the last vision layer."""
    model = BUILDERS[family](attention="eager")
    inputs = make_inputs(model, [[4, "image", 6]], [(20, 40)])
    pixels = inputs["pixel_values"].flatten(0, -4)[:1]  # base tile
    with torch.no_grad():
        maps = model.model.vision_tower(pixels, output_attentions=True).attentions
        method = Watched(ToDRE(5))
        with tokprune.compress(model, method):
            model(**inputs)
    score = maps[-1][0, :, 0, 1:].mean(0)
    image = method.images[0]
    base = image.tile == 0
    torch.testing.assert_close(image.score[base], score)
    (order,) = method.plans[0].prompt[0].order(method.images)  # type: ignore[attr-defined]
    assert order[0] == base.nonzero().view(-1)[score.argmax()]


@pytest.mark.parametrize("select", ["max_sum", "k_center"])
def test_newline_tokens_are_never_chosen(select: Any) -> None:
    """Zero rows have cosine 0 with everything and would win at once in anisotropic features."""
    tile = [0, 0, 0, 1, 1, -1, 1, 1, -1, 1, 1, -1]
    features = torch.randn(12, 8, generator=torch.Generator().manual_seed(2)) * 0.1 + 1
    features[torch.tensor(tile) < 0] = 0
    image = image_tokens(tile, features=features)
    for k in range(1, 9):
        (selection,) = prompt_stage(ToDRE(k, select=select)).select([image])
        index = selection.index.tolist()
        assert index == sorted(set(index))
        assert len(index) == k
        assert not image.newline[selection.index].any()
    assert prompt_stage(ToDRE(9, select=select)).select([image]) == [None]
    (kept,) = prompt_stage(DivPrune(9)).select([image])
    assert image.newline[kept.index].any(), "newline tokens compete in DivPrune"


def test_newline_tokens_leave_the_prompt(tiled: Any) -> None:
    inputs = make_inputs(tiled, [[4, "image", 6]], [(20, 40)])
    with tokprune.compress(tiled, ToDRE(50, stage2=False)) as trace, torch.no_grad():
        tiled(**inputs)
    (image,) = trace.last.images
    assert image.entered.count == 50
    assert not image.entered.newline.any()
    assert image.columns.shape[0] > 50


def test_tower_without_class_token_falls_back_to_the_farthest_patch() -> None:
    model = llava(tower="siglip")
    method = Watched(ToDRE(5))
    with tokprune.compress(model, method), torch.no_grad():
        model(**make_inputs(model, [[4, "image", 6]]))
    assert not method.plans[0].encoder
    (order,) = method.plans[0].prompt[0].order(method.images)  # type: ignore[attr-defined]
    assert order[0] == farthest_pivot(method.images[0].features)


def test_encoder_is_tapped_for_the_class_pivot_only() -> None:
    facts = large_facts("llava-next")
    (observer,) = ToDRE(720).plan(facts).encoder
    assert observer.taps == {23}
    assert not observer.reduces
    for method in (ToDRE(720, pivot="center"), ToDRE(None), ToDRE(1.0)):
        assert not method.plan(facts).encoder


def test_random_pivot_follows_the_seed() -> None:
    image = image_tokens([0] * 30)

    def first(seed: int) -> int:
        return int(prompt_stage(ToDRE(4, pivot="random", seed=seed)).order([image])[0][0])

    assert first(1) == first(1)
    assert len({first(seed) for seed in range(8)}) > 3


def test_images_of_equal_and_other_sizes_are_selected_as_alone() -> None:
    images = [image_tokens([0] * n, seed=n, score=torch.rand(n)) for n in (20, 12, 20, 5)]
    stage = prompt_stage(ToDRE(7))
    together, alone = stage.select(images), [stage.select([image])[0] for image in images]
    assert together[3] is None
    assert alone[3] is None
    for a, b in zip(together[:3], alone[:3]):
        assert a.index.tolist() == b.index.tolist()


def test_class_attention_follows_rows_that_the_same_layer_loses() -> None:
    """Another method may drop tokens of the last vision layer after its attention."""
    facts = large_facts("llava-1.5")
    tower = TowerInput(facts.tower, (0, 0), torch.device("cpu"))
    tokens = initial_tokens(tower)
    rows = torch.tensor([[0, 577 - 1, 5, 9], [0, 7, 3, 300]])
    after = reduce_tokens(tokens, Reduction(rows))
    run = ToDRE(64).plan(facts).encoder[0].start(tower)
    run.score, run.tokens = torch.rand(2, 576), tokens  # type: ignore[attr-defined]
    score = run.score  # type: ignore[attr-defined]
    assert torch.equal(run.finish(after).score, score.gather(1, rows[:, 1:] - 1))
    assert run.finish(tokens).score is score


# ------------------------------------------------------------------------------- ToDRE, stage 2


def checks_of(method: Watched) -> list[Any]:
    return method.runs[-1].checks  # type: ignore[attr-defined]


def brute_force(attention: Tensor, visual: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """(α_tv, α_vt) of eq. 8 from a full map [B, H, L, L], padding left out."""
    tv, vt = [], []
    for a, v, r in zip(attention.mean(1), visual, real):
        text = r & ~v & (v.cumsum(0) > 0)
        tv.append(a[text][:, v].sum() / text.sum())
        vt.append(a[v][:, text].sum() / v.sum())
    return torch.stack(tv), torch.stack(vt)


@pytest.mark.parametrize("family", BUILDERS)
def test_ratios_equal_those_of_the_whole_attention_map(family: str) -> None:
    """Left padding, several images with text between them, text-only and image-last rows."""
    model = BUILDERS[family](attention="eager")
    prompts = [[4, "image", 2, "image", 6], [9], [3, "image", 5], [2, "image"], [1, "image", 9]]
    inputs = make_inputs(model, prompts, [(20, 40), (40, 20), (30, 30), (24, 72), (20, 40)])
    method = Watched(ToDRE(None, tau=0.0, prune_before=(3, 8)))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        maps = model(**inputs, position_ids=positions, output_attentions=True).attentions
        with tokprune.compress(model, method):
            model(**inputs, position_ids=positions)
    visual = inputs["input_ids"] == IMAGE_TOKEN
    real = inputs["attention_mask"] != 0
    assert [c.layer for c in checks_of(method)] == [3, 8]
    for check in checks_of(method):
        tv, vt = brute_force(maps[check.layer - 1], visual, real)
        assert tv.isnan().tolist() == [False, True, False, True, False]
        torch.testing.assert_close(check.alpha_tv, tv, equal_nan=True)
        torch.testing.assert_close(check.alpha_vt, vt, equal_nan=True)
        assert vt[0] > 0
        assert not check.drop.any()


def test_each_sample_decides_for_itself(model: Any) -> None:
    prompts = [[4, "image", 6], [7, "image", 9], [2, "image", 3], [5, "image", 12]]
    inputs = make_inputs(model, prompts)
    look = Watched(ToDRE(10, tau=0.0, prune_before=5))
    with tokprune.compress(model, look), torch.no_grad():
        model(**inputs)
    alpha = checks_of(look)[0].alpha_tv
    tau = alpha.sort().values[1:3].mean().item()
    with tokprune.compress(model, ToDRE(10, tau=tau, prune_before=5)) as trace, torch.no_grad():
        model(**inputs)
    want = [[0] if a < tau else [10] for a in alpha]
    assert sorted(want) == [[0], [0], [10], [10]]
    assert [layer.counts for layer in trace.last.layers] == [[[10]] * 4] * 5 + [want] * 3
    ends = [layer.position.amax(1).tolist() for layer in trace.last.layers[4:6]]
    assert ends[0] == ends[1], "what is left keeps its positions"


def test_first_layer_that_fires_drops_and_later_ones_are_skipped(model: Any) -> None:
    inputs = make_inputs(model, [[4, "image", 6], [7, "image", 9], [2, "image", 3]])
    look = Watched(ToDRE(10, tau=0.0, prune_before=(2, 3, 5, 6)))
    with tokprune.compress(model, look), torch.no_grad():
        model(**inputs)
    alpha = torch.stack([c.alpha_tv for c in checks_of(look)])  # [layers, B]
    tau = float(alpha.min(0).values.sort().values[1:].mean())
    method = Watched(ToDRE(10, tau=tau, prune_before=(2, 3, 5, 6)))
    with tokprune.compress(model, method) as trace, torch.no_grad():
        model(**inputs)
    dropped = [False] * 3
    for check in checks_of(method):
        for b in range(3):
            if dropped[b]:
                assert check.alpha_vt[b].isnan(), "nothing is left to compare"
                assert not check.drop[b]
            dropped[b] |= bool(check.drop[b])
        assert trace.last.layers[check.layer].counts == [[0] if d else [10] for d in dropped]
    assert True in dropped
    assert False in dropped


def test_once_all_samples_have_dropped_no_layer_is_scored(model: Any) -> None:
    method = Watched(ToDRE(10, tau=1.0, prune_before=(2, 5, 7)))
    with tokprune.compress(model, method) as trace, torch.no_grad():
        model(**make_inputs(model, [[4, "image", 6], [7, "image", 9]]))
    assert [c.layer for c in checks_of(method)] == [2]
    assert trace.last.layers[2].counts == [[0], [0]]


def test_default_check_layer_and_the_last_layer(model: Any) -> None:
    depths = {24: 21, 28: 24, 32: 28, 36: 31, 40: 35, 8: 7, 1: 1}
    for depth, layer in depths.items():
        facts = dataclasses.replace(large_facts("llava-1.5"), decoder_layers=depth)
        (stage,) = ToDRE(64).plan(facts).decoder
        assert (stage.taps, stage.prune_before) == ({layer - 1}, {layer} - {depth})
    method = Watched(ToDRE(10, tau=1.0, prune_before=8))
    with tokprune.compress(model, method) as trace, torch.no_grad():
        model(**make_inputs(model, [[4, "image", 6]]))
    assert checks_of(method)[0].drop.tolist() == [True]
    assert trace.last.layers[-1].counts == [[10]]


def test_stage_two_reads_text_rows_only(model: Any, monkeypatch: Any) -> None:
    asked: list[int] = []
    rows = Attention.rows

    def counted(self: Attention, index: Tensor) -> Tensor:
        asked.append(index.shape[1])
        return rows(self, index)

    monkeypatch.setattr(Attention, "rows", counted)
    with tokprune.compress(model, ToDRE(None)), torch.no_grad():
        model(**make_inputs(model, [[4, "image", 6], [7, "image", 9]]))
    assert sum(asked) == 9


# ------------------------------------------------------------------------------- DivPrune


def test_fraction_rounds_half_to_even_of_all_tokens(tiled: Any) -> None:
    stage = prompt_stage
    for n, ratio, k in ((36, 0.125, 4), (25, 0.1, 2), (15, 0.1, 2), (576, 0.098, 56), (9, 0.01, 1)):
        (selection,) = stage(DivPrune(ratio)).select([image_tokens([0] * n)])
        assert len(selection.index) == k
    inputs = make_inputs(tiled, [[4, "image", 6]], [(20, 40)])
    with tokprune.compress(tiled, DivPrune(0.25)) as trace, torch.no_grad():
        tiled(**inputs)
    (image,) = trace.last.images
    assert image.entered.count == round(len(image.columns) * 0.25)


def test_published_order_is_selection_order(model: Any) -> None:
    inputs = make_inputs(model, [[4, "image", 6]])
    seen = Watched(DivPrune(9, order="published"))
    with tokprune.compress(model, seen) as trace, torch.no_grad():
        model(**inputs)
    order = divprune(seen.images[0].features, 9)
    assert order.tolist() != order.sort().values.tolist()
    first = trace.last.layers[0]
    assert first.column[0].tolist() == [0, 1, 2, 3, *(4 + order).tolist(), *range(40, 46)]
    assert first.position[0].tolist() == list(range(19))


def test_images_of_other_sizes_in_one_batch_are_selected_as_alone() -> None:
    images = [image_tokens([0] * n, seed=n) for n in (30, 17, 30)]
    stage = prompt_stage(DivPrune(0.3, order="published"))
    for image, selection in zip(images, stage.select(images)):
        assert selection.index.tolist() == stage.select([image])[0].index.tolist()


# ------------------------------------------------------------------------------- TransPrune


def schedule(method: TransPrune, n: int) -> list[int]:
    return [method.count(i, n) for i in range(len(method.steps))]


def test_published_schedule_and_its_arithmetic() -> None:
    assert schedule(TransPrune(), 576) == [504, 360, 72]
    assert schedule(TransPrune(), 2880) == [2520, 1800, 360]
    assert schedule(TransPrune(), 37) == [32, 23, 4]  # int(), not round()
    assert schedule(TransPrune((0.5, 30, 0)), 576) == [288, 30, 0]
    assert schedule(TransPrune((0.5, 30, 7)), 20) == [10, 20, 7]


def test_one_number_is_the_last_step_of_the_published_shape() -> None:
    for n in range(8, 600, 7):
        assert schedule(TransPrune(0.125), n) == schedule(TransPrune(), n)
        for keep in (0.01, 0.3, 0.77, 1.0, 1, 5, 64):
            first, second, last = schedule(TransPrune(keep), n)
            assert n >= first >= second >= last
            assert last == (min(keep, n) if isinstance(keep, int) else int(n * keep))
    assert schedule(TransPrune(72), 576) == [504, 360, 72]
    assert schedule(TransPrune(0.2, prune_before=(7,)), 100) == [20]


def test_counts_are_of_the_tokens_that_entered_the_decoder(model: Any) -> None:
    """Per image, relative to what a composed method left over."""
    inputs = make_inputs(model, [[4, "image", 2, "image", 6], [3, "image", 5]])
    both = tokprune.compose(DivPrune(20), TransPrune((0.5, 0.5, 0.1), **TINY))
    with tokprune.compress(model, both) as trace, torch.no_grad():
        model(**inputs)
    counts = [layer.counts for layer in trace.last.layers]
    assert counts[0] == counts[2] == [[20, 20], [20]]
    assert counts[3] == counts[5] == [[10, 10], [10]]
    assert counts[6] == counts[7] == [[2, 2], [2]]


def test_last_step_may_leave_nothing(model: Any) -> None:
    inputs = make_inputs(model, [[4, "image", 6], [7, "image", 9]])
    with tokprune.compress(model, TransPrune((0.5, 4, 0), **TINY)) as trace, torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert trace.last.layers[-1].counts == [[0], [0]]
    assert out.shape[1] > inputs["input_ids"].shape[1]


def test_transitions_alone_read_no_attention(model: Any, monkeypatch: Any) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("attention was read")

    monkeypatch.setattr(LayerAhead, "probabilities", refuse)
    monkeypatch.setattr(Attention, "rows", refuse)
    method = TransPrune(5, alpha=1, **TINY)
    (stage,) = method.plan(facts_of(model)).decoder
    assert not stage.taps
    assert stage.transition_layers == {2, 3, 4, 5}
    with tokprune.compress(model, method) as trace, torch.no_grad():
        model(**make_inputs(model, [[4, "image", 6]]))
    assert trace.last.layers[-1].counts == [[5]]
    with pytest.raises(AssertionError, match="attention was read"), torch.no_grad():
        with tokprune.compress(model, TransPrune(5, **TINY)):
            model(**make_inputs(model, [[4, "image", 6]]))


def test_attention_alone_watches_no_module(model: Any) -> None:
    (stage,) = TransPrune(5, alpha=0, **TINY).plan(facts_of(model)).decoder
    assert not stage.transition_layers
    late = TransPrune(5, prune_before=(3, 4, 5), transition_layers=(1, 4, 5, 6))
    (stage,) = late.plan(facts_of(model)).decoder
    assert stage.transition_layers == {1, 4}, "layers after the last drop are of no use"


def view_of(valid: Tensor) -> SequenceView:
    batch, length = valid.shape
    column = torch.arange(length).expand(batch, length).masked_fill(~valid, -1)
    return SequenceView(
        column=column, position=column, segment=torch.where(valid, 0, -1), after=~valid & False,
        counts=[[int(n)] for n in valid.sum(1)], entering=[[int(n)] for n in valid.sum(1)],
        text_after=[0] * batch, lengths=valid.sum(1).tolist(), slot=column,
        padded=not bool(valid.all()),
    )  # fmt: skip


def test_normalisation_over_the_batch_is_the_official_coupling() -> None:
    """w_batch = w_sample · Z_b / ΣZ, padding left out of every sum."""
    generator = torch.Generator().manual_seed(4)
    before, after = (torch.randn(3, 11, 8, generator=generator) for _ in range(2))
    valid = torch.ones(3, 11, dtype=torch.bool)
    valid[1, :4] = False
    weights = {}
    for normalize in ("sample", "batch"):
        method = TransPrune(0.5, normalize=normalize)
        (stage,) = method.plan(large_facts("llava-1.5")).decoder
        run: Any = stage.start()
        run.transition(6, "attention", before, after, view_of(valid))
        weights[normalize] = run.transitions[6]
    z = torch.exp(1 - torch.cosine_similarity(before, after, dim=-1)).masked_fill(~valid, 0).sum(1)
    torch.testing.assert_close(weights["batch"], weights["sample"] * (z / z.sum())[:, None])
    alone = transition_weight(before[1:2, 4:], after[1:2, 4:])
    torch.testing.assert_close(weights["sample"][1:2, 4:], alone)
    assert not weights["sample"][1, :4].any()


def test_transitions_of_both_modules_add_up_and_follow_drops(model: Any) -> None:
    """Kept values are those of the layer that made them: a drop gathers, never rescales."""
    watched = Watched(TransPrune((0.5, 0.3, 0.2), **TINY))
    with tokprune.compress(model, watched) as trace, torch.no_grad():
        model(**make_inputs(model, [[4, "image", 6]]))
    run: Any = watched.runs[-1]
    assert sorted(run.transitions) == [2, 3, 4, 5]
    width = trace.last.layers[-1].column.shape[1]
    assert all(weight.shape == (1, width) for weight in run.transitions.values())
    unpruned = Watched(TransPrune((1.0, 1.0, 1.0), **TINY))
    with tokprune.compress(model, unpruned), torch.no_grad():
        model(**make_inputs(model, [[4, "image", 6]]))
    full: Any = unpruned.runs[-1]
    survivors = trace.last.layers[-1].column
    torch.testing.assert_close(run.transitions[2], full.transitions[2].gather(1, survivors))


NO_TEXT = "no text after its last image"


def test_prompt_without_instruction_is_ranked_by_transitions_with_a_warning(model: Any) -> None:
    inputs = make_inputs(model, [[4, "image"], [3, "image", 5]])
    with torch.no_grad():
        with tokprune.compress(model, TransPrune(6, **TINY)) as trace:
            with pytest.warns(UserWarning, match=NO_TEXT) as caught:
                model(**inputs)
            mixed = trace.last.layers[-1].column[0]
        assert len([w for w in caught if NO_TEXT in str(w.message)]) == 1
        with tokprune.compress(model, TransPrune(6, alpha=1, **TINY)) as trace:
            model(**single(inputs, 0, slice(0, 1)))
    gap = inputs["input_ids"].shape[1] - 40
    assert (mixed[mixed >= 0] - gap).tolist() == trace.last.layers[-1].column[0].tolist()


def test_attention_alone_leaves_prompts_without_instruction(model: Any) -> None:
    inputs = make_inputs(model, [[4, "image"], [3, "image", 5]])
    with tokprune.compress(model, TransPrune(6, alpha=0, **TINY)) as trace, torch.no_grad():
        with pytest.warns(UserWarning, match="not pruned here"):
            model(**inputs)
        assert trace.last.layers[-1].counts == [[36], [6]]
        with pytest.warns(UserWarning, match="not pruned here"):
            model(**single(inputs, 0, slice(0, 1)))
        assert trace.last.layers[-1].counts == [[36]]


def test_no_warning_where_text_follows(model: Any) -> None:
    """Rows without an image need no instruction."""
    inputs = make_inputs(model, [[4, "image", 6], [5]])
    with tokprune.compress(model, TransPrune(6, **TINY)), torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)


# ------------------------------------------------------------------------------- FastV


def test_text_rows_fall_back_to_the_last_row(model: Any) -> None:
    """A prompt that ends in its image is ranked by its last token, alone and in a batch."""
    inputs = make_inputs(model, [[4, "image"], [3, "image", 5]])
    alone = single(inputs, 0, slice(0, 1))
    kept = {}
    with torch.no_grad():
        for rows in ("last", "text"):
            with tokprune.compress(model, FastV(6, rows=rows)) as trace:
                model(**alone)
                kept[rows] = trace.last.layers[-1].column[0].tolist()
                model(**inputs)
                batch = trace.last.layers[-1].column[0]
            gap = inputs["input_ids"].shape[1] - alone["input_ids"].shape[1]
            assert (batch[batch >= 0] - gap).tolist() == kept[rows]
    assert kept["text"] == kept["last"]


@pytest.mark.parametrize("rows", ["last", "text"])
def test_fastv_ranks_by_the_whole_attention_map(rows: Any) -> None:
    model = llava(attention="eager")
    inputs = make_inputs(model, [[4, "image", 6]])
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
        with tokprune.compress(model, FastV(6, prune_before=3, rows=rows)) as trace:
            model(**inputs)
    text = maps[2][0].mean(0)[[-1] if rows == "last" else slice(40, None)].mean(0)
    best = text[4:40].topk(6).indices.sort().values + 4
    counts = [layer.counts for layer in trace.last.layers]
    assert counts == [[[36]]] * 3 + [[[6]]] * 5
    last = trace.last.layers[3]
    assert last.column[0].tolist() == [0, 1, 2, 3, *best.tolist(), *range(40, 46)]
    assert last.position[0].tolist() == last.column[0].tolist()
