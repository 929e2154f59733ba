"""OccamToken: operators against loops, the whole method against an unpatched model with a register
put in by plain hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.registers import attention_of, chosen_rows, inner_tower, register_in_tower
from tiny import llava, llava_next, make_inputs
from torch import Tensor

import tokprune
from tokprune.calibration import mean_tokens
from tokprune.errors import CompositionError, UnsupportedModelError
from tokprune.families import bind
from tokprune.methods import OccamToken
from tokprune.operators.occamtoken import (
    outlier_activation,
    shift,
    stage1,
    stage1_mutual,
    stage2,
)
from tokprune.testing import Case, tiny_family

NEURONS = ((0, 3), (1, 17), (1, 7))
PROMPT = [[4, "image", 6]]

# ------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [True, False])
def test_shift_equals_a_loop(cls: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 6).to(dtype)
    before, want = x.clone(), x.clone()
    for tile in want:
        for channel in (4, 1):
            tile[-1, channel] = tile[int(cls) : -1, channel].max()
            tile[int(cls) : -1, channel] = 0
    got = shift(x, (4, 1), class_token=cls)
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert torch.equal(shift(x, torch.tensor([1, 4]), class_token=cls), want)
    assert torch.equal(x, before), "the input has changed"


def test_shift_takes_negative_peaks_and_leaves_the_register_out() -> None:
    x = torch.tensor([[[9.0], [-3.0], [-2.0], [8.0]]])  # class token, two patches, register
    assert shift(x, [0]).flatten().tolist() == [9, 0, 0, -2]


def test_equal_attention_stays() -> None:
    row = torch.tensor([[[0.5, 0.1, 0.2, 0.05, 0.2]]])
    found = stage1(row, 1.0)
    assert found.keep.tolist() == [[False, True, False]]
    assert stage1(row, 0.5).keep.tolist() == [[True, True, False]]
    assert stage1(row, 9.0, least=2).keep.tolist() == [[True, True, False]]
    assert stage1(row.half(), 0.0).keep.all()


def test_of_equal_patches_the_first_stay_in_any_case() -> None:
    row = torch.tensor([[[0.1, 0.2, 0.2, 0.2, 0.3]]])
    assert stage1(row, 9.0, least=2).keep.tolist() == [[True, True, False]]


def test_mutual_is_the_mean_over_all_rows() -> None:
    maps = torch.rand(2, 3, 7, 7)
    found = stage1_mutual(maps, 0.9)
    for image in range(2):
        received = [sum(float(maps[image, h, q, k]) for h in range(3) for q in range(7)) / 21
                    for k in range(7)]  # fmt: skip
        assert found.scores[image].tolist() == pytest.approx(received[:-1], rel=1e-5)
        want = [x >= 0.9 * received[-1] for x in received[:-1]]
        assert found.keep[image].tolist() == want


@pytest.mark.parametrize("least", [0, 2])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.3, 50.0])
def test_stage2_measures_every_image_by_its_own_registers(lam: float, least: int) -> None:
    generator = torch.Generator().manual_seed(int(10 * lam))
    highest = torch.randint(1, 9, (3, 20), generator=generator) / 8  # with ties
    mean = highest * torch.rand(3, 20, generator=generator)
    segment = torch.randint(-1, 3, (3, 20), generator=generator)
    register = torch.rand(3, 20, generator=generator) < 0.15
    register |= (segment == 1) & (torch.arange(20) % 7 == 3)
    register &= segment != 2  # an image without any
    found = stage2(highest, mean, segment, register, lam, least)
    for b in range(3):
        for image in range(3):
            own = [j for j in range(20) if segment[b, j] == image]
            levels = [float(mean[b, j]) for j in own if register[b, j]]
            others = [j for j in own if not register[b, j]]
            best = sorted(others, key=lambda j: (-float(highest[b, j]), j))[:least]
            for j in own:
                stays = not levels or bool(register[b, j]) or j in best
                stays = stays or float(highest[b, j]) >= lam * sum(levels) / len(levels)
                assert bool(found.keep[b, j]) == stays, (b, image, j)
    assert not found.keep[segment < 0].any()


def test_operators_refuse_what_they_cannot_mean() -> None:
    x = torch.rand(1, 4, 5)
    with pytest.raises(ValueError, match="T ≥ 3"):
        shift(x[:, :2], [0])
    with pytest.raises(ValueError, match="from 0 to 4"):
        shift(x, [5])
    with pytest.raises(ValueError, match="least is 3"):
        stage1(x[..., :4], 1.0, least=3)
    with pytest.raises(ValueError, match="N \\+ 2"):
        stage1(x[..., :2], 1.0)
    with pytest.raises(ValueError, match="N \\+ 1"):
        stage1_mutual(x[None], 1.0)
    rows, none = torch.rand(1, 5), torch.zeros(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="least is -1"):
        stage2(rows, rows, torch.zeros(1, 5, dtype=torch.long), none, 1.0, least=-1)
    with pytest.raises(ValueError, match="register"):
        stage2(rows, rows, torch.zeros(1, 5, dtype=torch.long), none[:, :4], 1.0)
    with pytest.raises(ValueError, match="outlier"):
        outlier_activation(x, none)


# ------------------------------------------------------------------------- the whole method


def build(family: str) -> Any:
    if family == "siglip":
        return llava(tower="siglip", attention="eager")
    if family == "llava-1.5":
        return llava(attention="eager")
    return tiny_family(family).build(attention="eager")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: build(name) for name in ("llava-1.5", "siglip", "paligemma")}


def tower_scores(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [N] that patches get, and that of the register, in the layer that the model
    reads."""
    facts, seen = bind(model).facts.tower, []
    module = inner_tower(model).encoder.layers[facts.feature_layer].self_attn
    with register_in_tower(model, NEURONS, facts.has_cls), attention_of(module, seen):
        inner_tower(model)(pixels, output_attentions=True)
    rows = seen[0][0]
    row = rows.mean(0)[0, 1:] if facts.has_cls else rows.mean((0, 1))
    return row[:-1], row[-1]


