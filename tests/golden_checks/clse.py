"""Golden checks of clse: detail of tokens on grids, scores, and three cuts of a decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokprune
from golden_checks.case import Case, assert_equal
from golden_checks.models import _rope, fill, run
from tokprune.methods.clse import CLSE
from tokprune.operators.clse import evolution, spectral
from tokprune.operators.topk import keep_topk


def check_spectral(case: Case) -> None:
    p = case.parameters
    _, height, width = p["grid"]
    case.close(spectral(case["features"], (height, width), p["cutoff"]), "scores")


def check_score(case: Case) -> None:
    p, attention = case.parameters, case["attention"].float()
    grid = tuple(p["grid"][1:])
    before, after = (spectral(case[name], grid, p["cutoff"]) for name in ("first", "second"))
    factor = evolution(before, after, p["temperature"])
    score = {"clse": factor, "attn": attention, "clse_attn": factor * attention}[p["score"]]
    # the sigmoid is steep: rounding of another transform comes out several times as large
    case.close(factor, "factor", 5e-5)
    case.close(score, "scores", 5e-5)
    case.equal(keep_topk(score, p["keep"]), "keep")


def _llava(case: Case) -> Any:
    """A LLaVA around the case's Llama whose projector gives the case's features, on a square; the
    vocabulary has a placeholder more."""
    config, features = _rope(case.parameters["config"]), case["features"]
    placeholder, side = config.pop("vocab_size"), math.isqrt(len(features))
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        image_size=2 * side, patch_size=2, projection_dim=8,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=placeholder + 1, **config)
    made = LlavaConfig(vision_config=vision, text_config=text, image_token_index=placeholder)
    model = LlavaForConditionalGeneration(made).eval()
    weights = case.weights()
    words = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([words, torch.zeros_like(words[:1])])
    weights.pop("lm_head.weight", None)
    fill(model, weights, without=("vision_tower", "multi_modal_projector", "lm_head"))
    projector: nn.Module = model.model.multi_modal_projector
    projector.register_forward_hook(
        lambda module, args, output: features.expand(args[0].shape[0], -1, -1)
    )
    return model


def check_e2e(case: Case) -> None:
    """Alone, and as a row of a left-padded batch beside a longer prompt."""
    p, count = case.parameters, len(case["features"])
    system, text = case["sys_ids"].view(-1), case["txt_ids"].view(-1)
    image = torch.full((count,), p["config"]["vocab_size"])
    own = torch.cat([system, image, text])
    longer = torch.cat([system, system[:3], image, text])
    model = _llava(case)
    method = CLSE(
        tuple(p["budgets"]), prune_before=tuple(p["prune_layers"]), cut_earlier_caches=True
    )
    for gap, rows in ((0, [own]), (3, [torch.cat([own[:3], own]), longer])):
        ids = torch.stack(rows)
        mask = torch.ones_like(ids)
        mask[0, :gap] = 0
        pixels = torch.zeros(len(rows), 3, *2 * (2 * math.isqrt(count),))
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        with tokprune.compress(model, method) as trace:
            got = run(model, inputs)
        _check(case, trace.last, got, gap + len(system))


def _check(case: Case, last: Any, got: Any, start: int) -> None:
    for number, layer in enumerate(case.parameters["prune_layers"]):
        seen = last.layers[layer]
        case.equal(seen.column[0][seen.segment[0] >= 0] - start, f"keep_{number}")
    text = len(case["txt_ids"].view(-1))
    want = case.output("hidden_text")
    assert want is not None
    case.close(got.hidden[0, -text:], "hidden_text")
    lengths = torch.tensor([layer.cached[0] for layer in last.layers])
    case.equal(lengths, "cache_lengths")
    longest = torch.tensor([max(layer.cached) for layer in last.layers])
    assert_equal(torch.tensor(got.cache_lengths()), longest, "entries of the cache")


CHECKS = {
    "clse.e2e_llama": check_e2e,
    "clse.score": check_score,
    "clse.spectral": check_spectral,
}
