"""Golden checks of sparsevlm: raters, scores and counts, recycling, and whole decoders."""

from typing import Any

import torch

from golden_checks.case import Case, assert_close, assert_equal
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
    assert_close(relevance, case["relevance"], "relevance")
    assert_equal(text_raters(relevance)[0].nonzero().view(-1), case["rater_idx"], "rater_idx")


def _check_kept(case: Case, probs: torch.Tensor, keep: int) -> None:
    """Scores and kept tokens of rater rows [1, H, R, L]."""
    raters = torch.ones(1, probs.shape[2], dtype=torch.bool)
    image = _image(case, probs.shape[3])
    score = vision_scores(rater_attention(probs, raters), raters)[image][None]
    assert_close(score, case["relevance"], "relevance")
    kept = keep_topk(score[0], keep)
    assert_equal(kept, case["mask"].view(-1).nonzero().view(-1), "mask")


def check_topk(case: Case) -> None:
    p, attn = case.parameters, case["attn"]
    index = _rows(case)[:, None, :, None].expand(-1, attn.shape[1], -1, attn.shape[3])
    keep = p["keep_list"][_LAYER[p["layer_idx"]]]
    _check_kept(case, attn.gather(2, index), fixed_count(keep, p["image_len"], always_drop=True))


def check_rank(case: Case) -> None:
    p, probs = case.parameters, case["attn_rater_rows"]
    scale = {"scale": p["scale"], "bias": p["bias"]} if p["scale"] else {"scale": 1.0, "bias": 0.0}
    raters = torch.ones(1, probs.shape[2], dtype=torch.bool)
    found = int(attention_rank(probs, raters, _image(case, probs.shape[3])))
    keep = rank_count(found, p["image_len"], always_drop=True, **scale)
    assert keep == p["kept"]
    _check_kept(case, probs, keep)


def check_v2(case: Case) -> None:
    p, probs = case.parameters, case["attn_rater_rows"]
    length = probs.shape[3]
    position = case["position_ids"].view(-1) if "position_ids" in case else torch.arange(length)
    half = p["head_dim"] // 2
    angle = position[:, None] * p["rope_theta"] ** (-torch.arange(half).double() / half)
    cos, sin = (x.float().repeat(1, 2)[None] for x in (angle.cos(), angle.sin()))
    weight = rotary_weight(cos, sin, _rows(case))
    assert_close(weight, case["rope_bias_rows"], "rope_bias_rows")
    raters = torch.ones(1, probs.shape[2], dtype=torch.bool)
    image = _image(case, length)
    total = rater_attention(probs, raters, weight)
    assert_close(total[0][:, image[0]].sum(1), case["head_sums"], "head_sums")
    heads = best_heads(total, image, p["top_heads"])
    assert_equal(heads[0], case["heads"], "heads")
    score = vision_scores(total, raters, heads)[image][None]
    assert_close(score, case["relevance"], "relevance")
    keep = p["keep_list"][_LAYER[p["layer_idx"]]]
    assert_equal(keep_topk(score[0], keep), case["mask"].view(-1).nonzero().view(-1), "mask")


def check_recycle(case: Case) -> None:
    x = case["x"]
    found = recycle_merge(x, case.parameters["cluster_num"])
    assert_close(found.out, case["out"], "out")
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
    assert_close(both.out[:1, :k], case["out"], "out in a batch")
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
        assert_close(run(model, alone).prefill, case["logits_unpruned"], "logits_unpruned")
        for gap, inputs in ((0, alone), (3, padded_embeds(alone["inputs_embeds"], image, 3))):
            _check_run(case, model, gap, inputs)


def _check_run(case: Case, model: Any, gap: int, inputs: dict[str, torch.Tensor]) -> None:
    p = case.parameters
    version = {"1_0": "v1", "2_0": "plus"}[p["version"]]
    layers = tuple(layer + 1 for layer in p["pruning_layers"])
    method = _Recorder(
        SparseVLM(tuple(p["keep_list"]), version, prune_before=layers)  # type: ignore[arg-type]
    )
    last, got, recorded = run_recorded(model, method, inputs)
    assert len(recorded) == len(layers)
    for i, (score, kept) in enumerate(recorded):
        assert_close(score[None], case[f"stage{i}_relevance"], f"stage{i}_relevance")
        assert_equal(kept[None], case[f"stage{i}_keep_mask"], f"stage{i}_keep_mask")
    for layer in layers:
        seen = last.layers[layer]
        positions = seen.position[0][seen.column[0] >= 0][None]
        assert_equal(positions, case[f"positions_layer{layer}"], f"positions_layer{layer}")
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