def with_tokens(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The same prompt with so many tokens in place of its image's."""
    out = {"pixel_values": inputs["pixel_values"]}
    image = inputs["input_ids"][0] == bind(model).parts.image_token_id
    first, last = int(image.nonzero()[0]), int(image.nonzero()[-1])
    for name, value in inputs.items():
        if value.shape == inputs["input_ids"].shape:
            own = value[:, first : first + 1].expand(-1, tokens)
            out[name] = torch.cat([value[:, :first], own, value[:, last + 1 :]], dim=1)
    return out


@torch.no_grad()
@pytest.mark.parametrize("level", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("family", ["llava-1.5", "siglip", "paligemma"])
def test_equals_the_unpatched_model_with_a_register(models: Any, family: str, level: float) -> None:
    """Both stages; where nothing is dropped, the register takes a place beside the patches."""
    model = models[family]
    inputs = tiny_inputs(family, model)
    facts = bind(model).facts.tower
    scores, register = tower_scores(model, inputs["pixel_values"])
    lam = level * 0.9999 * float(scores.median() / register)
    keep = scores >= lam * register
    assert int(keep.sum()) == {0.0: 36, 1.0: 19, 1e6: 0}[level]
    rows = torch.cat([keep, torch.ones(1, dtype=torch.bool)])
    prompt, cut, seen = with_tokens(model, inputs, int(rows.sum())), 3, []
    decoder = model.model.language_model
    image = prompt["input_ids"][0] == bind(model).parts.image_token_id
    with (
        register_in_tower(model, NEURONS, facts.has_cls),
        chosen_rows(model, rows[None]),
        attention_of(decoder.layers[cut - 1].self_attn, seen),
    ):
        want = model(**prompt).logits
    options = {"lambda1": lam, "neurons": NEURONS, "prune_before": cut}
    with tokprune.compress(model, OccamToken(0.0, **options), validate=True) as trace:
        got = model(**inputs).logits
    assert [own.counts for own in trace.last.layers] == [[[int(rows.sum())]]] * len(decoder.layers)
    text = int(image.nonzero()[-1]) + 1
    assert torch.allclose(got[:, -1], want[:, -1], atol=2e-5 * float(want.abs().max()))
    # the second stage, by the map of the layer before the cut
    asked = seen[0][0].mean(0)[text:][:, image]
    highest, measure = asked.amax(0), asked.mean(0)[-1]
    second = float(highest.median() / measure) * 1.0001
    stays = highest >= second * measure
    stays[-1] = True
    with tokprune.compress(model, OccamToken(second, **options), validate=True) as trace:
        model(**inputs)
    kept = trace.last.layers
    assert [own.counts[0][0] for own in kept[:cut]] == [int(rows.sum())] * cut
    left = kept[cut].slot[0][kept[cut].segment[0] == 0]
    whole = kept[0].slot[0][kept[0].segment[0] == 0]
    assert torch.equal(left, whole[stays])


def tiny_inputs(family: str, model: Any) -> dict[str, Tensor]:
    if family == "paligemma":
        return Case(OccamToken(), tiny_family(family), model, PROMPT).inputs()
    return make_inputs(model, PROMPT)


def test_a_tile_has_a_register_of_its_own_and_newlines_go() -> None:
    model = llava_next()
    inputs = make_inputs(model, PROMPT, [(20, 40)])
    with torch.no_grad(), tokprune.compress(model, "occamtoken", lambda1=0, lambda2=0) as trace:
        model(**inputs)
    prefill = trace.last
    (image,) = prefill.images
    shown = int((image.record.layout.packed >= 0).sum())
    tiles = image.record.layout.tiles
    assert tiles == 3
    assert prefill.layers[0].counts == [[shown + tiles]]
    kinds = [token.kind for token in prompt_tokens(image)]
    assert kinds == ["patch"] * shown + ["added"] * tiles
    assert '"added"' in json.dumps(trace.to_dict())


def prompt_tokens(image: Any) -> Any:
    from tokprune.trace.provenance import prompt_tokens

    return prompt_tokens(image)


def test_without_a_question_the_second_stage_drops_nothing() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image"], [3, "image", 5]])
    options: dict[str, Any] = {"lambda1": 0, "neurons": NEURONS, "prune_before": 4}
    with torch.no_grad(), tokprune.compress(model, "occamtoken", lambda2=1e4, **options) as trace:
        model(**inputs)
    assert trace.last.layers[-1].counts == [[37], [1]]


def test_some_tokens_stay_in_any_case() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6], [3, "image", 5]])
    options: dict[str, Any] = {"lambda1": 1e5, "neurons": NEURONS, "prune_before": 4}
    with torch.no_grad():
        with tokprune.compress(model, "occamtoken", lambda2=1e5, **options) as trace:
            model(**inputs)
        assert trace.last.layers[-1].counts == [[1], [1]]  # the registers alone
        with tokprune.compress(model, "occamtoken", min_keep=5, lambda2=1e5, **options) as trace:
            model(**inputs)
        assert trace.last.layers[0].counts == trace.last.layers[-1].counts == [[6], [6]]


