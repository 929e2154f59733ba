"""Golden checks of mustdrop."""

import torch
from torch import Tensor

from golden_checks.case import Case, assert_close, assert_equal
from tokprune.operators.mustdrop import (
    cache_policy,
    dual_filter,
    filter_score,
    key_mask,
    key_scores,
    key_tokens,
    text_attention,
)
from tokprune.operators.windows import WindowMerge, spatial_merge, spatial_merge_fixed


def tolerance(*tensors: Tensor) -> float:
    """Recorded in half precision, computed by us in float32: 2e-3."""
    return 2e-3 if any(t.dtype == torch.float16 for t in tensors) else 1e-5


def check_spatial_merge(case: Case) -> None:
    p, x = case.parameters, case["x"]
    merge = spatial_merge(x, p["threshold"], tuple(p["window"]))
    compare_merge(case, merge)
    together = torch.full((len(x),), 7)
    assert_equal(
        spatial_merge(x, p["threshold"], tuple(p["window"]), share=together).r, merge.r, "r"
    )


def check_spatial_merge_fixed(case: Case) -> None:
    p, x = case.parameters, case["x"]
    merge = spatial_merge_fixed(x, tuple(p["window"]), p["retained_tokens"])
    compare_merge(case, merge)
    alive = torch.zeros(x.shape[0], x.shape[1] - 1, dtype=torch.bool).scatter(1, merge.rows, True)
    assert_equal(alive, case["index_mask"], "index_mask")


def compare_merge(case: Case, merge: WindowMerge) -> None:
    x, rtol = case["x"], tolerance(case["x"])
    assert merge.out.dtype == x.dtype
    assert merge.valid.all()
    assert merge.counts == [merge.out.shape[1]] * len(x)
    assert_close(merge.similarity, case["window_sim"], "window_sim", rtol)
    assert_equal(merge.r, case["r"].expand(len(x)), "r")
    for name in ("dst", "unmerged", "group", "size"):
        assert_equal(getattr(merge, name), case[name], name)
    assert_close(merge.out, case["out"], "out", rtol)
    assert_equal(merge.rows, torch.cat([case["dst"], case["unmerged"]], dim=1), "rows")


def check_key_tokens(case: Case) -> None:
    rows, rate = case["cls_row"], case.parameters["keep_rate"]
    assert_close(key_scores(rows), case["score"], "score", tolerance(rows))
    index = key_tokens(rows, rate)
    assert_equal(index, case["index"], "index")
    everything = torch.ones(rows.shape[0], rows.shape[2] - 1, dtype=torch.bool)
    assert_equal(key_tokens(rows, rate, everything), index, "index with valid")


def check_dual_filter(case: Case) -> None:
    p, attn = case.parameters, case["attn"]
    gamma, alpha = p["global_thr"], p["individual_thr"]
    keys = key_mask(case["key_set"], attn.shape[-1])
    total, peak = text_attention(attn)
    assert_close(total / total.sum(), case["share"], "share")
    assert_close(peak, case["max"], "max")
    alone = dual_filter(attn, None, gamma, alpha)
    assert_equal(alone.nonzero()[:, 0], case["filter_keep"], "filter_keep")
    assert_equal(filter_score(total, peak, gamma, alpha) >= 1, alone, "filter_score")
    keep = dual_filter(attn, keys, gamma, alpha)
    assert_equal(keep.nonzero()[:, 0], case["keep"], "keep")
    assert_equal(keys[keep].nonzero()[:, 0], case["key_set_next"], "key_set_next")
    assert_equal(dual_filter(attn[None], keys[None], gamma, alpha)[0], keep, "keep in a batch")


def check_cache_policy(case: Case) -> None:
    p = case.parameters
    start, text, cuts, layers = (
        p[name] for name in ("image_start", "text_len", "pruning_layers", "num_layers")
    )
    keeps = [case[f"stage_keep_{i}"] for i in range(len(cuts))]
    index = cache_policy(keeps, start, p["image_len"], text, layers, cuts)
    images = [p["image_len"], *(len(keep) for keep in keeps)]
    before = [start + images[sum(cut < layer for cut in cuts)] + text for layer in range(layers)]
    whole = [torch.arange(n) if at is None else at for at, n in zip(index, before)]
    assert_equal(torch.tensor(before), case["kv_len_before"], "kv_len_before")
    assert_equal(torch.tensor([len(at) for at in whole]), case["kv_len_after"], "kv_len_after")
    recorded = [name for name in case.t if name.startswith("layer_")]
    assert recorded
    for name in recorded:
        assert_equal(whole[int(name.removeprefix("layer_"))], case[name], name)


CHECKS = {
    "mustdrop.spatial_merge": check_spatial_merge,
    "mustdrop.spatial_merge_fixed": check_spatial_merge_fixed,
    "mustdrop.key_tokens": check_key_tokens,
    "mustdrop.dual_filter": check_dual_filter,
    "mustdrop.cache_policy": check_cache_policy,
}
