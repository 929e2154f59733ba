"""DART, CDPruner and M3 in models: budgets, tiles, relevance, pivots, scales, errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from golden_checks.models import Watched
from test_merging_conformance import BATCHES, build, check, pooled_image
from tiny import BUILDERS, GRID, IMAGE_TOKEN, PATCHES, llava, llava_next, make_inputs, single
from torch import Tensor
from toy_video import video_family, video_inputs
from transformers import CLIPConfig, CLIPModel

import tokprune
from tokprune.engine.contracts import ImageTokens, ModelFacts
from tokprune.families import family_of
from tokprune.methods import DART, M3, CDPruner, ClipRelevance, Pool
from tokprune.operators.anyres import tile_windows
from tokprune.operators.cdpruner import minmax_relevance, text_similarity
from tokprune.operators.dpp import dpp_map
from tokprune.operators.pooling import share
from tokprune.testing.checks.declaration import PUBLISHED
from tokprune.testing.oracle import assert_same_logits, compressed_logits, continuation_tokens

PROMPTS = [[4, "image", 6], [7, "image", 9], [2, "image", 3]]
SIZES = [(20, 40), (40, 20), (30, 22)]


@pytest.fixture(scope="module")
def models() -> dict[Any, Any]:
    return {"llava": llava(), "llava_next": llava_next()}


def facts_of(model: Any) -> ModelFacts:
    family = family_of(model)
    return family.facts(model, family.parts(model))


def large_facts(tiles: int = 1) -> ModelFacts:
    """LLaVA-1.5-7B, or LLaVA-NeXT-7B with 5 tiles."""
    return PUBLISHED["llava-next" if tiles > 1 else "llava-1.5"]


def prefill(model: Any, inputs: Any, method: Any) -> Any:
    """The trace of one prefill, prompts numbered as ``generate`` does."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with tokprune.compress(model, method) as trace, torch.no_grad():
        model(**inputs, position_ids=positions)
    return trace.last


def kept(last: Any, number: int = 0) -> list[int]:
    return last.images[number].selection.index.tolist()  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------- CDPruner


def text_of(model: Any, inputs: Any, row: int) -> Tensor:
    """Embeddings of a prompt's text after its image."""
    ids = inputs["input_ids"][row]
    last = int((ids == IMAGE_TOKEN).nonzero().max())
    return model.get_input_embeddings()(ids[last + 1 :]).detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("relevance", ["text", "none"])
def test_cdpruner_selects_every_tile_by_itself(models: Any, relevance: Any) -> None:
    """Each tile's share of the budget goes to its own best set; newline tokens go."""
    model = models["llava_next"]
    inputs = make_inputs(model, PROMPTS, SIZES)
    method = Watched(CDPruner(14, relevance))
    last = prefill(model, inputs, method)
    for b, size in enumerate(SIZES):
        image = method.images[b]
        windows = tile_windows(image.grid, image.tile_grid, size)
        budgets = share(
            14, [(bottom - top) * (right - left) for top, bottom, left, right in windows]
        )
        patches = (~image.newline).nonzero().view(-1)
        r = None
        if relevance == "text":
            score = text_similarity(image.features, text_of(model, inputs, b))
            r = torch.zeros(image.count).scatter(0, patches, minmax_relevance(score[patches]))
        want: list[int] = []
        for tile, k in enumerate(budgets):
            rows = (image.tile == tile).nonzero().view(-1)
            if k:
                own = None if r is None else r[rows]
                want += rows[dpp_map(image.features[rows], k, own)].tolist()
        assert kept(last, b) == sorted(want)
        assert len(want) == 14
        assert not image.newline[kept(last, b)].any()


def test_cdpruner_scope_image_is_one_selection(models: Any) -> None:
    model = models["llava_next"]
    inputs = make_inputs(model, PROMPTS[:1], SIZES[:1])
    method = Watched(CDPruner(14, "none", scope="image"))
    last = prefill(model, inputs, method)
    image = method.images[0]
    patches = (~image.newline).nonzero().view(-1)
    want = patches[dpp_map(image.features[patches], 14)].sort().values.tolist()
    assert kept(last) == want
    assert want != kept(prefill(model, inputs, CDPruner(14, "none")))


def test_cdpruner_published_budgets_are_equal_per_tile() -> None:
    assert share(640, [576] * 5) == [128] * 5
    assert CDPruner.preset("llava-next", 640) == CDPruner(640)
    assert CDPruner.preset("llava-1.5", 64, relevance="text") == CDPruner(64, "text")
    CDPruner(640).plan(large_facts(5))


