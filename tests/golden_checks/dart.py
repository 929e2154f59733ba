"""Golden checks of dart: pivots and retained tokens, and a decoder that drops by them."""

from typing import Any

import torch

import tokprune
from golden_checks.case import Case, assert_equal
from golden_checks.models import Watched, load_llama, one_prompt, padded_embeds, run
from golden_checks.staged import close_steps, decode_steps
from tokprune.methods.dart import DART
from tokprune.operators.dart import dart, key_norms


def budget(p: Any) -> int:
    """Image tokens that the official code retains, by its rules for the number per pivot."""
    n, pivots = p["image_token_length"], p["pivot_image_token"] + p["pivot_text_token"]
    if "per_pivot" in p:
        each = p["per_pivot"]
    elif p["max_num_trunction"] is not None:
        each = p["max_num_trunction"] // pivots
    else:
        each = int(n * (1 - p["reduction_ratio"]) / pivots)
    return int(p["pivot_image_token"] + each * pivots)


def check_select(case: Case) -> None:
    p, keys, hidden = case.parameters, case["keys"], case["hidden"]
    length, keep = hidden.shape[1], budget(p)
    arange = torch.arange(length)
    start = p["image_token_start_index"]
    end = start + p["image_length_used"]
    image = ((arange >= start) & (arange < end))[None, None]
    text = (arange >= end)[None, None]
    v, t = p["pivot_image_token"], p["pivot_text_token"]
    for heads in (keys, keys.repeat_interleave(2, 1)):  # repeated heads change no ranking
        got = dart(key_norms(heads), hidden, image, text, torch.tensor([[keep]]), v, t, "official")
        case.equal(got.image_pivots[0, 0], "image_pivots")
        case.equal(got.text_pivots[0, 0], "text_pivots")
        case.equal(got.order[0, 0], "pivot_order")
        retained = got.mask[0, 0].nonzero().view(-1)
        case.equal(retained, "retained")
        if (raw := case.output("retained_raw_order")) is not None:
            assert_equal(retained, raw.sort().values, "retained_raw_order, sorted")
        assert len(retained) == keep
        case.told(len(retained), "retained")


def check_e2e(case: Case) -> None:
    """Prefill from embeddings and two decode steps, alone and in a left-padded batch."""
    p, embeds = case.parameters, case["inputs_embeds"]
    start, length, layer = p["image_token_start_index"], embeds.shape[1], p["K"]
    image = slice(start, start + p["image_token_length"])
    alone = one_prompt(embeds, image)
    steps = decode_steps(case)
    for attention in ("eager", "sdpa"):
        model = load_llama(case.weights(), p["config"], attention)
        if "logits_unpruned" in case:
            case.close(run(model, alone).prefill, "logits_unpruned")
        for gap, inputs in ((0, alone), (3, padded_embeds(embeds, image, 3))):
            method = Watched(
                DART(
                    budget(p),
                    prune_before=layer,
                    image_pivots=p["pivot_image_token"],
                    text_pivots=p["pivot_text_token"],
                )
            )
            batch = len(inputs["attention_mask"])
            own = [step.expand(batch, -1, -1) for step in steps]
            with tokprune.compress(model, method) as trace:
                got = run(model, inputs, embeds=own)
            last: Any = trace.last
            for number, seen in enumerate(last.layers):
                kept = seen.column[0][seen.column[0] >= 0] - gap
                if number < layer:
                    assert_equal(kept, torch.arange(length), f"layer {number}")
                else:
                    case.equal(kept, "keep", where=f"of layer {number}")
                positions = seen.position[0][seen.column[0] >= 0]
                assert_equal(positions, kept, f"positions of layer {number}")
            lengths = torch.tensor([seen.lengths[0] for seen in last.layers])
            case.equal(lengths, "kv_lengths")
            if batch == 1:
                cached = torch.tensor(got.cache_lengths()) - len(steps)
                case.equal(cached, "kv_lengths")
            case.close(got.prefill[:1, -int(lengths[-1]) :], "logits")
            close_steps(case, got)


CHECKS = {"dart.e2e_llama": check_e2e, "dart.select": check_select}
