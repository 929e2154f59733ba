"""Golden checks of ficoco: cuts of the official code, which no method offers (see the reference),
made of the operators that the method runs."""

import torch
from reference.ficoco import UNUSED, official_decoder_layer, official_encoder_layer

from golden_checks.case import Case


def check_encoder_layers(case: Case) -> None:
    p, side = case.parameters, case.parameters["grid"]
    hidden, grid = case["hidden"].float(), torch.full((side * side,), UNUSED)
    for i, r in enumerate(p["reduce"]):
        attention = case[f"attention_{i}"].float()
        merged, remaining, targets, hidden = official_encoder_layer(
            hidden, attention, grid, side, r, p["beta"], p["quantile"]
        )
        case.equal(merged, f"merged_{i}")
        case.equal(remaining, f"remaining_{i}")
        case.equal(targets, f"targets_{i}")
        case.close(hidden, f"out_{i}", 1e-4)
    case.equal(grid.isinf(), "grid_closed")


def check_decoder_layer(case: Case) -> None:
    p = case.parameters
    merged, remaining, targets, out = official_decoder_layer(
        case["hidden"].float(), case["attention"].float(), p["visual"], p["reduce"], p["gamma"],
        p["alpha"], p["quantile"], p.get("protected", 1),
    )  # fmt: skip
    case.equal(merged, "merged")
    case.equal(remaining, "remaining")
    case.equal(targets, "targets")
    case.close(out, "out", 1e-4)


CHECKS = {"v_layers": check_encoder_layers, "l_layer": check_decoder_layer}
