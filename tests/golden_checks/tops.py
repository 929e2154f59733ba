"""Golden checks of tops: relevance, diversity and coverage, greedily."""

from golden_checks.case import Case
from tokprune.operators.tops import preservation_set


def check_select(case: Case) -> None:
    p, x, relevance = case.parameters, case["features"], case["relevance"]
    order = preservation_set(x, relevance, p["keep"], p["alpha"], p["lam"], p["normalise"])
    case.equal(order, "order")


CHECKS = {"tops.select": check_select}
