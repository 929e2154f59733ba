"""Golden checks of vscan: two scans and a merge, alone and behind a tower; the decoder's cut."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from golden_checks.case import Case
from golden_checks.towers import clip_tower, run_tower, side_of, tower_facts
from golden_checks.transprune import _rotate
from tokprune.methods.tower_attention import PatchAttention
from tokprune.methods.vscan import VScan
from tokprune.operators.attention import attention_rows
from tokprune.operators.topk import keep_topk
from tokprune.operators.vscan import LocalShares, grid_windows, merge_into, two_scans


def _scans(
    case: Case, shallow: Tensor, deep: Tensor, grid: tuple[int, int], shares: LocalShares
) -> tuple[Tensor, Tensor, Tensor]:
    """Local, global and all kept tokens."""
    window = grid_windows(grid, case.parameters["window"])
    local, best = two_scans(
        shallow, deep, window, int(window[-1]) + 1, case.parameters["T"], shares
    )
    return local, best, torch.cat([local, best], dim=1).sort(-1).values


def check_encode(case: Case) -> None:
    p, features = case.parameters, case["features"]
    side = p["grid"]
    local, best, keep = _scans(case, case["shallow"], case["deep"], (side, side), "floor")
    case.equal(local, "local")
    case.equal(best, "global_")
    case.equal(keep, "keep")
    case.told(keep.shape[1], "kept")
    merged = merge_into(features.float(), keep)
    case.close(merged.out, "out")
    dropped = torch.ones_like(merged.group, dtype=torch.bool).scatter(1, keep, False)
    case.equal(merged.group[dropped].view(len(keep), -1), "assigned")


def check_encode_grid(case: Case) -> None:
    p, features = case.parameters, case["features"][None]
    grid = (p["grid_height"], p["grid_width"])
    local, _, keep = _scans(case, case["shallow"][None], case["deep"][None], grid, "limit")
    case.equal(local[0], "local")
    case.equal(keep[0], "keep")
    case.close(merge_into(features.float(), keep).out[0], "out")


def check_middle(case: Case) -> None:
    p, hidden = case.parameters, case["hidden"][0]
    length, width = hidden.shape
    x = hidden.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + p["rms_eps"]) * case["norm_weight"]
    head, places = width // p["heads"], torch.arange(length)
    query, key = (
        _rotate(
            linear(x, case[name]).unflatten(-1, (-1, head)).transpose(0, 1), places, p["rope_theta"]
        )
        for name in ("q_weight", "k_weight")
    )
    start, n = p["image_start"], p["n"]
    scores = attention_rows(query[:, -1:], key)[:, 0].mean(0)[start : start + n]
    case.close(scores, "scores")
    keep = keep_topk(scores, VScan(keep=p["keep"], prune_before=1).count(0, n))
    case.equal(keep, "keep")
    left = torch.cat([hidden[:start], hidden[start:][keep], hidden[start + n :]])
    case.equal(left[None], "hidden_out")
    case.equal(torch.arange(len(left))[None], "positions_out")


def check_e2e_clip(case: Case) -> None:
    p = case.parameters
    layers, side = p["config"]["num_hidden_layers"], side_of(p["config"])
    facts = tower_facts(layers, side, layers + p["deep_layer"])
    method = VScan(keep=1, prune_before=0, shallow_layer=p["shallow_layer"])
    weights = case.weights()
    projector = weights.pop("projector.weight"), weights.pop("projector.bias")
    for attention in ("eager", "sdpa"):
        model = clip_tower(weights, p["config"], attention)
        stages = method.plan(facts).encoder
        assert isinstance(stages[0], PatchAttention)
        run = run_tower(model, case["pixel_values"], stages, facts)
        metric = run.tower.outcomes[0].metric
        assert metric is not None
        shallow, deep = metric.unbind(-1)
        case.close(shallow, "shallow", atol=1e-6)
        case.close(deep, "deep", atol=1e-6)
        keep = _scans(case, shallow, deep, (side, side), "floor")[2]
        case.equal(keep, "keep")
        features = linear(run.hidden[p["deep_layer"]][:, 1:], *projector)
        case.close(merge_into(features, keep).out, "out", atol=1e-6)


CHECKS = {
    "vscan.encode": check_encode,
    "vscan.encode_grid": check_encode_grid,
    "vscan.middle": check_middle,
    "vscan.e2e_clip": check_e2e_clip,
}
