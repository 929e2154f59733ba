"""Golden checks of sieve: the heads that count, residuals of visual tokens, the order of choice."""

from golden_checks.case import Case
from tokprune.operators.sieve import strongest_heads, text_residual, unexplained_and_diverse


def check_attention(case: Case) -> None:
    received = case["attention"].float().sum(1)[None]
    heads, scores = strongest_heads(received, case.parameters["heads"])
    case.equal(heads[0, 0], "heads")
    case.close(scores[0], "scores")


def check_select(case: Case) -> None:
    p = case.parameters
    found = text_residual(case["visual"][None], case["text"][None], p["energy"], p["eps"])
    case.close(found.ratio[0], "cmr")
    case.close(found.ridge, "lam")
    order = unexplained_and_diverse(
        found.residual, found.ratio, case["attention"][None], p["keep"]
    )  # fmt: skip
    case.equal(order[0], "order")


CHECKS = {"sieve.attention": check_attention, "sieve.select": check_select}