def test_a_fixed_budget_keeps_registers_and_the_highest() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 6], [3, "image"]])
    options: dict[str, Any] = {"lambda1": 0.0, "neurons": NEURONS, "prune_before": 4}
    kept = []
    for more in ({"keep": 8}, {"lambda2": 1e5, "min_keep": 7}, {"keep": 8 / 37}):
        with torch.no_grad(), tokprune.compress(model, "occamtoken", **options, **more) as trace:
            model(**inputs)
        last = trace.last.layers[-1]
        assert last.counts == [[8], [37]]  # nobody asks about the second
        kept.append(last.slot[0][last.segment[0] == 0].tolist())
    assert kept[0] == kept[1] == kept[2]


def test_calibrate_meets_a_mean_by_either_level() -> None:
    model = llava()
    batches = [make_inputs(model, [[4, "image", 6]] * 4, seed=seed) for seed in (1, 2)]
    start = OccamToken(neurons=NEURONS, prune_before=4)
    by_question = tokprune.calibrate(model, start, batches, 12, count="last", tolerance=0.05)
    assert by_question.lambda1 == start.lambda1
    assert mean_tokens(model, by_question, batches).last == pytest.approx(12, rel=0.05)
    alone = OccamToken(lambda2=0.0, neurons=NEURONS)
    by_image = tokprune.calibrate(model, alone, batches, 20, turn="lambda1", tolerance=0.05)
    assert mean_tokens(model, by_image, batches).mean == pytest.approx(20, rel=0.05)


