"""Golden checks of SCOPE's selection: saliency times coverage, greedily."""

from golden_checks.case import Case
from tokprune.operators.coverage import coverage


def check_select(case: Case) -> None:
    p = case.parameters
    saliency = case["cls_attn"].float().sum(1)
    case.close(saliency, "saliency")
    order = coverage(case["features"], p["T"], saliency, p["alpha"], p["combine"])
    case.equal(order, "order")
    case.equal(order.sort(-1).values, "keep")


CHECKS = {"scope.select": check_select}
