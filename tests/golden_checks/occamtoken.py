"""Golden checks of occamtoken: the operators, and a whole tower with a register in it."""

import torch
from torch import Tensor

from golden_checks.case import Case
from golden_checks.towers import clip_tower, run_tower, side_of, tower_facts
from tokprune.methods import OccamToken
from tokprune.operators.attention import attention_rows
from tokprune.operators.occamtoken import AgainstRegister, shift, stage1, stage1_mutual, stage2


def check_shift(case: Case) -> None:
    case.equal(shift(case["activations"], case.parameters["neurons"]), "out")


def check_stage1(case: Case) -> None:
    compare(case, stage1(case["attention"].float(), case.parameters["lam"]))


def check_mutual(case: Case) -> None:
    compare(case, stage1_mutual(case["attention"].float(), case.parameters["lam"]))


def check_stage2(case: Case) -> None:
    p, query, key = case.parameters, case["query"], case["key"]
    length, asked = key.shape[1], query.shape[1]
    own = torch.arange(length - asked, length)
    allowed = torch.arange(length) <= own[:, None]
    rows = attention_rows(query, key, p["scale"], allowed).mean(0)
    visual = slice(p["first_visual"], p["first_visual"] + p["n_visual"])
    segment = torch.full((1, length), -1)
    segment[:, visual] = segment[:, p["register_at"]] = 0
    register = torch.arange(length)[None] == p["register_at"]
    found = stage2(rows.amax(0)[None], rows.mean(0)[None], segment, register, p["lam"])
    assert found.keep.sum() == found.keep[0, visual].sum() + 1
    level = rows.mean(0)[p["register_at"]]
    assert torch.allclose(found.register[0, visual], level)
    kept = AgainstRegister(found.scores[0, visual], level[None], found.keep[0, visual])
    compare(case, kept)


def check_tower(case: Case) -> None:
    p = case.parameters
    config, pixels = p["config"], case["pixel_values"].float()
    layers = config["num_hidden_layers"]
    facts = tower_facts(layers, side_of(config), layers - 2)
    model = clip_tower(case.weights(), config)
    neurons = tuple(tuple(pair) for pair in p["neurons"])

    def run(lam: float) -> tuple[AgainstRegister, Tensor, list[int]]:
        method = OccamToken(lambda1=lam, lambda2=0, neurons=neurons)
        (stage,) = method.plan(facts).encoder
        done = run_tower(model, pixels, [stage], facts)
        (own,) = done.tower.runs
        return own.found, done.hidden[layers - 1][:, 1:], done.tower.tokens.counts

    found, left, counts = run(p["lam"])
    compare(case, found)
    _, whole, _ = run(0.0)
    case.close(whole, "features", rtol=1e-4)
    assert counts == [2 + int(own.sum()) for own in found.keep]
    for tile, keep in enumerate(found.keep):
        rows = torch.cat([whole[tile, :-1][keep], whole[tile, -1:]])
        assert torch.equal(left[tile, : len(rows)], rows), f"image {tile}"


def compare(case: Case, found: AgainstRegister) -> None:
    case.close(found.scores, "scores")
    case.close(found.register, "register")
    case.equal(found.keep, "keep")


CHECKS = {
    "occamtoken.shift": check_shift,
    "occamtoken.stage1": check_stage1,
    "occamtoken.stage1_mutual": check_mutual,
    "occamtoken.stage2": check_stage2,
    "occamtoken.e2e_clip": check_tower,
}
