"""Golden checks of mmtok: coverage, the words of questions, patches of padding."""

import torch

from golden_checks.case import Case
from tokprune.methods.mmtok import keywords
from tokprune.operators.mmtok import multimodal_coverage, square_padding


def check_select(case: Case) -> None:
    p, vision = case.parameters, case["vision"]
    n = len(vision)
    excluded = torch.zeros(1, n, dtype=torch.bool)
    if p["exclude"]:
        excluded[0, p["exclude"]] = True
    if p["target"] >= n:  # the method leaves such images alone
        order = torch.arange(n)
        case.aside("text", "vision_clip")
    else:
        (order,) = multimodal_coverage(
            case["text"][None], vision[None], case["vision_clip"][None], p["target"], p["alpha"],
            p["tv_temperature"], p["vv_temperature"], excluded=excluded,
        )  # fmt: skip
    case.equal(order, "order")
    case.equal(order.sort().values, "kept")


def check_keywords(case: Case) -> None:
    case.aside("dummy")
    case.told([keywords(text) for text in case.parameters["texts"]], "expected")


def check_padding(case: Case) -> None:
    p = case.parameters
    for i, (width, height) in enumerate(p["sizes_width_height"]):
        case.equal(square_padding(height, width, p["target"], p["patch"]), f"indices_{i}")


CHECKS = {
    "mmtok.keywords": check_keywords,
    "mmtok.padding": check_padding,
    "mmtok.select": check_select,
}
