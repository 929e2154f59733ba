"""Golden checks of todre: greedy selections, pivots, cross-modal ratios, whole models."""

from typing import Any

import torch
from reference.diversity import min_distance, selection_radius, summed_similarity

import tokprune
from golden_checks.case import Case, assert_close, assert_equal
from golden_checks.models import Watched, greedy_tokens, image_inputs, load_llava, run, suffixes
from tokprune.methods.todre import ToDRE
from tokprune.operators.attention import attention_rows
from tokprune.operators.diversity import (
    center_pivot,
    cls_pivot,
    cls_scores,
    farthest_pivot,
    k_center,
    max_sum,
)
from tokprune.operators.relevance import ratio_from_rows, should_drop


def check_max_sum(case: Case) -> None:
    x, k = case["x"], case.parameters["k"]
    order = max_sum(x, k, case["pivot"])
    case.equal(order, "order")
    case.equal(order.sort(-1).values, "keep")
    case.close(summed_similarity(x, order), "cum_sim")


def check_k_center(case: Case) -> None:
    x, k = case["x"], case.parameters["k"]
    order = k_center(x, k, case["pivot"])
    case.equal(order, "order")
    case.equal(order.sort(-1).values, "keep")
    case.close(min_distance(x, order), "min_dist")
    radius = selection_radius(x, order)
    if (want := case.output("radius")) is not None:
        assert_equal(radius.isinf(), want.isinf(), "radius: infinite entries")
        assert_close(radius[..., 1:], want[..., 1:], "radius")


def check_pivot(case: Case) -> None:
    scores = cls_scores(case["attn_cls_row"])
    case.close(scores, "cls_score")
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
        case.equal(index, name)


def check_cross_modal_ratio(case: Case) -> None:
    q, k, segment = case["q"], case["k"], case["segment"]
    real, visual, text = segment != 0, segment == 2, segment == 3
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool).tril()
    attention = attention_rows(q, k, None, causal & real[:, None] & real[:, :, None])
    case.close(attention, "attn")
    tv, vt = ratio_from_rows(attention, text, visual), ratio_from_rows(attention, visual, text)
    for got, name in ((tv, "alpha_tv"), (vt, "alpha_vt")):
        if (want := case.output(name)) is not None:
            assert_equal(got.isnan(), want.isnan(), f"{name}: undefined entries")
            assert_close(got.nan_to_num(), want.nan_to_num(), name)
    drop = torch.stack([should_drop(tv, vt, tau) for tau in case.parameters["taus"]], -1)
    case.equal(drop, "drop")


def check_e2e(case: Case) -> None:
    """Each sample alone, and all of them as one left-padded batch."""
    tails = suffixes(case, "input_ids")
    for attention in ("eager", "sdpa"):
        model = load_llava(case.weights(), case.parameters["config"], attention)
        for tail in tails:
            if "logits_unpruned" + tail in case:
                got = run(model, image_inputs(case, [tail])).logits[0, 0]
                case.close(got, "logits_unpruned" + tail)
        for positions in ("compact", "preserve"):
            for group in [[tail] for tail in tails] + ([tails] if len(tails) > 1 else []):
                _check_run(case, model, group, positions)


def _check_run(case: Case, model: Any, tails: list[str], mode: str) -> None:
    p = case.parameters
    method = Watched(
        ToDRE(
            p["k"],
            select=p.get("select", "max_sum"),
            pivot=p["pivot"],
            tau=p["tau"],
            prune_before=p["check_layer_1based"],
            positions=mode,  # type: ignore[arg-type]
        )
    )
    tokens = greedy_tokens(case, tails, f"{mode}.tokens", f"{mode}.logits")
    inputs = image_inputs(case, tails)
    with tokprune.compress(model, method) as trace:
        got = run(model, inputs, tokens)
    last: Any = trace.last
    (check,) = method.runs[0].checks  # type: ignore[attr-defined]
    assert check.layer == p["check_layer_1based"]
    orders = method.plans[0].prompt[0].order(method.images)  # type: ignore[attr-defined]
    steps = 0 if tokens is None else tokens.shape[1]
    for b, tail in enumerate(tails):
        where = f"of sample {tail or 'alone'} ({mode}, batch of {len(tails)})"
        image = method.images[b]
        case.close(image.features, "features" + tail, where=where)
        case.equal(orders[b], "order" + tail, where=where)
        case.equal(orders[b][0], "pivot" + tail, where=where)
        kept = last.images[b].selection.index
        case.equal(kept, "keep" + tail, where=where)
        assert not image.newline[kept].any()
        side = image.grid[0] * image.grid[1]
        cell = image.tile * side + image.row * image.grid[1] + image.col
        assert image.score is not None
        if (scores := case.output("cls_score" + tail)) is not None:
            patch = ~image.newline
            want = scores.flatten()[cell[patch]]
            assert_close(image.score[patch], want, f"cls_score {where}")
        padding = inputs["attention_mask"].shape[1] - last.original_lengths[b]
        columns = trace_columns(last, 0, b) - padding
        case.equal(columns, "prompt_kept" + tail, where=where)
        visual = last.layers[0].segment[b][last.layers[0].column[b] >= 0] >= 0
        segment = torch.where(visual, 2, torch.where(visual.cumsum(0) > 0, 3, 1))
        case.equal(segment, "segment" + tail, where=where)
        alpha = torch.stack([check.alpha_tv[b], check.alpha_vt[b]])
        case.close(alpha, f"{mode}.alpha{tail}", where=where)
        case.equal(check.drop[b], f"{mode}.drop{tail}", where=where)
        lengths = torch.tensor([layer.lengths[b] for layer in last.layers])
        case.equal(lengths, f"{mode}.kv_len{tail}", where=where)
        if len(tails) == 1:
            cached = torch.tensor(got.cache_lengths()) - steps
            case.equal(cached, f"{mode}.kv_len{tail}", where=f"in the cache {where}")
        hidden = got.hidden[b, -int(lengths[-1]) :]
        case.close(hidden, f"{mode}.hidden_last{tail}", where=where)
        case.close(got.logits[b], f"{mode}.logits{tail}", where=where)
        if tokens is not None:
            greedy = got.logits[b, :steps].argmax(-1)
            case.equal(greedy, f"{mode}.tokens{tail}", where=where)


def trace_columns(last: Any, layer: int, row: int) -> torch.Tensor:
    """Prompt columns that a decoder layer sees, in its order, without padding."""
    columns = last.layers[layer].column[row]
    return columns[columns >= 0]


CHECKS = {
    "todre.cross_modal_ratio": check_cross_modal_ratio,
    "todre.e2e_llava": check_e2e,
    "todre.e2e_llava_next": check_e2e,
    "todre.k_center": check_k_center,
    "todre.max_sum": check_max_sum,
    "todre.pivot": check_pivot,
}
