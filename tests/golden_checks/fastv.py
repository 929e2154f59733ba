"""Golden checks of fastv: last-row ranking, and a decoder that drops by it."""

from typing import Any

import torch

import tokprune
from golden_checks.case import Case, assert_close, assert_equal
from golden_checks.models import Watched, load_llama, one_prompt, padded_embeds, run
from golden_checks.staged import image_of
from tokprune.methods.fastv import FastV
from tokprune.operators.attention import mean_rows
from tokprune.operators.topk import rank, segment_topk


def _last_row(case: Case) -> torch.Tensor:
    """[H, L], from a full map [1, H, L, L], one row of it [1, H, 1, L], or [(1,) H, L]."""
    attn = case[next((name for name in case.t if name.startswith("attn")), "attn")]
    row = attn[..., -1, :] if attn.dim() == 4 else attn
    return row.reshape(-1, attn.shape[-1])


def check_select(case: Case) -> None:
    p = case.parameters
    start, n, k = p["image_start"], p["image_len"], p["keep"]
    row = _last_row(case)
    half = p["dtype"] == "float16"
    whole = mean_rows(row[:, None])
    score = whole[start : start + n]
    case.close(score, "scores", 1e-3 if half else 1e-5)
    segment = torch.full((1, len(whole)), -1)
    segment[0, start : start + n] = 0
    mask = segment_topk(whole[None], segment, torch.tensor([[k]])) | (segment < 0)
    keep = mask[0].nonzero()[:, 0]
    top = rank(score)[:k] + start
    image = keep[(keep >= start) & (keep < start + n)]
    assert_equal(image, top.sort().values, "keep against the ranking")
    if not half:
        case.equal(keep, "keep")
        case.equal(top, "topk_by_score")
        return
    # The official mean is rounded to half: tokens it ties may swap places.
    want, recorded = case.output("topk_by_score"), case.output("keep")
    if recorded is not None:
        inside = (recorded >= start) & (recorded < start + n)
        outside = (keep < start) | (keep >= start + n)
        assert_equal(keep[outside], recorded[~inside], "text tokens")
        assert len(keep) == len(recorded), "number kept"
        want = recorded[inside] if want is None else want
        assert_equal(want.sort().values, recorded[inside], "keep and topk_by_score")
    if want is None:
        return
    if "topk_by_score" in case:
        assert_close(score[top - start], score[want - start], "scores in rank order", 1e-3)
    for index in set(image.tolist()) ^ set(want.tolist()):
        cut = score[top - start].min()
        assert abs(score[index - start] - cut) <= 1e-3 * cut, f"token {index} is not at the cut"


def check_e2e(case: Case) -> None:
    """Prefill from embeddings, alone and as a row of a left-padded batch."""
    p, embeds = case.parameters, case["inputs_embeds"]
    image, length, layer = image_of(case), embeds.shape[1], p["K"]
    alone = one_prompt(embeds, image)
    for attention in ("eager", "sdpa"):
        model = load_llama(case.weights(), p["config"], attention)
        if "logits_unpruned" in case:
            case.close(run(model, alone).prefill, "logits_unpruned")
        for gap, inputs in ((0, alone), (3, padded_embeds(embeds, image, 3))):
            method = Watched(FastV(p["keep"], prune_before=layer))
            with tokprune.compress(model, method) as trace:
                got = run(model, inputs)
            last: Any = trace.last
            if (row := case.output("attn_last_row")) is not None:
                score: Any = method.runs[0].score  # type: ignore[attr-defined]
                assert_close(score[0, gap:], row.reshape(-1, length).mean(0), "score")
            for number, seen in enumerate(last.layers):
                kept = seen.column[0][seen.column[0] >= 0] - gap
                if number < layer:
                    assert_equal(kept, torch.arange(length), f"tokens of layer {number}")
                else:
                    case.equal(kept, "keep", where=f"of layer {number}")
                    positions = seen.position[0][seen.column[0] >= 0]
                    assert_equal(positions, kept, f"positions of layer {number}")
                assert seen.lengths[0] == len(kept)
            kept_rows = slice(-len(kept), None)
            hidden = got.outputs[layer][:1, kept_rows]
            case.close(hidden, "hidden_after_prune_layer")
            case.close(got.prefill[:1, kept_rows], "logits")
            if (variant := case.output("logits_mask_variant")) is not None:
                own = got.prefill[:1, kept_rows]
                assert_close(own, variant[:, kept], "logits_mask_variant")


CHECKS = {"fastv.e2e_llama": check_e2e, "fastv.select": check_select}
