"""Golden checks of holov: budgets of crops and what stays of each, alone and behind a tower."""

import torch

from golden_checks.case import Case
from golden_checks.towers import clip_tower, run_tower, side_of, tower_facts
from tokprune.methods.holov import HoloV
from tokprune.operators.holov import crop_allocation, crop_scores, select_by_crops


def _select(case: Case, features: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    p = case.parameters
    return select_by_crops(features, scores, p["T"], p["crops"], p["alpha"], overflow="pad")


def check_select(case: Case) -> None:
    p, features, scores = case.parameters, case["features"], case["scores"]
    budgets = crop_scores(features, scores, p["crops"], p["alpha"])
    case.close(budgets, "crop_scores")
    case.equal(crop_allocation(budgets, p["T"]), "allocation")
    got = _select(case, features, scores)
    case.equal(got, "indices")
    case.told(int((got < 0).sum()), "padded")


def check_e2e_clip(case: Case) -> None:
    p = case.parameters
    layers = p["config"]["num_hidden_layers"]
    facts = tower_facts(layers, side_of(p["config"]), layers - 2)
    weights = case.weights()
    projector = weights.pop("projector.weight"), weights.pop("projector.bias")
    for attention in ("eager", "sdpa"):
        model = clip_tower(weights, p["config"], attention)
        run = run_tower(model, case["pixel_values"], HoloV(keep=p["T"]).plan(facts).encoder, facts)
        scores = run.tower.outcomes[0].score
        assert scores is not None
        case.close(scores, "scores", atol=1e-6)
        features = torch.nn.functional.linear(run.hidden[-2][:, 1:], *projector)
        got = _select(case, features, scores)
        case.equal(got, "indices")
        out = features.gather(1, got.clamp(min=0)[..., None].expand(-1, -1, features.shape[2]))
        case.close(out.masked_fill((got < 0)[..., None], 0.0), "out", atol=1e-6)


CHECKS = {"holov.select": check_select, "holov.e2e_clip": check_e2e_clip}
