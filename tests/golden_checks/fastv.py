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
    attn = next(v for name, v in case.t.items() if name.startswith("attn"))
    row = attn[..., -1, :] if attn.dim() == 4 else attn
    return row.reshape(-1, attn.shape[-1])


def check_select(case: Case) -> None:
    p = case.parameters
    start, n, k = p["image_start"], p["image_len"], p["keep"]
    row = _last_row(case)
    half = p["dtype"] == "float16"
    whole = mean_rows(row[:, None])
    score = whole[start : start + n]
    assert_close(score, case["scores"], "scores", 1e-3 if half else 1e-5)
    segment = torch.full((1, len(whole)), -1)
    segment[0, start : start + n] = 0
    mask = segment_topk(whole[None], segment, torch.tensor([[k]])) | (segment < 0)
    keep = mask[0].nonzero()[:, 0]
    top = rank(score)[:k] + start
    image = keep[(keep >= start) & (keep < start + n)]
    assert_equal(image, top.sort().values, "keep against the ranking")
    if not half:
        assert_equal(keep, case["keep"], "keep")
        assert_equal(top, case["topk_by_score"], "topk_by_score")
        return
    # The official mean is rounded to half: tokens it ties may swap places.
    assert_equal(torch.tensor(len(keep)), torch.tensor(len(case["keep"])), "number kept")
    want = case["topk_by_score"]
    assert_close(score[top - start], score[want - start], "scores in rank order", 1e-3)
    assert set(keep.tolist()) - set(image.tolist()) == set(case["keep"].tolist()) - set(
        want.tolist()
    ), "text tokens"
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
        plain = run(model, alone).prefill
        assert_close(plain, case["logits_unpruned"], "logits_unpruned")
        for gap, inputs in ((0, alone), (3, padded_embeds(embeds, image, 3))):
            method = Watched(FastV(p["keep"], prune_before=layer))
            with tokprune.compress(model, method) as trace:
                got = run(model, inputs)
            last: Any = trace.last
            want = case["keep"]
            if "attn_last_row" in case:
                score: Any = method.runs[0].score  # type: ignore[attr-defined]
                row = case["attn_last_row"].reshape(-1, length)
                assert_close(score[0, gap:], row.mean(0), "score")
            for number, seen in enumerate(last.layers):
                kept = seen.column[0][seen.column[0] >= 0] - gap
                if number < layer:
                    assert_equal(kept, torch.arange(length), f"tokens of layer {number}")
                else:
                    assert_equal(kept, want, f"keep of layer {number}")
                    positions = seen.position[0][seen.column[0] >= 0]
                    assert_equal(positions, want, f"positions of layer {number}")
                assert seen.lengths[0] == len(kept)
            kept_rows = slice(-len(want), None)
            hidden = got.outputs[layer][:1, kept_rows]
            assert_close(hidden, case["hidden_after_prune_layer"], "hidden_after_prune_layer")
            assert_close(got.prefill[:1, kept_rows], case["logits"], "logits")
            variant = case["logits_mask_variant"][:, want]
            assert_close(got.prefill[:1, kept_rows], variant, "logits_mask_variant")


CHECKS = {"fastv.e2e_llama": check_e2e, "fastv.select": check_select}
