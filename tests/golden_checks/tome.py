"""Golden checks of tome."""

import torch
import torch.nn.functional as F
from reference.merging import kth_bipartite, random_bipartite

from golden_checks.case import Case
from golden_checks.merge_plan import check_plan, outputs, parity_indices
from tokprune.operators.bipartite import bipartite_soft_matching, parse_r
from tokprune.operators.merging import proportional_bias


def check_matching(case: Case) -> None:
    p = case.parameters
    plan = bipartite_soft_matching(case["in.metric"], p["r"], p["class_token"], p["distill_token"])
    assert plan is not None
    case.told(plan.tokens, "T")
    case.told(plan.src.shape[1], "r_effective")
    check_plan(case, plan, parity_indices(plan))


def check_kth(case: Case) -> None:
    plan = kth_bipartite(case["in.metric"], case.parameters["k"])
    check_plan(case, plan, {"dst_idx": plan.slot})


def check_random(case: Case) -> None:
    permutation = torch.cat([case["in.a_idx"], case["in.b_idx"]], dim=1)
    plan = random_bipartite(case["in.metric"], case.parameters["r"], permutation)
    check_plan(case, plan, {"dst_idx": plan.slot})


def check_parse_r(case: Case) -> None:
    for i, (layers, r, kind) in enumerate(case.parameters):
        schedule = parse_r(layers, tuple(r) if kind == "tuple" else r)
        case.equal(torch.tensor(schedule), f"out.{i}", where=f"{layers} layers, r = {r}")
    assert outputs(case) <= {str(i) for i in range(len(case.parameters))}


def check_attention(case: Case) -> None:
    heads, scale = case.parameters["num_heads"], case.parameters["scale"]
    x = case["in.x"]
    qkv = F.linear(x, case["in.qkv_weight"], case["in.qkv_bias"])
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    case.close(k.mean(1), "out.metric", where="metric")
    biases: dict[str, torch.Tensor | None] = {"y_no_size": None}
    if "in.size" in case:
        biases["y"] = proportional_bias(case["in.size"])
    for name, bias in biases.items():
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        y = F.linear(y.transpose(1, 2).flatten(2), case["in.proj_weight"], case["in.proj_bias"])
        case.close(y, f"out.{name}")
    assert outputs(case) <= {"metric", "y", "y_no_size"}


CHECKS = {
    "bipartite_soft_matching": check_matching,
    "kth_bipartite_soft_matching": check_kth,
    "random_bipartite_soft_matching": check_random,
    "parse_r": check_parse_r,
    "proportional_attention": check_attention,
}
