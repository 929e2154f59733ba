"""Golden checks of hiprune: anchors, buffers and registers, alone and in a tower."""

from golden_checks.case import Case
from golden_checks.towers import clip_tower, run_tower, tower_facts
from tokprune.methods.hiprune import HiPrune
from tokprune.operators.hiprune import anchors_and_registers


def check_scores(case: Case) -> None:
    case.close(case["attention"].float().mean((1, 2))[:, 1:], "scores")


def check_select(case: Case) -> None:
    p, middle, deep = case.parameters, case["object_scores"], case["deep_scores"]
    case.told(round(p["T"] * p["alpha"] / 5), "anchors")
    kept = anchors_and_registers(middle, deep, p["T"], p["alpha"], tuple(p["grid"]))
    case.equal(kept, "keep")


def check_e2e_clip(case: Case) -> None:
    p = case.parameters
    layers, (side, _) = p["config"]["num_hidden_layers"], p["grid"]
    facts = tower_facts(layers, side, layers - 2)
    middle = p["object_layer"] - 1
    plan = HiPrune(keep=p["T"], alpha=p["alpha"], object_layer=middle).plan(facts)
    for attention in ("eager", "sdpa"):
        model = clip_tower(case.weights(), p["config"], attention)
        run = run_tower(model, case["pixel_values"], plan.encoder, facts)
        case.equal(run.tower.tokens.slots[:, 1:], "keep")
        case.close(run.hidden[-2][:, 1:], "out", atol=1e-6)
        seen = run.tower.runs[0].seen
        case.close(seen[middle][0], "object_scores", atol=1e-6)
        case.close(seen[layers - 2][0], "deep_scores", atol=1e-6)


CHECKS = {
    "hiprune.scores": check_scores,
    "hiprune.select": check_select,
    "hiprune.e2e_clip": check_e2e_clip,
}
