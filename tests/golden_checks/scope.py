"""Golden checks of scope: saliency times coverage, greedily, alone and in a tower."""

from golden_checks.case import Case
from golden_checks.towers import clip_tower, run_tower, side_of, tower_facts
from tokprune.methods.scope import SCOPE
from tokprune.operators.coverage import coverage


def check_select(case: Case) -> None:
    p = case.parameters
    saliency = case["cls_attn"].float().sum(1)
    case.close(saliency, "saliency")
    order = coverage(case["features"], p["T"], saliency, p["alpha"], p["combine"])
    case.equal(order, "order")
    case.equal(order.sort(-1).values, "keep")


def check_e2e_clip(case: Case) -> None:
    p, pixels = case.parameters, case["pixel_values"]
    layers = p["config"]["num_hidden_layers"]
    facts = tower_facts(layers, side_of(p["config"]), layers - 2)
    # the official code divides a budget among the images of a call; ours is each image's own
    keep = p["T_total"] // len(pixels)
    case.told(keep, "T_per_image")
    plan = SCOPE(keep=keep, alpha=p["alpha"], combine=p["combine"]).plan(facts)
    for attention in ("eager", "sdpa"):
        model = clip_tower(case.weights(), p["config"], attention)
        run = run_tower(model, pixels, plan.encoder, facts)
        case.equal(run.tower.tokens.slots[:, 1:], "keep")
        case.close(run.hidden[-2][:, 1:], "out", atol=1e-6)
        saliency, _ = run.tower.runs[0].seen[layers - 2]
        case.close(saliency, "saliency", atol=1e-6)
        plain = run_tower(model, pixels, [], facts).hidden[-2][:, 1:]
        case.equal(coverage(plain, keep, saliency, p["alpha"], p["combine"]), "order")


CHECKS = {"scope.select": check_select, "scope.e2e_clip": check_e2e_clip}
