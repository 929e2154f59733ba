"""Golden checks of visionzip."""

from typing import Any

import torch
from reference.packing import visionzip_pack

from golden_checks.case import Case, assert_equal
from golden_checks.towers import clip_tower, run_tower, side_of, tower_facts
from tokprune.methods.visionzip import VisionZip
from tokprune.operators.visionzip import compress, dominant


def check_compress(case: Case) -> None:
    p, hidden, metric = case.parameters, case["hidden"], case["metric"]
    attn = case.first("attn", "attn_cls_row", "cls_row", "cls_attn")
    got = compress(hidden, metric, attn, p["dominant"], p["contextual"])
    rtol = 1e-5 if hidden.dtype == torch.float32 else 2e-3
    case.equal(got.indices, "all_indices")
    case.close(got.out, "out", rtol)
    if attn.dim() == 4:
        assert_equal(dominant(attn[:, :, 0], p["dominant"]), got.indices, "from [CLS] attention")


def check_anyres_pack(case: Case) -> None:
    p, features = case.parameters, case["features"]
    tiles = (p["grid_height"], p["grid_width"])
    at = visionzip_pack(case["all_indices"], p["contextual"], tiles, side=24, base=0)
    case.equal(features[at[:, 0] - 1, at[:, 1]], "out")


def check_e2e_clip(case: Case) -> None:
    p = case.parameters
    config = p["config"]
    layers = config["num_hidden_layers"]
    facts = tower_facts(layers, side_of(config), layers - 2)
    method = VisionZip(dominant=p["dominant"], contextual=p["contextual"])
    for attention in ("eager", "sdpa"):
        model = clip_tower(case.weights(), config, attention)
        plain = run_tower(model, case["pixel_values"], [], facts)
        case.close(plain.hidden[-2], "hidden_penultimate", atol=1e-6)
        run = run_tower(model, case["pixel_values"], method.plan(facts).encoder, facts)
        # row 0 is what the model cuts off before the projector
        case.close(run.hidden[-2][:, 1:], "out", atol=1e-6)
        slots = run.tower.tokens.slots[:, 1 : p["dominant"] + 1] + 1
        if (indices := case.output("all_indices")) is not None:
            assert_equal(slots, indices.sort(-1).values, "all_indices")
        zipped: Any = run.tower.runs[0]
        case.close(zipped.metric, "metric", atol=1e-6)
        case.close(zipped.score[:, 1:], "cls_scores", atol=1e-6)
        case.equal(dominant(zipped.score, p["dominant"]), "all_indices", where="by score")


CHECKS = {
    "visionzip.e2e_clip": check_e2e_clip,
    "visionzip.compress": check_compress,
    "visionzip.anyres_pack": check_anyres_pack,
}
