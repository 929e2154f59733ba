"""Golden checks of todre: greedy selections, pivots, cross-modal ratios."""

import torch

from golden_checks.case import Case, assert_close, assert_equal
from tokprune.operators.attention import attention_rows
from tokprune.operators.diversity import (
    center_pivot,
    cls_pivot,
    cls_scores,
    farthest_pivot,
    k_center,
    max_sum,
    min_distance,
    selection_radius,
    summed_similarity,
)
from tokprune.operators.relevance import cross_modal_ratio, ratio_rows, should_drop


def check_max_sum(case: Case) -> None:
    x, k = case["x"], case.parameters["k"]
    order = max_sum(x, k, case["pivot"])
    assert_equal(order, case["order"], "order")
    assert_equal(order.sort(-1).values, case["keep"], "keep")
    assert_close(summed_similarity(x, order), case["cum_sim"], "cum_sim")


def check_k_center(case: Case) -> None:
    x, k = case["x"], case.parameters["k"]
    order = k_center(x, k, case["pivot"])
    assert_equal(order, case["order"], "order")
    assert_equal(order.sort(-1).values, case["keep"], "keep")
    assert_close(min_distance(x, order), case["min_dist"], "min_dist")
    radius = selection_radius(x, order)
    assert_equal(radius.isinf(), case["radius"].isinf(), "radius: infinite entries")
    assert_close(radius[..., 1:], case["radius"][..., 1:], "radius")


def check_pivot(case: Case) -> None:
    scores = cls_scores(case["attn_cls_row"])
    assert_close(scores, case["cls_score"], "cls_score")
    thumbnail_only = torch.zeros_like(scores, dtype=torch.bool)
    thumbnail_only[0] = True
    x = case["x"]
    got = {
        "pivot_image": cls_pivot(scores[0]),
        "pivot_anyres": cls_pivot(scores.flatten(), thumbnail_only.flatten()),
        "pivot_video": cls_pivot(scores.flatten()),
        "pivot_center": center_pivot(x),
        "pivot_farthest": farthest_pivot(x),
    }
    for name, index in got.items():
        assert_equal(index, case[name], name)


def check_cross_modal_ratio(case: Case) -> None:
    q, k, segment = case["q"], case["k"], case["segment"]
    text_rows, visual_rows = ratio_rows(segment)
    for rows in ((None, None), (text_rows, visual_rows)):
        tv, vt = cross_modal_ratio(q, k, segment, None, *rows)
        for got, name in ((tv, "alpha_tv"), (vt, "alpha_vt")):
            want = case[name]
            assert_equal(got.isnan(), want.isnan(), f"{name}: undefined entries")
            assert_close(got.nan_to_num(), want.nan_to_num(), name)
        drop = torch.stack([should_drop(tv, vt, tau) for tau in case.parameters["taus"]], -1)
        assert_equal(drop, case["drop"], "drop")
    if "attn" in case:
        length = segment.shape[1]
        real = segment != 0
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = causal & real[:, None] & real[:, :, None]
        assert_close(attention_rows(q, k, None, allowed), case["attn"], "attn")


CHECKS = {
    "todre.cross_modal_ratio": check_cross_modal_ratio,
    "todre.k_center": check_k_center,
    "todre.max_sum": check_max_sum,
    "todre.pivot": check_pivot,
}
