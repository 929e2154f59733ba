"""Golden checks of cdpruner: relevance, kernel and selection, and whole models with CLIP's text."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import tokprune
from golden_checks.case import Case, assert_close, assert_equal
from golden_checks.models import (
    Watched,
    fill,
    greedy_tokens,
    image_inputs,
    load_llava,
    run,
    suffixes,
)
from tokprune.methods.cdpruner import CDPruner
from tokprune.methods.clip_relevance import ClipRelevance
from tokprune.operators.cdpruner import minmax_relevance, text_similarity
from tokprune.operators.dpp import conditional_kernel, dpp_map, dpp_map_from_kernel


def _relevance(case: Case) -> Tensor:
    """[B, N], stretched over the whole call as the official code does; as recorded where the
    embeddings are not."""
    if "image_embeds" not in case or "text_embeds" not in case:
        return case["relevance"].float()
    score = -text_similarity(case["image_embeds"], case["text_embeds"])
    return minmax_relevance(score.flatten()).view_as(score)


def _compare(case: Case, order: Tensor, features: Tensor) -> None:
    case.equal(order, "order")
    keep = order.sort(-1).values
    case.equal(keep, "keep")
    mask = torch.zeros(features.shape[:2], dtype=torch.bool).scatter(1, keep, True)
    case.equal(mask, "mask")


def check_select(case: Case) -> None:
    p, features = case.parameters, case["image_features"]
    half = features.dtype == torch.float16
    relevance = _relevance(case)
    case.close(relevance, "relevance")
    _compare(case, dpp_map(features, p["T"], relevance), features)
    if "kernel" in case:
        # the official code divides half-precision features by their norm in half precision
        kernel = conditional_kernel(features, relevance)
        case.close(kernel, "kernel", 2e-3 if half else 1e-5)
        _compare(case, dpp_map_from_kernel(case["kernel"], p["T"]), features)


def load_clip(case: Case) -> Any:
    """The CLIPModel that the case's tower belongs to."""
    p = case.parameters
    vision, text = dict(p["config"]["vision_config"]), dict(p["clip_text_config"])
    for config in (vision, text):
        for name in ("model_type", "transformers_version", "architectures", "dtype"):
            config.pop(name, None)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=p["projection_dim"])
    config._attn_implementation = "eager"
    clip = CLIPModel(config).eval()
    fill(clip.text_model, case.weights("w.clip.text_model."))
    fill(clip.vision_model, case.weights("w.vision_tower."))
    given = case.weights("w.clip.")
    with torch.no_grad():
        for name in ("visual_projection", "text_projection"):
            getattr(clip, name).weight.copy_(given[f"{name}.weight"])
    return clip


@dataclass(frozen=True, eq=False)
class Asked(ClipRelevance):
    """Remembers the projected patches of every run, [tiles, T, P]."""

    seen: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def project(self, patches: Tensor) -> Tensor:
        projected = super().project(patches)
        self.seen.append(projected)
        return projected


def check_e2e(case: Case) -> None:
    """Each sample alone, eager and sdpa."""
    clip = load_clip(case)
    weights = {k: v for k, v in case.weights().items() if not k.startswith("clip.")}
    for attention in ("eager", "sdpa"):
        model = load_llava(weights, case.parameters["config"], attention)
        for tail in suffixes(case, "hf_input_ids"):
            _check_run(case, model, clip, tail)


def _inputs(case: Case, model: Any, tail: str) -> dict[str, Tensor]:
    """The official prompt, with as many placeholders as the model's own packing needs: where there
    are tiles it adds a newline token to every row, which the official code leaves out."""
    p = case.parameters
    if p["tiles"] == 1:
        return image_inputs(case, [tail], "hf_input_ids")
    from tiny import tokens_of

    vision = p["config"]["vision_config"]
    side = round((p["tiles"] - 1) ** 0.5) * vision["image_size"]
    token = model.config.image_token_id
    ids = case["hf_input_ids" + tail].view(-1).tolist()
    start = ids.index(token)
    number = ids.count(token)
    assert ids[start : start + number] == [token] * number, "placeholders apart"
    ids[start : start + number] = [token] * tokens_of(model, (side, side))
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": case["pixel_values" + tail].float()[None],
        "image_sizes": torch.tensor([[side, side]]),
    }


def _check_run(case: Case, model: Any, clip: Any, tail: str) -> None:
    p = case.parameters
    case.aside(*(name + tail for name in ("text_chunks", "input_ids")))  # the same, otherwise put
    asked = Asked(clip, case["text_ids" + tail].view(-1).tolist())
    case.close(asked.embeds[0], "text_embeds" + tail)
    tiles, kept_each = p["tiles"], p["T"]
    method = Watched(CDPruner(tiles * kept_each, asked, relevance_scope="call"))
    tokens = greedy_tokens(case, [tail])
    inputs = _inputs(case, model, tail)
    with tokprune.compress(model, method) as trace:
        got = run(model, inputs, tokens)
    last: Any = trace.last
    image = method.images[0]
    stage: Any = method.plans[0].prompt[0]

    # our tokens as (tile, patch), newline tokens aside
    patch = ~image.newline
    slot = (image.tile * image.grid[0] + image.row) * image.grid[1] + image.col
    width = image.grid[0] * image.grid[1]
    own = image.features[patch]
    (relevance,) = stage.relevance([image])
    for name, value in (("features", own), ("relevance", relevance[patch])):
        want = case.output(name + tail)
        if want is not None:
            assert_close(value, want.flatten(0, 1)[slot[patch]], name)
    kept = slot[last.images[0].selection.index]
    assert not image.newline[last.images[0].selection.index].any()
    case.equal(kept, "packed_slot" + tail)
    by_tile = torch.stack([kept[kept // width == t].sort().values % width for t in range(tiles)])
    case.equal(by_tile, "keep" + tail)
    case.close(asked.seen[0], "image_embeds" + tail)
    place = slot[patch].argsort()
    assert_equal(slot[patch][place], torch.arange(tiles * width), "all patches")
    x, r = (y[patch][place].unflatten(0, (tiles, width)) for y in (image.features, relevance))
    case.equal(dpp_map(x, kept_each, r), "order" + tail)
    mask = torch.zeros(tiles, width, dtype=torch.bool).scatter(1, by_tile, True)
    case.equal(mask, "mask" + tail)
    case.close(got.entered[0], "inputs_embeds" + tail)
    case.close(got.hidden[0], "hidden_last" + tail)
    if tokens is not None:
        case.equal(got.logits[0, : tokens.shape[1]].argmax(-1), "tokens" + tail)
    case.close(got.logits[0], "logits" + tail)


CHECKS = {
    "cdpruner.e2e_llava": check_e2e,
    "cdpruner.e2e_llava_next": check_e2e,
    "cdpruner.select": check_select,
}
