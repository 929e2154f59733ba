"""Golden checks of sparsevlm: raters, scores and counts, recycling, and whole decoders."""

from typing import Any

import torch

from golden_checks.case import Case, assert_equal
from golden_checks.models import Watched, load_llama, one_prompt, padded_embeds, run
from golden_checks.staged import check_end, image_of, run_recorded
from tokprune.methods.sparsevlm import SparseVLM
from tokprune.operators.sparsevlm import (
    attention_rank,
    best_heads,
    fixed_count,
    rank_count,
    rater_attention,
    recycle_merge,
    rotary_weight,
    text_raters,
    text_relevance,
    vision_scores,
)
from tokprune.operators.topk import keep_topk

#: the official code knows a keep list by the layer that prunes
_LAYER = {2: 0, 6: 1, 15: 2}


def _image(case: Case, length: int) -> torch.Tensor:
    """[1, L] bool."""
    start = case.parameters["image_start"]
    image = torch.zeros(1, length, dtype=torch.bool)
    image[:, start : start + case.parameters["image_len"]] = True
    return image


def _rows(case: Case) -> torch.Tensor:
    """Places of the raters, [1, R]."""
    p = case.parameters
    return case["rater_idx"].view(1, -1) + p["image_start"] + p["image_len"]


def check_text_raters(case: Case) -> None:
    embeds = case["inputs_embeds"]
    p = case.parameters
    text = torch.arange(p["image_start"] + p["image_len"], embeds.shape[1])[None]
    relevance = text_relevance(embeds, _image(case, embeds.shape[1]), text)
    case.close(relevance, "relevance")
    case.equal(text_raters(relevance)[0].nonzero().view(-1), "rater_idx")


def _check_kept(case: Case, probs: torch.Tensor, keep: int) -> None:
    """Scores and kept tokens of rater rows [1, H, R, L]."""
    raters = torch.ones(1, probs.shape[2], dtype=torch.bool)
    image = _image(case, probs.shape[3])
    score = vision_scores(rater_attention(probs, raters), raters)[image][None]
    case.close(score, "relevance")
    _check_mask(case, keep_topk(score[0], keep))


def _check_mask(case: Case, kept: torch.Tensor) -> None:
    if (mask := case.output("mask")) is not None:
        assert_equal(kept, mask.view(-1).nonzero().view(-1), "mask")


def _rater_rows(case: Case) -> torch.Tensor:
    """[1, H, R, L], as recorded or out of the whole map."""
    if "attn_rater_rows" in case:
        case.aside("rater_idx")
        return case["attn_rater_rows"]
    attn = case["attn"]
    index = _rows(case)[:, None, :, None].expand(-1, attn.shape[1], -1, attn.shape[3])
    return attn.gather(2, index)


def check_topk(case: Case) -> None:
    p = case.parameters
    keep = p["keep_list"][_LAYER[p["layer_idx"]]]
    keep = fixed_count(keep, p["image_len"], always_drop=True)
    _check_kept(case, _rater_rows(case), keep)


def check_rank(case: Case) -> None:
    p, probs = case.parameters, _rater_rows(case)
    scale = {"scale": p["scale"], "bias": p["bias"]} if p["scale"] else {"scale": 1.0, "bias": 0.0}
    raters = torch.ones(1, probs.shape[2], dtype=torch.bool)
    found = int(attention_rank(probs, raters, _image(case, probs.shape[3])))
    keep = rank_count(found, p["image_len"], always_drop=True, **scale)
    case.told(keep, "kept")
    _check_kept(case, probs, keep)


def check_v2(case: Case) -> None:
    p, probs = case.parameters, _rater_rows(case)
    length = probs.shape[3]
    position = case["position_ids"].view(-1) if "position_ids" in case else torch.arange(length)
    half = p["head_dim"] // 2
    angle = position[:, None] * p["rope_theta"] ** (-torch.arange(half).double() / half)
    cos, sin = (x.float().repeat(1, 2)[None] for x in (angle.cos(), angle.sin()))
    weight = rotary_weight(cos, sin, _rows(case), least=None)
    case.close(weight, "rope_bias_rows")
    raters = torch.ones(1, probs.shape[2], dtype=torch.bool)
    image = _image(case, length)
    total = rater_attention(probs, raters, weight)
    case.close(total[0][:, image[0]].sum(1), "head_sums")
    heads = best_heads(total, image, p["top_heads"])
    case.equal(heads[0], "heads")
    score = vision_scores(total, raters, heads)[image][None]
    case.close(score, "relevance")
    keep = p["keep_list"][_LAYER[p["layer_idx"]]]
    _check_mask(case, keep_topk(score[0], keep))


