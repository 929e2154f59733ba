"""Golden checks of flowcut."""

import torch
from torch import Tensor

from golden_checks.case import Case, assert_close, assert_equal
from tokprune.operators.anyres import flowcut_pack, raster_position, unpad_bounds
from tokprune.operators.attention import attention_rows, repeat_heads
from tokprune.operators.flow import (
    FlowKeep,
    accumulate,
    attention_entropy,
    attn_terms,
    encoder_keep,
    flow_score,
    global_query_terms,
    llm_select,
    prune_count,
    text_terms,
)

#: Recorded in half precision, computed by us in float32.
HALF = 2e-3


def check_attn_terms(case: Case) -> None:
    q, k, v = case["q"], case["k"], case["v"]
    terms = attn_terms(q, k, v)
    assert_close(terms.attention, case["cls_attn"], "cls_attn")
    assert_close(terms.value, case["value"], "value")
    assert_close(terms.semantic, case["semantic_attn"], "semantic_attn")
    # an image's row may be tiny, exp of a large difference: compare it on its own scale too
    for i, (got, want) in enumerate(zip(terms.semantic, case["semantic_attn"])):
        assert_close(got, want, f"semantic_attn of image {i}", rtol=1e-4, atol=1e-20)
    row_alone = attn_terms(q[:, :, :1], k, v)
    assert all(torch.equal(a, b) for a, b in zip(terms, row_alone))
    projected = projections(case["hidden"], case.weights(), q.shape[1])
    for name, got in zip("qkv", projected):
        assert_close(got, case[name], name)
    y = (attention_rows(q, k) @ v).transpose(1, 2).flatten(2)
    w = case.weights()
    y = y @ w["out_proj.weight"].T + w["out_proj.bias"]
    assert_close(y, case["attn_output"], "attn_output")


