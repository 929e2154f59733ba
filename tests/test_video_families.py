"""LLaVA-OneVision and LLaVA-NeXT-Video: videos, several pictures, tiles, shrunk tiles.

Against the masked oracle; against LLaVA-NeXT with the same weights, whose own references are in
the other suites; against the same prompt given as embeddings; batches against single runs.
"""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
import transformers
from methods_table import ALL, CORE, MERGING, PRUNING
from tiny import (
    GRID,
    IMAGE_TOKEN,
    VIDEO_BUILDERS,
    VIDEO_TOKEN,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    make_inputs,
    single,
)
from torch import Tensor

import tokprune
from tokprune.families import bind, family_of
from tokprune.methods import make_method
from tokprune.methods.clip_relevance import TowerRelevance
from tokprune.testing.oracle import (
    assert_same_logits,
    compressed_logits,
    continuation_tokens,
    oracle_logits,
)

STEPS = 5
SIZES = [(14, 40), (40, 14), (30, 22), (40, 40)]
#: prompts; the last row of each has neither the longest text nor the most pictures
KINDS: dict[str, list[list[Any]]] = {
    "video": [[4, "video", 6], [7, "video", 9], [2, "video", 3]],
    "videos": [[4, "video", 3, "video", 6], [7, "video", "video", 2], [2, "video", 5]],
    "mixed": [[4, "video", 3, "image", 6], [7, "image", 1, "video", 9], [2, "image", 3]],
}
STILLS: dict[str, list[list[Any]]] = {
    "tiles": [[4, "image", 6], [7, "image", 9]],
    "several": [[4, "image", 3, "image", 6], [7, "image", 9]],
}
EVS = {"evs": ("evs", {"keep": 20})}
#: reduce the tower's rows, which models that pool whole frames cannot have
REFUSED = {
    case
    for case, (name, options) in ALL.items()
    if name in ("flowcut", "occamtoken", "pitome", "tome", "visionzip")
    or (name == "mustdrop" and options.get("spatial", True))
    or (name == "centerclip" and options.get("place") == "encoder")
    or (name == "ficoco" and options.get("place") != "decoder")
}
VIDEO_PRUNING = {c: own for c, own in {**PRUNING, **EVS}.items() if c not in REFUSED}
VIDEO_ALL = {c: own for c, own in {**ALL, **EVS}.items() if c not in REFUSED}
#: windows that suit 3×3 frames as well as 6×6 tiles
POOLED = {
    "pool": ("pool", {"window": 3}),
    "pool-window": ("pool", {"window": 3, "positions": "preserve"}),
    "m3": ("m3", {"keep": 1}),
    "m3-level": ("m3", {"level": 1, "positions": "preserve"}),
}
VIDEO_ALL |= {case: POOLED[case] for case in VIDEO_ALL if case in POOLED}


@pytest.fixture(scope="module")
def models() -> dict[Any, Any]:
    return {}


def build(models: dict[Any, Any], family: str, **options: Any) -> Any:
    key = (family, *sorted(options.items()))
    if key not in models:
        models[key] = VIDEO_BUILDERS[family](**options)
    return models[key]


def inputs_of(model: Any, prompts: list[list[Any]], **options: Any) -> dict[str, Tensor]:
    images = sum(part == "image" for prompt in prompts for part in prompt)
    return make_inputs(model, prompts, SIZES[:images], **options)


def unit_of(case: str, method: str) -> Any:
    """One of the units of budgets; a different one for different cases, always the same."""
    choices = ["video", "frame", 3] if method != "evs" else ["video", 3]
    return choices[zlib.crc32(case.encode()) % len(choices)]


def check_oracle(model: Any, prompts: list[list[Any]], method: str, options: Any) -> None:
    inputs = inputs_of(model, prompts)
    continuation = continuation_tokens(len(prompts), STEPS)
    with tokprune.compress(model, method, **options) as trace:
        got = compressed_logits(model, inputs, continuation)
    assert trace.last is not None
    want = oracle_logits(model, inputs, trace.last, continuation)
    assert_same_logits(got, want)
    counts = [sum(row) for row in trace.last.layers[-1].counts]
    assert all(n <= whole for n, whole in zip(counts, trace.last.original_counts))


# ------------------------------------------------------------------------------- videos


