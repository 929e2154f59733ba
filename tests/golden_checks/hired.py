"""Golden checks of hired: budgets of tiles and their best patches, alone and behind a tower."""

import torch
from torch import Tensor

from golden_checks.case import Case
from golden_checks.towers import clip_tower, run_tower, side_of, tower_facts
from tokprune.methods.hired import HiRED
from tokprune.methods.tower_attention import PatchAttention
from tokprune.operators.hired import band_regions, crop_budgets, split_budget
from tokprune.operators.topk import keep_topk, segment_topk


def _rows(cls_rows: Tensor) -> Tensor:
    """Class-token rows [tiles, H, 1 + N], summed over heads without the class token's column."""
    return cls_rows.float().sum(1)[:, 1:]


def _tiles(case: Case, first: Tensor, deep: Tensor) -> None:
    p = case.parameters
    tiles, n = deep.shape
    total = int(tiles * n * p["rate"])
    case.told(total, "total")
    base, rest = split_budget(total, p["alpha"], n, (tiles - 1) * n)
    region = band_regions(n, tiles - 1)
    limits = [n] * (tiles - 1)
    crops = crop_budgets(first[:1], region, limits, rest, p["alpha"], rounding="floor")
    budgets = torch.cat([torch.tensor([base]), crops[0]])
    case.equal(budgets, "budgets")
    case.told(int(budgets.sum()), "kept")
    case.equal(segment_topk(deep, torch.zeros(tiles, n).long(), budgets[:, None]), "mask")


def check_select_tiles(case: Case) -> None:
    _tiles(case, _rows(case["first"]), _rows(case["deep"]))


def check_select_single(case: Case) -> None:
    deep = _rows(case["deep"])[0]
    n = len(deep)
    kept = min(n, int(n * case.parameters["rate"]))
    case.told(kept, "kept")
    keep = keep_topk(deep, kept)
    case.equal(keep, "keep")
    case.equal(torch.zeros(n, dtype=torch.bool).scatter(0, keep, True), "mask")


def check_e2e_clip(case: Case) -> None:
    p = case.parameters
    config, heads = p["config"], p["config"]["num_attention_heads"]
    layers = config["num_hidden_layers"]
    facts = tower_facts(layers, side_of(config), p["deep_layer"])
    (own,) = HiRED(keep=p["rate"]).plan(facts).encoder
    assert own.taps == {p["deep_layer"]}  # one tile: no budgets
    stage = PatchAttention(p["first_layer"], p["deep_layer"])
    for attention in ("eager", "sdpa"):
        model = clip_tower(case.weights(), config, attention)
        run = run_tower(model, case["pixel_values"], [stage], facts)
        metric = run.tower.outcomes[0].metric
        assert metric is not None
        first, deep = (heads * metric).unbind(-1)
        case.close(first, "first_scores", atol=1e-6)
        case.close(deep, "deep_scores", atol=1e-6)
        _tiles(case, first, deep)


CHECKS = {
    "hired.select_tiles": check_select_tiles,
    "hired.select_single": check_select_single,
    "hired.e2e_clip": check_e2e_clip,
}
