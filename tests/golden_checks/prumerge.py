"""Golden checks of prumerge."""

import torch
from torch import Tensor

from golden_checks.case import Case, assert_close, assert_equal
from golden_checks.towers import clip_tower, run_tower, side_of, tower_facts
from tokprune.methods.prumerge import PruMerge
from tokprune.operators.outliers import outliers
from tokprune.operators.prumerge import (
    adaptive,
    by_attention,
    cls_attention,
    merge,
    repeated,
)


def check_merge(case: Case) -> None:
    p, hidden, key = case.parameters, case["hidden"].float(), case["key"]
    attn = cls_attention(case["query"][:, 0], key)
    case.close(attn, "cls_attn")
    n = attn.shape[1]
    if p["adaptive"]:
        chosen = adaptive(attn, p["plus"], shared=True, least=0, end=p["grid_end"])
        order, count = chosen.order, chosen.counts[0]
        assert set(chosen.counts) == {count}
        share = int(outliers(attn.reshape(1, -1)).sum()) / attn.numel()
        case.told(share, "measured_ratio")
    elif p["plus"]:
        order, count = repeated(attn, int(n * p["ratio"]), p["ratio"], p["grid_end"])
    else:
        order, count = by_attention(attn), int(n * p["ratio"])
    out = merge(hidden[:, 1:], key[:, 1:], attn, order, count, p["neighbours"])
    case.close(out, "out")
    if (indices := case.output("indices")) is not None:
        assert_equal(_first(hidden, key, order[:, :count]), _first(hidden, key, indices), "indices")


def _first(hidden: Tensor, key: Tensor, index: Tensor) -> Tensor:
    """The lowest patch that is the same as each of these: equal ones may stand for each other."""
    both = torch.cat([hidden[:, 1:], key[:, 1:].float()], dim=-1)
    same = (both[:, :, None] == both[:, None]).all(-1)
    return same.int().argmax(-1).gather(1, index)


def check_e2e_clip(case: Case) -> None:
    p = case.parameters
    config = p["config"]
    layers = config["num_hidden_layers"]
    facts = tower_facts(layers, side_of(config), layers - 2)
    method = PruMerge(
        plus=p["plus"], ratio=p.get("ratio"), ratio_scope="call", duplicates="official",
        max_keep=1.0, neighbours=p["neighbours"],
    )  # fmt: skip
    for attention in ("eager", "sdpa"):
        model = clip_tower(case.weights(), config, attention)
        run = run_tower(model, case["pixel_values"], method.plan(facts).encoder, facts)
        (looked,) = run.tower.runs
        case.close(looked.score, "cls_attn")
        assert run.tower.features is not None
        case.close(run.tower.features[:, 1:], "out", atol=1e-6)
        if (indices := case.output("indices")) is not None:
            assert_equal(run.tower.tokens.slots[:, 1:-1], indices, "indices")
        # what the layers themselves make is left alone
        plain = run_tower(model, case["pixel_values"], [], facts)
        assert_close(run.hidden[-1], plain.hidden[-1], "the last layer's output")


CHECKS = {"prumerge.e2e_clip": check_e2e_clip, "prumerge.merge": check_merge}
