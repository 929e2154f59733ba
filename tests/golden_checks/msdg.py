"""Golden checks of msdg: groups, saliencies, shares of the budget, what stays."""

from golden_checks.case import Case
from tokprune.operators.msdg import change_direction, question_saliency, salient_of_groups


def check_select(case: Case) -> None:
    p = case.parameters
    sink = case["sink_state"][None, :, p["sink_coordinate"]].abs() > p["sink_threshold"]
    change = (case["end"].float() - case["start"].float()).norm(dim=-1)[None]
    saliency = question_saliency(change, case["projected"][None], case["query"][None])
    direction = change_direction(case["early"], case["late"])[None]
    found = salient_of_groups(direction, saliency, p["budget"], p["groups"], sink, p["seed"])
    case.equal(found.group[0], "groups")
    case.close(saliency.masked_fill(sink, 0.0)[0], "saliency")
    case.equal(found.budget[0], "budgets")
    case.equal(found.kept[0], "keep")


CHECKS = {"msdg.select": check_select}