def projections(hidden: Tensor, w: dict[str, Tensor], heads: int) -> list[Tensor]:
    made = (hidden @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"] for n in "qkv")
    return [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in made]


def check_score(case: Case) -> None:
    a, s, value = case["cls_attn"], case["semantic_attn"], case["value"]
    compare_score(flow_score(a, s, value), case)


def check_qwen_score(case: Case) -> None:
    a, s, value = case["relation"], case["semantic"], case["value"]
    compare_score(flow_score(a, s, value, renormalize=False), case)
    if case["score"].dtype == torch.float32:
        # rows that sum to 1: the two scores agree up to rounding
        assert_close(flow_score(a, s, value), case["score"], "renormalised score", rtol=1e-4)


def compare_score(got: Tensor, case: Case) -> None:
    want = case["score"]
    assert got.dtype == torch.float32
    for i in range(len(want)):
        rtol = 1e-5 if want.dtype == torch.float32 else HALF
        assert_close(got[i], want[i].float(), f"score of image {i}", rtol)


def check_prune_count(case: Case) -> None:
    p, attention = case.parameters, case["attn"]
    form = {} if case.operator == "flowcut.prune_count" else {"renormalize": False, "eps": 1e-7}
    exact = attention.dtype == torch.float32
    single = prune_count(attention, p["remaining"], p["target"], **form)
    batch = prune_count(attention, p["remaining"], p["target"], reduce="batch", **form)
    assert_equal(batch, single.amax().expand_as(single), "batch count")
    compare_counts(batch[:1], case["count"], exact, "count")
    if "count_per_image" in case:
        compare_counts(single, case["count_per_image"], exact, "count_per_image")
    if "check_ratio_f64" in case:
        h = attention_entropy(attention, **form)
        assert_close(h, case["check_ratio_f64"], "check_ratio_f64")
    raw = case["check_raw_f64"]
    clear = ((raw - raw.floor()) - 0.5).abs() > 1e-3
    assert_equal(single[clear], raw.round().long()[clear], "rounded check_raw_f64")


def compare_counts(got: Tensor, want: Tensor, exact: bool, what: str) -> None:
    """Half-precision entropies are too coarse near 1: their counts may be off by one."""
    if exact:
        assert_equal(got, want, what)
    else:
        assert got.shape == want.shape, what
        assert (got - want).abs().max() <= 1, f"{what}: {got.tolist()} != {want.tolist()}"


def check_encoder_step(case: Case) -> None:
    p, attention, ids = case.parameters, case["cls_attn"], case["keep_in"]
    target = p["target_with_cls"] - 1
    history = case.t.get("cumulative_in")
    keep: FlowKeep | None = None
    if attention.shape[1] > target:
        score = flow_score(attention, case["semantic_attn"], case["value"])
        history = accumulate(history, score)
        keep = encoder_keep(history, attention, p["remaining"], target, reduce="batch")
    hidden = case["hidden"]
    if keep is not None:
        index = keep.index
        assert keep.counts == [p["kept"]] * len(index)
        ids, history = ids.gather(1, index), history.gather(1, index)
        patches = hidden[:, 1:].gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        hidden = torch.cat([hidden[:, :1], patches], dim=1)
    assert ids.shape[1] == p["kept"]
    assert_equal(ids, case["keep_out"], "keep_out")
    assert_equal(hidden, case["hidden_out"], "hidden_out")
    assert (history is None) == ("cumulative_out" not in case)
    if history is not None:
        assert_close(history, case["cumulative_out"], "cumulative_out")


def check_llm_select(case: Case) -> None:
    p, q, k, v = case.parameters, case["q"], case["k"], case["v"]
    keep = []
    for i, (start, n, end) in enumerate(
        zip(p["visual_start"], p["visual_num"], p["last_pos_exclusive"])
    ):
        got = llm_select(q[i], k[i], v[i], start, n, end - 1, p["target"])
        if i not in p["rows"]:
            assert_equal(got, torch.arange(n), f"sample {i}, no more tokens than the budget")
            continue
        keep.append(got)
        allowed = torch.zeros(1, q.shape[2], dtype=torch.bool)
        allowed[:, start : start + n] = True
        row = slice(end - 1, end)
        terms = text_terms(
            q[i : i + 1, :, row], k[i : i + 1], v[i : i + 1, :, row], v[i : i + 1], allowed=allowed
        )
        score = flow_score(*terms)[0, start : start + n]
        assert_close(score, case[f"check_score_f64.{i}"], f"score of sample {i}")
        repeated = [repeat_heads(x[i], q.shape[1]) for x in (k, v)]
        again = llm_select(q[i], *repeated, start, n, end - 1, p["target"])
        assert_equal(again, got, f"sample {i}, heads repeated")
    assert_equal(torch.stack(keep), case["keep_indices"], "keep_indices")


def check_anyres_pack(case: Case) -> None:
    p, kept, side = case.parameters, case["keep_indices"], case.parameters["grid"]
    tiles, size = (p["h"], p["w"]), tuple(p["image_size_wh"])
    rows = torch.cat([case["base"][None], case["tiles"]])
    for name, original in (("out_no_unpad", None), ("out_unpad", size)):
        at = flowcut_pack(kept, tiles, side, base=len(case["base"]), original_size=original)
        assert_equal(rows[at[:, 0], at[:, 1]], case[name], name)
    height, width = side * p["h"], side * p["w"]
    mask = torch.zeros(height * width, dtype=torch.long)
    mask[raster_position(kept, tiles, side).flatten()] = 1
    mask = mask.view(height, width)
    assert_equal(mask, case["mask"], "mask")
    top, bottom, left, right = unpad_bounds(height, width, size)
    inside = torch.zeros_like(mask)
    inside[top:bottom, left:right] = 1
    assert_equal(mask * inside, case["mask_unpad"], "mask_unpad")


def check_qwen_vit_terms(case: Case) -> None:
    p, q, k, v = case.parameters, case["q"], case["k"], case["v"]
    attention, value = global_query_terms(q[None], k[None], v[None])
    assert_close(attention, case["attn"], "attn")
    score = flow_score(attention, None, value, renormalize=False)
    assert_close(score, case["score"], "score")
    for want in p["prune_count"]:
        got = prune_count(attention, want["remaining"], want["target"], renormalize=False, eps=1e-7)
        assert got.tolist() == [want["count"]], want
    edges = torch.tensor(p["segments"])
    segment = torch.bucketize(torch.arange(q.shape[1]), edges, right=True)
    y = attention_rows(q, k, allowed=segment[:, None] == segment) @ v
    w = case.weights()
    y = y.transpose(0, 1).flatten(1) @ w["proj.weight"].T + w["proj.bias"]
    assert_close(y, case["attn_output"], "attn_output")


CHECKS = {
    "flowcut.attn_terms": check_attn_terms,
    "flowcut.score": check_score,
    "flowcut.prune_count": check_prune_count,
    "flowcut.encoder_step": check_encoder_step,
    "flowcut.llm_select": check_llm_select,
    "flowcut.anyres_pack": check_anyres_pack,
    "flowcut.qwen_vit_terms": check_qwen_vit_terms,
    "flowcut.qwen_prune_count": check_prune_count,
    "flowcut.qwen_score_llm": check_qwen_score,
}
