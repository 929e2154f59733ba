"""Golden checks of prunesid: components, suppression inside groups, shares."""

import torch
from torch import Tensor

from golden_checks.case import Case
from tokprune.methods.prunesid import PruneSID
from tokprune.operators.prunesid import group_choice, principal_groups


def _check(case: Case, group: Tensor) -> None:
    p, patches = case.parameters, case["hidden"][:, 1:]
    score = case["cls_attn"].float().sum(1)
    # the class token is one of the T tokens
    index = group_choice(patches, group, score, p["groups"], p["T"] - 1, p["T"])
    case.equal(torch.nn.functional.pad(index + 1, (1, 0)), "indices")


def check_select(case: Case) -> None:
    _check(case, case["groups"])


def check_end_to_end(case: Case) -> None:
    p, patches = case.parameters, case["hidden"][:, 1:]
    group, _ = principal_groups(patches, p["groups"])
    case.equal(group, "groups")
    _check(case, group)
    index = PruneSID(keep=p["T"]).grouped(
        patches, case["cls_attn"].float().sum(1), p["T"] - 1, p["T"]
    )
    case.equal(torch.nn.functional.pad(index + 1, (1, 0)), "indices", where="of the method")


CHECKS = {"prunesid.select": check_select, "prunesid.end_to_end": check_end_to_end}
