"""Golden checks of vispruner: important and diverse patches, alone and in a tower."""

import torch

from golden_checks.case import Case
from golden_checks.towers import clip_tower, run_tower, side_of, tower_facts
from tokprune.methods.vispruner import VisPruner
from tokprune.operators.topk import rank
from tokprune.operators.vispruner import drop_duplicates, important_and_diverse


def check_select(case: Case) -> None:
    p, x = case.parameters, case["features"]
    keep, ratio = p["T"], p["important_ratio"]
    scores = case["cls_attn"].float().mean(1)
    case.close(scores, "scores")
    important, diverse = important_and_diverse(x, scores, keep, ratio)
    rest = rank(scores)[:, important.shape[1] :]
    assert torch.equal(drop_duplicates(x, rest, diverse.shape[1], p["chunk"]), diverse)
    case.equal(important, "important")
    case.equal(diverse, "diverse")
    case.equal(torch.cat([important, diverse], 1).sort(-1).values, "keep")


def check_e2e_clip(case: Case) -> None:
    p = case.parameters
    layers = p["config"]["num_hidden_layers"]
    facts = tower_facts(layers, side_of(p["config"]), layers - 2)
    plan = VisPruner(keep=p["T"], important_ratio=p["important_ratio"]).plan(facts)
    for attention in ("eager", "sdpa"):
        model = clip_tower(case.weights(), p["config"], attention)
        run = run_tower(model, case["pixel_values"], plan.encoder, facts)
        case.equal(run.tower.tokens.slots[:, 1:], "keep")
        case.close(run.hidden[-2][:, 1:], "out", atol=1e-6)
        scores, _ = run.tower.runs[0].seen[layers - 2]
        case.close(scores, "scores", atol=1e-6)


CHECKS = {"vispruner.select": check_select, "vispruner.e2e_clip": check_e2e_clip}