def test_dropped_patches_do_not_join_a_register() -> None:
    """Where attention makes up for what is gone, patches alone stand for dropped ones."""
    model = llava()
    method = OccamToken(lambda1=1.0, lambda2=0.0, neurons=NEURONS, rectify="size")
    with torch.no_grad(), tokprune.compress(model, method, validate=True) as trace:
        model(**make_inputs(model, [[4, "image", 6]]))
    (record,) = trace.last.records
    sizes = record.stands_for
    assert len(sizes) == trace.last.layers[0].counts[0][0] < 37
    assert float(sizes[-1]) == 1
    assert float(sizes.sum()) == 37


def test_encoder_in_pieces_gives_the_same() -> None:
    model = llava()
    inputs = make_inputs(model, [[4, "image", 2, "image", 6], [3, "image", 5]])
    method = OccamToken(lambda1=1.2, neurons=NEURONS, prune_before=4)
    logits = []
    for pieces in (None, 1, 2):
        with torch.no_grad(), tokprune.compress(model, method, encode_at_once=pieces):
            logits.append(model(**inputs).logits[:, -1])
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert torch.allclose(logits[0], logits[2], atol=1e-5)


# --------------------------------------------------------------------- neurons, refusals


def test_neurons_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "neurons.json"
    path.write_text(json.dumps(NEURONS), encoding="utf-8")
    model, inputs = llava(), make_inputs(llava(), PROMPT)
    logits = []
    for neurons in (str(path), NEURONS):
        with (
            torch.no_grad(),
            tokprune.compress(model, OccamToken(lambda1=1.0, neurons=neurons, prune_before=4)),
        ):
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)
    path.write_text('{"layer": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"neurons\.json: value .*pairs"):
        OccamToken(neurons=str(path)).plan(bind(llava()).facts)


def test_bad_neurons_are_named() -> None:
    for bad in (((1,),), ((1, -2),), ((1, 2), (1, 2)), 5, ((1, 2.5),), [(1, 2)]):
        with pytest.raises(ValueError, match="neurons="):
            OccamToken(neurons=bad)  # type: ignore[arg-type]
    model = llava()
    with pytest.raises(ValueError, match=r"\(5, 2\).*0 to 4"):
        tokprune.patch(model, "occamtoken", neurons=((5, 2),), prune_before=4)
    beyond = OccamToken(neurons=((1, 48),), prune_before=4)
    with tokprune.compress(model, beyond), pytest.raises(ValueError, match="0 to 47"):
        model(**make_inputs(model, PROMPT))


def test_towers_without_a_place_for_a_register_are_refused() -> None:
    model = tiny_family("qwen2.5-vl").build()
    with pytest.raises(UnsupportedModelError, match="occamtoken works inside the vision encoder"):
        tokprune.patch(model, "occamtoken", prune_before=3)


def test_methods_that_read_the_tower_are_not_composed() -> None:
    model = llava()
    together = tokprune.compose(OccamToken(lambda2=0.0), tokprune.ToDRE(keep=9, stage2=False))
    with pytest.raises(CompositionError, match="ToDRE would read"):
        tokprune.patch(model, together)
    with (
        tokprune.compress(
            model, tokprune.compose(OccamToken(lambda2=0.0), tokprune.DivPrune(keep=9))
        ) as trace,
        torch.no_grad(),
    ):
        model(**make_inputs(model, PROMPT))
    assert trace.last.layers[0].counts == [[9]]