def smaller(options: dict[str, Any], video_unit: Any) -> dict[str, Any]:
    """Budgets that drop something of a single frame of nine tokens."""
    if video_unit == "frame" and isinstance(options.get("keep"), int):
        return {**options, "keep": min(options["keep"], 5)}
    return options


@pytest.mark.parametrize("kind", ["mixed", "videos"])
@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize("case", VIDEO_PRUNING)
def test_pruned_videos_equal_the_masked_oracle(
    models: Any, case: str, family: str, kind: str
) -> None:
    method, options = VIDEO_PRUNING[case]
    video_unit = unit_of(case + kind, method)
    model = build(models, family)
    check_oracle(
        model, KINDS[kind], method, {**smaller(options, video_unit), "video_unit": video_unit}
    )


@pytest.mark.full
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("video_unit", ["video", "frame", 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize("case", VIDEO_PRUNING)
def test_every_pruned_video_equals_the_masked_oracle(
    models: Any, case: str, family: str, kind: str, video_unit: Any, attention: str
) -> None:
    method, options = VIDEO_PRUNING[case]
    if method == "evs" and video_unit == "frame":
        return
    model = build(models, family, attention=attention)
    check_oracle(
        model, KINDS[kind], method, {**smaller(options, video_unit), "video_unit": video_unit}
    )


@pytest.mark.parametrize("pooling", ["max", "conv"])
@pytest.mark.parametrize("case", ["todre", "fastv"])
def test_other_poolings_of_frames(models: Any, case: str, pooling: str) -> None:
    model = build(models, "llava_next_video", pooling=pooling)
    check_oracle(model, KINDS["mixed"], *PRUNING[case])


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize("case", [c for c in MERGING if MERGING[c][0] == "sparsevlm"])
def test_merging_in_the_decoder_equals_the_same_prompt_as_embeddings(
    models: Any, case: str, family: str
) -> None:
    model, (method, options) = build(models, family), MERGING[case]
    inputs = inputs_of(model, KINDS["mixed"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    visual = (ids == IMAGE_TOKEN) | (ids == VIDEO_TOKEN)
    with torch.no_grad():
        model(**inputs, position_ids=positions)
        handle.remove()
        with tokprune.compress(model, method, **options) as trace:
            got = model(**inputs, position_ids=positions).logits[:, -1]
            with tokprune.visual_positions(visual):
                want = model(
                    inputs_embeds=seen[0], attention_mask=mask, position_ids=positions
                ).logits[:, -1]
    assert trace.prefills == 2
    assert_same_logits(got, want)


@pytest.mark.parametrize("video_unit", ["video", "frame", 3])
@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize(("method", "options"), [("pool", {"window": 3}), ("m3", {"keep": 1})])
def test_pooled_frames(
    models: Any, method: str, options: dict[str, Any], family: str, video_unit: Any
) -> None:
    """Every frame becomes its mean, in the order of the frames; the newline at the end stays."""
    model = build(models, family)
    inputs = inputs_of(model, [[4, "video", 6]])
    ids = inputs["input_ids"][0]
    seen: list[Tensor] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["inputs_embeds"][0])

    handle = model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        with tokprune.compress(model, method, **options, video_unit=video_unit) as trace:
            handle.remove()
            handle = model.model.language_model.layers[0].register_forward_pre_hook(
                lambda module, args, kwargs: seen.append((args or [kwargs["hidden_states"]])[0][0]),
                with_kwargs=True,
            )
            model(**inputs)
            handle.remove()
    full, short = seen
    visual = full[ids == VIDEO_TOKEN]
    frames = [visual[9 * f : 9 * f + 9].mean(0) for f in range(4)]
    want = torch.stack([*full[:4], *frames, *visual[36:], *full[-6:]])
    torch.testing.assert_close(short, want, rtol=1e-5, atol=1e-6)
    assert trace.last is not None
    tokens = trace.kept()
    held = [set(token.sources) for token in tokens if token.kind == "patch"]
    assert held == [{(f, y, x) for y in range(3) for x in range(3)} for f in range(4)]
    assert [t.kind for t in tokens[4:]] == ["newline"] * (len(visual) - 36)


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize("case", sorted(REFUSED))
def test_methods_that_take_rows_from_the_tower_refuse_videos(
    models: Any, case: str, family: str
) -> None:
    model, (method, options) = build(models, family), ALL[case]
    inputs = inputs_of(model, [[4, "video", 6]])
    ran: list[int] = []
    with torch.no_grad():
        want = model(**inputs).logits
        handle = model.model.language_model.register_forward_pre_hook(lambda *a: ran.append(1))
        with tokprune.compress(model, method, **options):
            with pytest.raises(ValueError, match=r"of a video|for a video"):
                model(**inputs)
            model(**inputs_of(model, [[4, "image", 6]]))  # pictures are fine
        handle.remove()
        assert len(ran) == 1
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_the_decoder_cut_of_flowcut_takes_videos(models: Any, family: str) -> None:
    options = {
        "keep": 6,
        "tower_keep": 1.0,
        "decoder_cut": True,
        "prune_before": 4,
        "video_unit": 3,
    }
    check_oracle(build(models, family), KINDS["mixed"], "flowcut", options)


# ------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("method", ["divprune", "fastv", "random", "dart", "cdpruner"])
@pytest.mark.parametrize(
    ("video_unit", "want"),
    [("video", [5]), ("frame", [5, 5, 5, 5]), (3, [5, 5]), (2, [5, 5]), (9, [5])],
)
def test_what_a_budget_counts(models: Any, video_unit: Any, want: list[int], method: str) -> None:
    model = build(models, "llava_next_video")
    with tokprune.compress(model, method, keep=5, video_unit=video_unit) as trace, torch.no_grad():
        model(**inputs_of(model, [[4, "video", 6], [2, "image", 3, "video", 3]]))
    assert trace.last is not None
    counts = trace.last.layers[-1].counts
    if (
        method == "fastv" and video_unit == "video"
    ):  # shared by all images of a prompt, as published
        counts = [counts[0], [5, 5]] if sum(counts[1]) == 10 else []
    assert counts == [want, [5, *want]]


@pytest.mark.parametrize("video_unit", ["frame", 3])
def test_every_part_is_selected_as_a_video_of_its_own(models: Any, video_unit: Any) -> None:
    model = build(models, "llava_onevision")
    inputs = inputs_of(model, [[4, "video", 6]])
    features: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: features.append(kwargs["inputs_embeds"][0, 4:-6]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        with tokprune.compress(
            model, "todre", keep=4, pivot="farthest", stage2=False, video_unit=video_unit
        ) as t:
            model(**inputs)
    width = 9 * (1 if video_unit == "frame" else video_unit)
    want = []
    for start in range(0, 36, width):
        x = features[0][start : min(start + width, 36)]
        pivot = tokprune.operators.farthest_pivot(x)
        want += sorted(start + i for i in tokprune.operators.max_sum(x, 4, pivot).tolist())
    assert [token.column - 4 for token in t.kept()] == want


def test_the_class_pivot_of_a_video_is_that_of_all_frames(models: Any) -> None:
    """Best class attention after the model's own pooling (here the mean of 2×2 patches)."""
    model = build(models, "llava_next_video", attention="eager")
    inputs = inputs_of(model, [[4, "video", 6]])
    made: list[Tensor] = []
    last = model.model.vision_tower
    last = getattr(last, "vision_model", last).encoder.layers[-1].self_attn
    handles = [
        last.q_proj.register_forward_hook(
            lambda m, a, out: made.insert(0, out.unflatten(-1, (4, 8)))
        ),
        last.k_proj.register_forward_hook(lambda m, a, out: made.append(out.unflatten(-1, (4, 8)))),
    ]
    with torch.no_grad(), tokprune.compress(model, "todre", keep=1, stage2=False) as trace:
        model(**inputs)
    for handle in handles:
        handle.remove()
    query, key = made
    logits = torch.einsum("fhd,fjhd->fhj", query[:, 0], key) / 8**0.5
    attention = logits.softmax(-1).mean(1)[:, 1:]
    score = attention.view(4, GRID // 2, 2, GRID // 2, 2).mean((2, 4))
    frame, cell = divmod(int(score.flatten().argmax()), 9)
    (token,) = trace.kept()
    assert (token.tile, token.row, token.col) == (frame, cell // 3, cell % 3)


class FirstChannel(TowerRelevance):
    """Relevance that can be looked at afterwards."""

    def score(self, patches: Tensor, tower: Any) -> Tensor:
        self.seen = patches[..., 0]
        return self.seen


@pytest.mark.parametrize("video_unit", ["video", "frame", 3])
@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_relevance_from_the_tower_is_averaged_like_the_features(
    models: Any, family: str, video_unit: Any
) -> None:
    model, relevance = build(models, family), FirstChannel()
    inputs = inputs_of(model, [[4, "video", 6]])
    with torch.no_grad():
        with tokprune.compress(
            model, "cdpruner", keep=4, relevance=relevance, video_unit=video_unit
        ) as trace:
            model(**inputs)
    pooled = relevance.seen.view(4, 3, 2, 3, 2).mean((2, 4)).flatten()
    scores = [part.score for part in trace.last.records]  # type: ignore[union-attr]
    torch.testing.assert_close(torch.cat(scores), pooled)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [0, -1, "tile", 2.5, True, None])
def test_bad_per(models: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match="video_unit="):
        tokprune.patch(build(models, "llava_next_video"), "random", keep=4, video_unit=bad)


def test_evs_needs_two_frames(models: Any) -> None:
    for video_unit in ("frame", 1):
        with pytest.raises(ValueError, match="at least 2"):
            tokprune.patch(build(models, "llava_next_video"), "evs", keep=9, video_unit=video_unit)


def test_composed_methods_share_the_unit() -> None:
    first, second = tokprune.Random(keep=9, video_unit="frame"), tokprune.FastV(keep=3)
    with pytest.raises(tokprune.CompositionError, match="different video_unit"):
        tokprune.compose(first, second)
    both = tokprune.compose(first, tokprune.FastV(keep=3, video_unit="frame"))
    assert both.video_unit == "frame"
    assert "video_unit='frame'" in repr(first)
    assert "video_unit" not in repr(second)


# ------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", STILLS)
@pytest.mark.parametrize("case", PRUNING)
def test_pruned_pictures_of_onevision_equal_the_masked_oracle(
    models: Any, case: str, kind: str
) -> None:
    """One picture in tiles, several pictures whole; features of the tower's last layer."""
    check_oracle(build(models, "llava_onevision"), STILLS[kind], *PRUNING[case])


def in_tower(case: str) -> bool:
    """Whether it drops or merges rows inside the tower, where it can."""
    method, options = ALL[case]
    if method == "centerclip":
        return options.get("place") == "encoder"
    plan = make_method(method, **options).plan(bind(llava()).facts)
    return any(stage.reduces for stage in plan.encoder)


@pytest.mark.parametrize("case", [c for c in PRUNING if not in_tower(c) and c != "centerclip"])
def test_shrunk_tiles_equal_the_masked_oracle(models: Any, case: str) -> None:
    """Stitched crops of more than one tile's worth of cells are interpolated to that."""
    method, options = PRUNING[case]
    if method == "centerclip":
        options = {**options, "place": "projector"}
    check_oracle(build(models, "llava_onevision", most=1), STILLS["tiles"], method, options)


@pytest.mark.parametrize(
    "case",
    [c for c in ALL if (in_tower(c) and c not in ("centerclip", "mustdrop-lightcompress"))
     or c.startswith(("pool", "m3"))],
)  # fmt: skip
def test_what_takes_rows_from_the_tower_is_not_shrunk(models: Any, case: str) -> None:
    """Their survivors enter as they are: the same as where the model shrinks nothing."""
    method, options = ALL[case]
    if options.get("positions") == "preserve":
        options = {**options, "positions": "compact"}
    shrinks, leaves = (build(models, "llava_onevision", most=most) for most in (1, 9))
    plan = make_method(method, **options).plan(bind(leaves).facts)
    if any(stage.order == "spatial" for stage in plan.encoder if stage.reduces):
        return  # places of the prompt, which differ
    logits = []
    for model in (shrinks, leaves):
        inputs = inputs_of(model, STILLS["tiles"])
        with tokprune.compress(model, method, **options) as trace:
            logits.append(compressed_logits(model, inputs, continuation_tokens(2, STEPS)))
        assert trace.last is not None
        for number, image in enumerate(trace.last.images):
            assert image.record is not None
            assert (image.record.layout.token_grid is not None) == (model is shrinks), number
    assert_same_logits(*logits)


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize("case", ALL)
def test_pictures_equal_llava_next_with_the_same_weights(
    models: Any, case: str, family: str
) -> None:
    method, options = ALL[case]
    towers: Any = {"tower": "siglip", "decoder": "qwen2"} if family == "llava_onevision" else {}
    if "next" not in models:
        models["next"] = {}
    if family not in models["next"]:
        twin = llava_next(**towers)
        other = VIDEO_BUILDERS[family](
            **towers, **({"feature_layer": -2} if family == "llava_onevision" else {})
        )
        twin.load_state_dict(other.state_dict(), strict=False)
        models["next"][family] = (other, twin)
    logits = []
    for model in models["next"][family]:
        inputs = inputs_of(model, STILLS["tiles"])
        with tokprune.compress(model, method, **options):
            logits.append(compressed_logits(model, inputs, continuation_tokens(2, STEPS)))
    assert torch.equal(*logits)


# ------------------------------------------------------------------------------- generate


GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ROWS = KINDS["mixed"]
#: pictures and videos of each row
PARTS = [(slice(0, 1), slice(0, 1)), (slice(1, 2), slice(1, 2)), (slice(2, 3), slice(0, 0))]


def new_tokens(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        out = model.generate(**inputs, **{**GREEDY, **options})
    return out[:, inputs["input_ids"].shape[1] :]


def check_singles(model: Any, method: str, options: dict[str, Any], **generation: Any) -> None:
    inputs = inputs_of(model, ROWS)
    with tokprune.compress(model, method, **options):
        together = new_tokens(model, inputs, **generation)
        alone = [
            new_tokens(model, single(inputs, row, *parts), **generation)
            for row, parts in enumerate(PARTS)
        ]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.filterwarnings("ignore:evs found no video")
@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize("case", [c for c in {**CORE, **EVS} if c not in REFUSED])
def test_batch_equals_singles_through_generate(models: Any, case: str, family: str) -> None:
    method, options = VIDEO_ALL[case]
    video_unit = unit_of(case, method)
    check_singles(
        build(models, family), method, {**smaller(options, video_unit), "video_unit": video_unit}
    )


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:evs found no video")
@pytest.mark.parametrize("video_unit", ["video", "frame"])
@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize("case", VIDEO_ALL)
def test_every_batch_equals_singles_through_generate(
    models: Any, case: str, family: str, video_unit: str
) -> None:
    method, options = VIDEO_ALL[case]
    if method != "evs" or video_unit == "video":
        check_singles(build(models, family), method, {**options, "video_unit": video_unit})


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize("case", ["divprune", "fastv"])
def test_beams_share_the_videos_of_their_prompt(models: Any, case: str, family: str) -> None:
    """One video and one picture in every prompt."""
    model, (method, options) = build(models, family), ALL[case]
    inputs = inputs_of(model, ROWS[:2])
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with tokprune.compress(model, method, **options, video_unit=2):
        together = new_tokens(model, inputs, **beams)
        alone = [new_tokens(model, single(inputs, i, *PARTS[i]), **beams) for i in range(2)]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 repeats videos one by one"
)
@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_beams_share_several_videos_of_their_prompt(models: Any, family: str) -> None:
    model = build(models, family)
    inputs = inputs_of(model, [[4, "video", 3, "video", 6], [7, "video", 2]])
    videos = (slice(0, 2), slice(2, 3))
    with tokprune.compress(model, "divprune", keep=5, video_unit=3):
        together = new_tokens(model, inputs, num_beams=3)
        alone = [
            new_tokens(model, single(inputs, i, slice(0, 0), videos[i]), num_beams=3)
            for i in range(2)
        ]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize("case", ["cdpruner", "fastv"])
def test_a_video_in_a_later_turn(models: Any, case: str, family: str) -> None:
    """On a cache that is compressed already, batch and single runs agree."""
    model, (method, options) = build(models, family), ALL[case]
    first, second = inputs_of(model, [[4, "video", 6]]), inputs_of(model, [[3, "video", 5]], seed=9)
    with tokprune.compress(model, method, **options, video_unit="frame"), torch.no_grad():
        logits = []
        for copies in (1, 2):
            turn = {n: v.repeat(copies, *[1] * (v.dim() - 1)) for n, v in first.items()}
            cache = model(**turn, use_cache=True).past_key_values
            later = {n: v.repeat(copies, *[1] * (v.dim() - 1)) for n, v in second.items()}
            later["attention_mask"] = torch.cat(
                [turn["attention_mask"], later["attention_mask"]], dim=1
            )
            start = turn["input_ids"].shape[1]
            positions = torch.arange(start, later["attention_mask"].shape[1])
            out = model(**later, past_key_values=cache, position_ids=positions.expand(copies, -1))
            logits.append(out.logits[:, -1])
        trace = tokprune.trace_of(model)
    assert trace is not None
    assert trace.last is not None
    assert trace.last.past == start
    assert len(trace.last.images) == 8
    assert_same_logits(logits[1], logits[0].expand(2, -1))


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="no prefetch before 5")
@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_features_encoded_ahead(models: Any, family: str) -> None:
    """What generate() of transformers 5 does: encode first, then pass the outputs on."""
    model = build(models, family)
    inputs = inputs_of(model, [[4, "video", 3, "image", 6]])
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def encode() -> dict[str, Any]:
        images = {n: inputs[n] for n in ("pixel_values", "image_sizes", "batch_num_images")
                  if n in inputs}  # fmt: skip
        return {
            "image": model.model.get_image_features(**images, return_dict=True),
            "video": model.model.get_video_features(
                inputs["pixel_values_videos"], return_dict=True
            ),
        }

    with torch.no_grad():
        early = encode()
        with tokprune.compress(model, "todre", keep=6, video_unit="frame"):
            want = model(**inputs).logits
            assert torch.equal(model(**rest, mm_encoder_outputs=encode()).logits, want)
            with pytest.raises(ValueError, match=r"get_(video|image)_features on the patched"):
                model(**rest, mm_encoder_outputs={"video": early["video"]})


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_videos_as_a_positional_argument(models: Any, family: str) -> None:
    model = build(models, family)
    inputs = inputs_of(model, [[4, "video", 6]])
    ids, clip = inputs["input_ids"], inputs["pixel_values_videos"]
    inner = model.model
    before = [ids, None, clip] if family == "llava_next_video" else [ids, None, None, clip]
    with tokprune.compress(model, "random", keep=5), torch.no_grad():
        want = inner(input_ids=ids, pixel_values_videos=clip).last_hidden_state
        assert torch.equal(inner(*before).last_hidden_state, want)
        assert want.shape[1] == 4 + 5 + 6


# ------------------------------------------------------------------------------- book-keeping


def test_scores_go_through_the_pooling_that_the_features_go_through() -> None:
    """Per-patch scores are averaged like one-number features; odd grids overlap."""
    scores = torch.randn(3, 25, generator=torch.Generator().manual_seed(0))
    from tokprune.families.resampling import pooled_video, shrunk_map

    model = llava_onevision()
    model.model.config.vision_config.image_size = 20  # 5×5 patches
    layout = pooled_video(3, (5, 5), (3, 3), None, newline=True)
    assert layout.token_grid is not None
    want = model.model.apply_pooling(scores[..., None])
    assert torch.equal(layout.token_grid.mean(scores), want.flatten())

    video = llava_next_video()
    layout = pooled_video(3, (6, 6), (3, 3), 2, newline=False)
    assert layout.token_grid is not None
    scores = torch.randn(3, 36, generator=torch.Generator().manual_seed(1))
    want = video.model.vision_resampler(scores[..., None].expand(-1, -1, 32))[..., 0]
    torch.testing.assert_close(layout.token_grid.mean(scores), want.flatten())

    model = llava_onevision(most=1)
    scores = torch.randn(5, 36, generator=torch.Generator().manual_seed(2))
    packed, _ = model.model.pack_image_features(
        [scores[..., None]], [[30, 40]], image_newline=None, vision_aspect_ratio="anyres_max_1"
    )
    family = family_of(model)
    parts = family.parts(model)
    facts = family.facts(model, parts)
    (own,) = family.images(parts, facts, {"image_sizes": [[30, 40]]})
    assert own.token_grid is not None
    torch.testing.assert_close(own.token_grid.mean(scores), packed[0].flatten())
    assert shrunk_map((6, 6), (2, 2), (2, 10, 0, 12), (4, 6)).grids == ((6, 6), (4, 6))


@pytest.mark.parametrize("size", [(10, 72), (40, 40), (23, 41), (72, 10), (7, 19), (48, 31)])
@pytest.mark.parametrize("most", [1, 2, 9])
def test_layouts_of_onevision_are_those_of_its_packing(most: int, size: tuple[int, int]) -> None:
    """Prompt tokens and newlines, and for every patch the cell whose window covers it."""
    model = llava_onevision(most=most)
    family = family_of(model)
    parts = family.parts(model)
    facts = family.facts(model, parts)
    (layout,) = family.images(parts, facts, {"image_sizes": [size]})
    numbers = torch.arange(1.0, layout.tiles * 36 + 1).view(layout.tiles, 36, 1)
    packed, _ = model.model.pack_image_features(
        [numbers], [list(size)], image_newline=torch.tensor([-1.0]),
        vision_aspect_ratio=f"anyres_max_{most}",
    )  # fmt: skip
    packed = packed[0].flatten()
    assert torch.equal(packed == -1, layout.packed < 0)
    if layout.token_grid is None:
        assert torch.equal(packed[packed > 0] - 1, layout.packed[layout.packed >= 0].float())
        return
    near = layout.token_grid.nearest
    assert near is not None
    assert torch.equal(near[:36], torch.arange(36))
    shown = near[near >= 0]
    # every cell of the map shows patches, in order
    assert shown.unique().tolist() == list(range(sum(h * w for h, w in layout.token_grid.grids)))
    # a cell of a picture whose values rise to the right and downwards rises as well
    _, (rows, columns) = layout.token_grid.grids
    assert int((layout.packed < 0).sum()) == rows
    assert int((layout.packed >= 36).sum()) == rows * columns


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_trace_names_frames(models: Any, family: str) -> None:
    model = build(models, family)
    inputs = inputs_of(model, [[4, "video", 6], [2, "image", 3, "video", 4]])
    with tokprune.compress(model, "grid", keep=2, video_unit=3) as trace, torch.no_grad():
        model(**inputs)
    told = trace.to_dict()
    videos = [image for image in told["images"] if "frames" in image]
    assert [(v["row"], v["image"], v["frames"]) for v in videos] == [
        (0, 0, [0, 3]), (0, 1, [3, 1]), (1, 1, [0, 3]), (1, 2, [3, 1])
    ]  # fmt: skip
    assert all(v["grid"] == [3, 3] for v in videos)
    for video in videos:
        first, frames = video["frames"]
        tiles = [token["tile"] for token in video["stages"][-1]["tokens"]]
        assert len(tiles) == 2
        assert set(tiles) <= set(range(first, first + frames))
    assert "2 prompts with 1 image and 2 videos" in trace.summary()
    last = trace.last
    assert last is not None
    assert [[len(parts) for parts in last.visuals(row)] for row in (0, 1)] == [[2], [1, 2]]


@pytest.mark.parametrize("pooling", ["average", "conv"])
def test_flops_of_videos(pooling: str) -> None:
    """Measured without any drop they are those of the unpruned model; the projector of
    LLaVA-NeXT-Video sees pooled frames only, and a convolution counts."""
    from tokprune.trace.flops import prefill_macs, unpruned_macs

    model = llava_next_video(pooling=pooling)
    with tokprune.compress(model, "random", keep=1.0) as trace, torch.no_grad():
        model(**inputs_of(model, [[4, "video", 6], [2, "image", 3, "video", 4]]))
    last = trace.last
    assert last is not None
    assert prefill_macs(last).to_dict() == unpruned_macs(last).to_dict()
    shape = bind(model).shape
    tiles = next(i.record.layout.tiles for i in last.images if not i.record.layout.video)  # type: ignore[union-attr]
    cell = shape.projector + (32 * 32 * 4 if pooling == "conv" else 0)
    assert prefill_macs(last).projector == tiles * 36 * shape.projector + 2 * 4 * 9 * cell


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_overlay_of_videos_and_pictures(models: Any, family: str) -> None:
    from PIL import Image

    model = build(models, family)
    frames = [Image.new("RGB", (24, 24), (60 * f, 90, 200)) for f in range(4)]
    picture = Image.new("RGB", (40, 14), (200, 40, 40))
    with tokprune.compress(model, "grid", keep=8, video_unit=3) as trace, torch.no_grad():
        model(**inputs_of(model, [[4, "video", 3, "image", 6]]))
    drawn = tokprune.overlay(trace, [frames, picture])
    assert drawn.getcolors(2**20) is not None
    colours = {colour for _, colour in drawn.getcolors(2**20)}
    assert {(60 * f, 90, 200) for f in range(4)} <= colours
    for wrong in (frames[:2], picture):
        with pytest.raises(ValueError, match="video of 4 frames"):
            tokprune.overlay(trace, [wrong, picture])
    with pytest.raises(ValueError, match="still image"):
        tokprune.overlay(trace, [frames, frames])


def test_overlay_of_shrunk_tiles(models: Any) -> None:
    from PIL import Image

    model = build(models, "llava_onevision", most=1)
    picture = Image.new("RGB", (40, 30), (200, 40, 40))
    for method in (tokprune.Grid(keep=9), tokprune.VisionZip(keep=8)):
        with tokprune.compress(model, method) as trace, torch.no_grad():
            model(**make_inputs(model, [[4, "image", 6]], [(30, 40)]))
        assert tokprune.overlay(trace, picture).width > 432


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_loading(family: str, tmp_path: Any) -> None:
    model = VIDEO_BUILDERS[family]()
    model.save_pretrained(tmp_path)
    loaded = tokprune.load(tmp_path, "cdpruner", keep=3, video_unit="frame")
    assert type(loaded) is type(model)
    inputs = inputs_of(model, [[4, "video", 6]])
    with torch.no_grad(), tokprune.compress(model, "cdpruner", keep=3, video_unit="frame"):
        assert_same_logits(loaded(**inputs).logits, model(**inputs).logits)
    trace = tokprune.trace_of(loaded)
    assert trace is not None
    assert trace.last is not None
    assert trace.last.layers[-1].counts == [[3, 3, 3, 3]]
    with pytest.raises(ValueError, match="video_unit="):
        tokprune.load(tmp_path, "cdpruner", keep=3, video_unit="clip")


def test_prompts_with_videos() -> None:
    from types import SimpleNamespace

    from tokprune.inputs.prompts import prompt_text

    plain = SimpleNamespace(chat_template=None)
    assert prompt_text(plain, "Why?", 1, 2) == "USER: <image><video><video>\nWhy? ASSISTANT:"
    seen: list[Any] = []

    def template(turns: Any, **_: Any) -> str:
        seen.append([part["type"] for part in turns[0]["content"]])
        return "<video>" + "".join(part.get("text", "") for part in turns[0]["content"])

    chat = SimpleNamespace(chat_template="x", apply_chat_template=template)
    assert prompt_text(chat, "Why?", 0, 1) == "<video>Why?"
    assert seen[-1] == ["video", "text"]


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_prompts_that_do_not_fit_their_videos(models: Any, family: str) -> None:
    model = build(models, family)
    inputs = inputs_of(model, [[4, "video", 6]])
    short = {**inputs, "input_ids": inputs["input_ids"][:, 1:].clone()}
    short["input_ids"][0, 4] = 5
    short["attention_mask"] = inputs["attention_mask"][:, 1:]
    flat = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][0]}
    with tokprune.compress(model, "random", keep=4), torch.no_grad():
        with pytest.raises(tokprune.PromptMismatchError, match="video placeholder tokens"):
            model(**short)
        with pytest.raises(ValueError, match="videos, frames"):
            model(**flat)
        model(**inputs)


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
def test_nothing_is_left_of_a_patch(family: str) -> None:
    model = VIDEO_BUILDERS[family]()
    inputs = inputs_of(model, [[4, "video", 6], [2, "image", 5]])
    with torch.no_grad():
        want = model(**inputs).logits
        before = {n: sorted(m.__dict__) for n, m in model.named_modules()}
        hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks)
                 for n, m in model.named_modules()}  # fmt: skip
        for method in ("divprune", "fastv", "visionzip"):
            with tokprune.compress(model, method, keep=5):
                assert "get_video_features" in model.model.__dict__
        assert torch.equal(model(**inputs).logits, want)
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == before
    assert hooks == {n: len(m._forward_hooks) + len(m._forward_pre_hooks)
                     for n, m in model.named_modules()}  # fmt: skip