@pytest.mark.parametrize("family", BUILDERS)
def test_cdpruner_call_scope_couples_the_batch(models: Any, family: str) -> None:
    """Over the call, relevance depends on the other images; over the image it does not."""
    model = models[family]
    inputs = make_inputs(model, PROMPTS, SIZES)
    alone = [single(inputs, i, slice(i, i + 1)) for i in range(3)]
    for scope, same in (("image", True), ("call", False)):
        methods = [Watched(CDPruner(6, "text", relevance_scope=scope)) for _ in range(4)]  # type: ignore[arg-type]
        whole = prefill(model, inputs, methods[0])
        stage: Any = methods[0].plans[0].prompt[0]
        together = stage.relevance(methods[0].images)
        equal = []
        for i, one in enumerate(alone):
            last = prefill(model, one, methods[i + 1])
            (own,) = stage.relevance(methods[i + 1].images)
            equal.append(torch.allclose(own, together[i], atol=1e-4))
            if same:
                assert kept(last) == kept(whole, i)
        assert all(equal) == same
        if not same:
            counted = torch.cat([r[~m.newline] for r, m in zip(together, methods[0].images)])
            assert float(counted.max()) == pytest.approx(1, abs=1e-4)


def test_cdpruner_uses_all_text_where_none_follows_the_image(models: Any) -> None:
    model = models["llava"]
    inputs = make_inputs(model, [[5, "image"], [3, "image", 4]])
    method = Watched(CDPruner(6, "text"))
    prefill(model, inputs, method)
    pads = inputs["attention_mask"] == 0
    ids = inputs["input_ids"]
    embed = model.get_input_embeddings()
    before = embed(ids[0][(ids[0] != IMAGE_TOKEN) & ~pads[0]])
    texts = [image.text for image in method.images]
    assert texts[0] is not None and torch.equal(texts[0], before)  # noqa: PT018
    assert texts[1] is not None and torch.equal(texts[1], text_of(model, inputs, 1))  # noqa: PT018


def test_cdpruner_embeds_no_text_for_others(models: Any) -> None:
    method = Watched(CDPruner(6, "none"))
    prefill(models["llava"], make_inputs(models["llava"], PROMPTS), method)
    assert all(image.text is None for image in method.images)


