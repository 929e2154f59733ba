"""Golden checks of transprune: transition weights, instruction attention, one pruning stage."""

import torch

from golden_checks.case import Case, assert_close, assert_equal
from tokprune.operators.attention import attention_rows, mean_rows
from tokprune.operators.topk import keep_topk, segment_topk
from tokprune.operators.transition import (
    image_share,
    instruction_attention,
    instruction_rows,
    transition_score,
    transition_weight,
)


def _tolerance(case: Case) -> float:
    return 1e-2 if case.parameters["dtype"] == "torch.float16" else 1e-5


def check_transition_weight(case: Case) -> None:
    weight = transition_weight(case["before"], case["after"], normalize="batch")
    rtol = 5e-3 if case.parameters["dtype"] == "torch.float16" else 1e-5
    assert_close(weight, case["weight"], "weight", rtol)


def check_iga(case: Case) -> None:
    q, k, p = case["q_text"], case["k"], case.parameters
    start, n = p["image_start"], p["image_tokens"]
    rtol = _tolerance(case)
    position = torch.arange(k.shape[1])
    allowed = position <= position[start + n :, None]
    rows = attention_rows(q, k, p["scale"], allowed)
    assert_close(rows, case["attention"], "attention", rtol)
    image = mean_rows(rows)[start : start + n]
    assert_close(image, case["image_attention"], "image_attention", rtol)
    iga = instruction_attention(q, k, start, n, p["scale"])
    assert_close(iga, case["iga"], "iga", rtol)
    segment = torch.full((1, k.shape[1]), -1)
    segment[0, start : start + n] = 0
    assert_close(instruction_rows(rows[None], None, segment)[0, start : start + n], iga, "by rows")


def _rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding as Llama's, on [H, L, h]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _query_key(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [H, L, h] of the layer the drop happens before, in float32."""
    p = case.parameters
    x = case["features"][0].float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + p["rms_norm_eps"])
    x = x * case["layernorm_weight"].float()
    positions = case["position_ids"].reshape(-1)

    def heads(name: str) -> torch.Tensor:
        y = (x @ case[name].float().T).unflatten(-1, (-1, p["head_dim"])).transpose(0, 1)
        return _rotate(y, positions, p["rope_theta"])

    return heads("q_proj"), heads("k_proj")


def check_rank_drop(case: Case) -> None:
    p, rtol = case.parameters, _tolerance(case)
    length, n = case["features"].shape[1], p["image_tokens_now"]
    start = max(p["image_start"], 0)
    lists = [case[f"ttv_{j}"] for j in range(p["num_ttv"])]
    segment = torch.full((1, length), -1)
    segment[0, start : start + n] = 0
    keep_mask = segment < 0
    if p["image_start"] >= 0:
        q, k = _query_key(case)
        iga = instruction_attention(q[:, start + n :], k, start, n)
        slices = [w[0, start : start + n] for w in lists]
        ttv = transition_score(slices, torch.zeros(n), alpha=1.0)
        score = transition_score(slices, iga, alpha=0.5)
        for name, got in (("iga", iga), ("ttv", ttv), ("score", 2 * score)):
            if name in case:
                assert_close(got, case[name], name, rtol)
        keep = keep_topk(score, p["keep"]) + start
        padded = torch.zeros(1, length)
        padded[0, start : start + n] = iga
        whole = transition_score(lists, padded, 0.5, segment)
        assert_close(whole[0, start : start + n], score, "score of the whole sequence")
        chosen = segment_topk(whole, segment, torch.tensor([[p["keep"]]]))
        assert_equal(chosen[0].nonzero().view(-1), keep, "keep by segment")
        keep_mask = keep_mask | chosen
        if "keep" in case:
            _compare_keep(keep, case, score, start)
    sequence = keep_mask[0].nonzero().view(-1)
    if p["dtype"] == "torch.float16" and "keep_sequence" in case:
        sequence = case["keep_sequence"]  # may differ near the cut, see _compare_keep
    elif "keep_sequence" in case:
        assert_equal(sequence, case["keep_sequence"], "keep_sequence")
    new = {"new_features": case["features"][:, sequence]}
    new["new_position_ids"] = torch.arange(len(sequence))[None]
    new |= {f"new_ttv_{j}": w[:, sequence] for j, w in enumerate(lists)}
    for name, got in new.items():
        if name in case:
            assert_equal(got, case[name], name)


def _compare_keep(keep: torch.Tensor, case: Case, score: torch.Tensor, start: int) -> None:
    """Equal; in half precision tokens may swap whose scores are within rounding of the cut."""
    if case.parameters["dtype"] != "torch.float16":
        assert_equal(keep, case["keep"], "keep")
        return
    assert keep.shape == case["keep"].shape
    swapped = set(keep.tolist()) ^ set(case["keep"].tolist())
    if swapped:
        cut = score[keep - start].min()
        for index in swapped:
            assert abs(score[index - start] - cut) <= 1e-2 * cut, f"token {index} is not at the cut"


def check_image_share_is_iga(case: Case) -> None:
    check_iga(case)
    rtol = _tolerance(case)
    assert_close(image_share(case["image_attention"]), case["iga"], "iga from attention", rtol)


CHECKS = {
    "transprune.iga": check_image_share_is_iga,
    "transprune.rank_drop": check_rank_drop,
    "transprune.transition_weight": check_transition_weight,
}
