"""Golden checks of fastervlm: the class token's favourites, alone and in a tower."""

from golden_checks.case import Case
from golden_checks.towers import clip_tower, run_tower, side_of, tower_facts
from tokprune.methods.fastervlm import FasterVLM
from tokprune.operators.topk import keep_topk, rank


def check_select(case: Case) -> None:
    row, keep = case["cls_attn"], case.parameters["T"]
    scores = row.float().mean(-2)
    case.close(scores, "scores")
    case.equal(rank(scores)[:, :keep], "order")
    case.equal(keep_topk(scores, keep), "keep")


def check_e2e_clip(case: Case) -> None:
    p = case.parameters
    layers = p["config"]["num_hidden_layers"]
    facts = tower_facts(layers, side_of(p["config"]), layers - 2)
    for attention in ("eager", "sdpa"):
        model = clip_tower(case.weights(), p["config"], attention)
        plan = FasterVLM(keep=p["T"]).plan(facts)
        run = run_tower(model, case["pixel_values"], plan.encoder, facts)
        case.equal(run.tower.tokens.slots[:, 1:], "keep")
        case.close(run.hidden[-2][:, 1:], "out", atol=1e-6)
        scores, _ = run.tower.runs[0].seen[layers - 2]
        case.close(scores, "scores", atol=1e-6)


CHECKS = {"fastervlm.select": check_select, "fastervlm.e2e_clip": check_e2e_clip}
