"""Golden checks of score: farthest-first, weighted by salience."""

from golden_checks.case import Case
from tokprune.operators.score import salient_k_center


def check_select(case: Case) -> None:
    p = case.parameters
    order = salient_k_center(case["features"], case["cls_attn"], p["keep"], p["alpha"])
    case.equal(order, "order")


CHECKS = {"score.select": check_select}