def test_cdpruner_takes_a_relevance_of_ones_own(models: Any) -> None:
    model = models["llava"]
    inputs = make_inputs(model, PROMPTS)

    def lower_half(image: ImageTokens) -> Tensor:
        return (image.row >= GRID // 2).to(torch.float16)

    last = prefill(model, inputs, CDPruner(9, lower_half))
    for b in range(3):
        assert all(i >= PATCHES // 2 for i in kept(last, b))
    constant = prefill(model, inputs, CDPruner(9, lambda image: torch.ones(image.count)))
    plain = prefill(model, inputs, CDPruner(9, "none"))
    assert [kept(constant, b) for b in range(3)] == [kept(plain, b) for b in range(3)]


@pytest.mark.parametrize("answer", [torch.ones(5), torch.ones(PATCHES, 1), [1.0] * PATCHES])
def test_cdpruner_checks_a_relevance_of_ones_own(models: Any, answer: Any) -> None:
    model = models["llava"]
    with pytest.raises(ValueError, match=r"relevance=.* should be a tensor of shape \(36,\)"):
        prefill(model, make_inputs(model, PROMPTS), CDPruner(9, lambda image: answer))
    assert not tokprune.is_patched(model)


def test_cdpruner_selects_the_frames_of_a_video_by_themselves() -> None:
    model = llava()
    with video_family(4):
        inputs = video_inputs([(3, 5), (6, 2)], 4)
        last = prefill(model, inputs, CDPruner(20))
        joint = prefill(model, inputs, CDPruner(20, scope="image"))
    for b in range(2):
        frames = torch.tensor(kept(last, b)) // PATCHES
        assert frames.bincount(minlength=4).tolist() == [5] * 4
    assert [kept(last, b) for b in range(2)] != [kept(joint, b) for b in range(2)]


def test_cdpruner_after_an_encoder_method_selects_among_its_survivors(models: Any) -> None:
    for name in BUILDERS:
        model = models[name]
        inputs = make_inputs(model, PROMPTS, SIZES)
        both = tokprune.compose(tokprune.VisionZip(keep=12), CDPruner(7))
        last = prefill(model, inputs, both)
        assert [sum(row) for row in last.layers[-1].counts] == [7] * 3


# ------------------------------------------------------------------------------- CLIP


def clip_of(model: Any, seed: int = 0, window: int = 8) -> Any:
    """A CLIPModel around a copy of the model's vision tower."""
    vision = model.config.vision_config
    config = CLIPConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": window, "vocab_size": 60,
            "projection_dim": 12, "eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": vision.hidden_size, "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads, "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(seed)
    return CLIPModel(config).eval()


def clip_scores(model: Any, clip: Any, pixels: Tensor, text: Tensor) -> Tensor:
    """Minus the cosines of the patches of one picture, computed from the tower's own output."""
    with torch.no_grad():
        states = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states
        inner = getattr(clip.vision_model, "vision_model", clip.vision_model)
        rows = clip.visual_projection(inner.post_layernorm(states[-2][0, 1:]))
    pairs = torch.nn.functional.cosine_similarity(rows[:, None], text, dim=-1)
    return -pairs.mean(1)


QUESTIONS = [[58, 7, 9, 59], [58, 3, 4, 5, 6, 11, 12, 13, 14, 15, 59], [58, 21, 59]]


@pytest.mark.parametrize("one", [True, False], ids=["one question", "one per image"])
def test_clip_relevance_is_that_of_its_towers(models: Any, one: bool) -> None:
    model = models["llava"]
    inputs, clip = make_inputs(model, PROMPTS), clip_of(model)
    asked = ClipRelevance(clip, QUESTIONS[1] if one else QUESTIONS)
    assert [len(text) for text in asked.embeds] == ([2] if one else [1, 2, 1])
    method = Watched(CDPruner(9, asked))
    last = prefill(model, inputs, method)
    for b, image in enumerate(method.images):
        want = clip_scores(model, clip, inputs["pixel_values"][b], asked.embeds[0 if one else b])
        assert image.score is not None
        torch.testing.assert_close(image.score, want, atol=1e-5, rtol=1e-4)
        order = dpp_map(image.features, 9, minmax_relevance(image.score))
        assert kept(last, b) == order.sort().values.tolist()


def test_clip_relevance_on_tiles_follows_their_images(models: Any) -> None:
    """Two pictures of several tiles, each with its own question, as in a call of their own."""
    model = models["llava_next"]
    inputs = make_inputs(model, PROMPTS[:2], SIZES[:2])
    clip = clip_of(model)
    both = prefill(model, inputs, CDPruner(14, ClipRelevance(clip, QUESTIONS[:2])))
    for b in range(2):
        one = single(inputs, b, slice(b, b + 1))
        alone = prefill(model, one, CDPruner(14, ClipRelevance(clip, QUESTIONS[b])))
        assert kept(alone) == kept(both, b)
    swapped = prefill(model, inputs, CDPruner(14, ClipRelevance(clip, QUESTIONS[1::-1])))
    assert kept(swapped) != kept(both)


def test_clip_relevance_changes_nothing_in_the_tower(models: Any) -> None:
    model = models["llava"]
    inputs, clip = make_inputs(model, PROMPTS), clip_of(model)
    everything = CDPruner(1.0, ClipRelevance(clip, QUESTIONS[0]))
    with torch.no_grad():
        want = model(**inputs).logits
        with tokprune.compress(model, everything):
            assert torch.equal(model(**inputs).logits, want)
    assert not everything.plan(facts_of(model)).encoder[0].reduces


def test_clip_relevance_follows_an_encoder_method(models: Any) -> None:
    """Scores of the feature layer belong to the rows that an encoder method leaves there, in
    either order of the two."""
    model = models["llava"]
    inputs, clip = make_inputs(model, PROMPTS), clip_of(model)
    prune = CDPruner(7, ClipRelevance(clip, QUESTIONS[0]))
    flow = tokprune.FlowCut(keep=14, decoder_cut=False)
    results = [
        prefill(model, inputs, tokprune.compose(*two)) for two in ((prune, flow), (flow, prune))
    ]
    assert [kept(results[0], b) for b in range(3)] == [kept(results[1], b) for b in range(3)]
    assert [sum(row) for row in results[0].layers[-1].counts] == [7] * 3


def test_clip_relevance_asks_for_text_with_a_tokenizer(models: Any) -> None:
    clip = clip_of(models["llava"])

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [58, *(ord(c) % 50 for c in text), 59]}

    asked = ClipRelevance(clip, "cat?", tokenizer)
    ids = ClipRelevance(clip, tokenizer("cat?")["input_ids"])
    assert torch.equal(asked.embeds[0], ids.embeds[0])
    assert repr(asked) == "ClipRelevance(questions='cat?')"
    several = ClipRelevance(clip, ("cat?", "dog?"), tokenizer)
    assert torch.equal(several.embeds[0], asked.embeds[0])


def test_clip_relevance_errors(models: Any) -> None:
    model = models["llava"]
    clip, inputs = clip_of(model), make_inputs(model, PROMPTS)
    with pytest.raises(ValueError, match=r"questions='cat\?' is text.*tokenizer="):
        ClipRelevance(clip, "cat?")
    with pytest.raises(ValueError, match="questions is empty"):
        ClipRelevance(clip, [])
    two = CDPruner(9, ClipRelevance(clip, QUESTIONS[:2]))
    with pytest.raises(ValueError, match="questions has 2 entries for 3 images"):
        prefill(model, inputs, two)
    other = clip_of(model)
    other.visual_projection = torch.nn.Linear(20, 12, bias=False)
    with pytest.raises(ValueError, match="clip has a vision tower of width 20"):
        prefill(model, inputs, CDPruner(9, ClipRelevance(other, QUESTIONS[0])))
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    several = llava()
    several.config.vision_feature_layer = [-2, -3]
    with pytest.raises(tokprune.UnsupportedModelError, match="concatenates several"):
        tokprune.patch(several, CDPruner(9, ClipRelevance(clip, QUESTIONS[0])))


# ------------------------------------------------------------------------------- DART


@pytest.mark.parametrize("order", ["official", "norm"])
def test_dart_does_not_depend_on_padding_or_batch(models: Any, order: Any) -> None:
    """CPython's order of the pivots is that of their places in the prompt without padding."""
    for name in BUILDERS:
        model = models[name]
        inputs = make_inputs(model, PROMPTS, SIZES)
        method = DART(13, pivot_order=order)
        whole = prefill(model, inputs, method)
        for b in range(3):
            one = single(inputs, b, slice(b, b + 1))
            alone = prefill(model, one, method).layers[-1].column[0]
            columns = whole.layers[-1].column[b]
            gap = int((inputs["attention_mask"][b] == 0).sum())
            assert (columns[columns >= 0] - gap).tolist() == alone.tolist()


def test_dart_reduces_every_image_of_a_prompt(models: Any) -> None:
    model = models["llava"]
    inputs = make_inputs(model, [[4, "image", 6, "image", 3], [2, "image", 9]])
    method = Watched(DART(11))
    last = prefill(model, inputs, method)
    assert last.layers[1].counts == [[36, 36], [36]]
    assert last.layers[2].counts == last.layers[-1].counts == [[11, 11], [11]]
    found: Any = method.runs[0].retained  # type: ignore[attr-defined]
    visual = last.layers[1].segment >= 0
    for b, s in ((0, 0), (0, 1), (1, 0)):
        own = last.layers[1].segment[b] == s
        assert own[found.image_pivots[b, s]].all()
        pivots = found.text_pivots[b, s]
        real = pivots[pivots >= 0]
        assert not visual[b, real].any()
        assert (real > int(own.nonzero().max())).all()
    # three tokens of text behind the second image: no more pivots than that
    assert (found.text_pivots[0, 1] >= 0).sum() == 3
    assert (found.text_pivots[1, 1] == -1).all()


def test_dart_works_without_text_behind_the_image(models: Any) -> None:
    model = models["llava"]
    last = prefill(model, make_inputs(model, [[5, "image"]]), DART(10))
    assert last.layers[-1].counts == [[10]]


def test_dart_presets_are_what_the_official_code_keeps() -> None:
    kept = {n: DART.preset("llava-1.5", n).keep for n in (192, 128, 64)}
    assert kept == {192: 196, 128: 132, 64: 68}
    assert DART.preset("llava-next", 320).keep == 324
    assert DART.preset("llava-1.5", 64).plan(large_facts()).decoder[0].prune_before == {2}


def test_dart_of_a_later_turn_ignores_the_keys_of_earlier_ones(models: Any) -> None:
    """A second turn with an image on the cache of a first: pivots are among its own tokens."""
    model = models["llava"]
    first, second = (make_inputs(model, [[4, "image", 6]], seed=s) for s in (1, 2))
    with tokprune.compress(model, DART(9)) as trace, torch.no_grad():
        out = model(**first, use_cache=True)
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        model(**{**second, "attention_mask": mask}, past_key_values=out.past_key_values)
    last: Any = trace.last
    assert last.layers[-1].counts == [[9]]


# ------------------------------------------------------------------------------- M3


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(("options", "window"), [({"keep": 9}, 2), ({"level": 2}, 6)])
def test_m3_equals_the_slow_reference(
    models: Any, options: dict[str, int], window: int, family: str, batch: str
) -> None:
    merge = partial(pooled_image, p=window)
    check(build(models, family, "sdpa"), batch, "m3", options, merge)


@pytest.mark.parametrize("family", BUILDERS)
def test_m3_is_pooling_at_a_scale(models: Any, family: str) -> None:
    model = models[family]
    inputs = make_inputs(model, PROMPTS, SIZES)
    steps = continuation_tokens(3, 2)

    def logits(method: Any) -> Tensor:
        with tokprune.compress(model, method):
            return compressed_logits(model, inputs, steps)

    want = logits(Pool(9, positions="preserve"))
    for method in (
        M3(9, positions="preserve"),
        M3(level=1, positions="preserve"),
        M3(0.25, positions="preserve"),
    ):
        assert_same_logits(logits(method), want)


def test_m3_names_its_scales_by_tokens_and_by_level() -> None:
    facts = large_facts()
    windows = {576: 1, 144: 2, 36: 4, 9: 8, 1: 24}
    for level, (keep, window) in enumerate(windows.items()):
        for method in (M3(keep), M3(level=level), M3(keep / 576), M3.preset("llava-1.5", keep)):
            assert method.pool(facts).window_of(facts) == window
    assert M3.preset("llava-next", 180) == M3(36)
    rounded = {288: 1, 100: 2, 64: 3, 16: 6, 576: 1, 1: 24}
    for keep, window in rounded.items():
        assert M3(keep, official_rounding=True).pool(facts).window_of(facts) == window


# ------------------------------------------------------------------------------- errors

ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("cdpruner", {}, r"'keep' is required by cdpruner"),
    ("cdpruner", {"keep": 37}, r"keep=37 is larger than the 36"),
    ("cdpruner", {"keep": 9, "relevance": "clip"}, r"relevance='clip' should be one of 'none'"),
    ("cdpruner", {"keep": 9, "relevance": None}, r"relevance=None should be one of 'none'"),
    ("cdpruner", {"keep": 9, "scope": "batch"}, r"scope='batch' should be one of"),
    ("cdpruner", {"keep": 9, "relevance_scope": "tile"}, r"relevance_scope='tile' should be"),
    ("cdpruner", {"keep": 9, "theta": 1.0}, r"theta=1.0 should be in \[0, 1\)"),
    ("dart", {"keep": 0}, r"keep=0 should be at least 1"),
    ("dart", {"keep": 9, "prune_before": 0}, r"prune_before=0 should be a whole number, at least"),
    (
        "dart",
        {"keep": 9, "prune_before": 8},
        r"prune_before=8 should lie between 1 and 7: .* 8",
    ),
    ("dart", {"keep": 9, "image_pivots": 0}, r"image_pivots=0 should be a whole number"),
    ("dart", {"keep": 9, "text_pivots": 1.5}, r"text_pivots=1.5 should be a whole number"),
    ("dart", {"keep": 9, "pivot_order": "set"}, r"pivot_order='set' should be one of"),
    ("m3", {}, r"exactly one of keep and level"),
    ("m3", {"keep": 9, "level": 1}, r"exactly one of keep and level"),
    ("m3", {"keep": 4}, r"keep=4 tokens per tile is no nested scale .* one of 36, 9, 1 "),
    ("m3", {"level": 3}, r"level=3 should be at most 2: .* are 36, 9, 1 tokens"),
    ("m3", {"level": -1}, r"level=-1 should be a whole number"),
    ("m3", {"keep": 2, "official_rounding": True}, r"window=4 does not divide the 6×6 grid"),
    ("m3", {"keep": 9, "official_rounding": 2}, r"official_rounding=2 should be one of"),
    ("m3", {"keep": 9, "place": "inside"}, r"place='inside' should be one of"),
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