def check_recycle(case: Case) -> None:
    x = case["x"]
    found = recycle_merge(x, case.parameters["cluster_num"])
    case.close(found.out, "out")
    # the same as a padded sample among others
    other = torch.randn(1, x.shape[1] + 4, x.shape[2], generator=torch.Generator().manual_seed(0))
    padded = torch.cat([x, torch.full_like(x[:, :4], 7.0)], dim=1)
    valid = torch.ones(2, padded.shape[1], dtype=torch.bool)
    valid[0, -4:] = False
    both = recycle_merge(
        torch.cat([padded, other]), case.parameters["cluster_num"] + 2,
        torch.tensor([case.parameters["cluster_num"], 2]), valid,
    )  # fmt: skip
    k = case.parameters["cluster_num"]
    case.close(both.out[:1, :k], "out", where="in a batch")
    assert_equal(both.centre[:1, :k], found.centre, "centre in a batch")
    assert_equal(both.cluster[0, :-4], found.cluster[0], "cluster in a batch")


class _Recorder(Watched):
    """Also remembers scores and kept tokens of each step, of row 0's image."""

    def recorded(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        made: Any = self.runs[-1]
        before_layer = made.before_layer

        def watched(layer: int, hidden: Any, sequence: Any, scoring: Any) -> Any:
            keep = before_layer(layer, hidden, sequence, scoring)
            if keep is not None:
                own = sequence.visual[0]
                steps.append((made.score[0, own], made.kept[0, own]))
            return keep

        made.before_layer = watched
        return steps


def check_e2e(case: Case) -> None:
    """Prefill from embeddings, alone and as a row of a left-padded batch."""
    image = image_of(case)
    alone = one_prompt(case["inputs_embeds"], image)
    for attention in ("eager", "sdpa"):
        model = load_llama(case.weights(), case.parameters["config"], attention)
        if "logits_unpruned" in case:
            case.close(run(model, alone).prefill, "logits_unpruned")
        for gap, inputs in ((0, alone), (3, padded_embeds(alone["inputs_embeds"], image, 3))):
            _check_run(case, model, gap, inputs)


def _check_run(case: Case, model: Any, gap: int, inputs: dict[str, torch.Tensor]) -> None:
    p = case.parameters
    version = {"1_0": "v1", "2_0": "plus"}[p["version"]]
    layers = tuple(layer + 1 for layer in p["pruning_layers"])
    method = _Recorder(
        SparseVLM(tuple(p["keep_list"]), version, prune_before=layers, gravity_floor=None)  # type: ignore[arg-type]
    )
    last, got, recorded = run_recorded(model, method, inputs)
    assert len(recorded) == len(layers)
    for i, (score, kept) in enumerate(recorded):
        case.close(score[None], f"stage{i}_relevance")
        case.equal(kept[None], f"stage{i}_keep_mask")
    for layer in layers:
        seen = last.layers[layer]
        positions = seen.position[0][seen.column[0] >= 0][None]
        case.equal(positions, f"positions_layer{layer}")
    check_end(case, last, got, gap)


CHECKS = {
    "sparsevlm.e2e_llama_v1": check_e2e,
    "sparsevlm.e2e_llama_v2": check_e2e,
    "sparsevlm.recycle_merge": check_recycle,
    "sparsevlm.text_raters": check_text_raters,
    "sparsevlm.vision_scores_rank_init": check_rank,
    "sparsevlm.vision_scores_rank_video": check_rank,
    "sparsevlm.vision_scores_topk": check_topk,
    "sparsevlm.vision_scores_v2": check_v2,
}
