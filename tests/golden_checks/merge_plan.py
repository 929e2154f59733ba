"""What every recorded merge plan is compared on, whichever matching made it."""

import torch
from torch import Tensor

from golden_checks.case import Case, assert_equal
from tokprune.operators.merging import MergePlan


def outputs(case: Case) -> set[str]:
    """Names of the recorded outputs, without their prefix."""
    return {name[4:] for name in case.t if name.startswith("out.")}


def check_plan(case: Case, plan: MergePlan | None, indices: dict[str, Tensor]) -> None:
    """Compare a plan, and the indices and scores of its making, with every recorded output.

    ``indices``: by recorded name; integer tensors are compared exactly, floats closely.
    """
    assert plan is not None
    before = {name: tensor.clone() for name, tensor in case.t.items()}
    got = {"group": plan.group()}
    eye = torch.eye(plan.tokens).expand(len(case["in.metric"]), -1, -1)
    got["source"] = plan.apply(eye, "amax")
    if (x := case.get("in.x")) is not None:
        got |= _values(plan, x, case.get("in.size"))
    got |= indices
    # not without what was merged, or its sizes
    unknown = set() if "in.x" in case else set(VALUES)
    unknown |= set() if "in.size" in case else {"wavg_x", "wavg_size"}
    for name in sorted(outputs(case) - unknown):
        assert name in got, f"recorded output {name} is not compared"
        compare = case.close if got[name].is_floating_point() else case.equal
        compare(got[name], f"out.{name}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.t.items())


#: outputs that are made of the merged values
VALUES = (
    "mean", "sum", "amax", "prune", "wavg_x", "wavg_size", "wavg1_x", "wavg1_size",
    "unmerge_of_mean",
)  # fmt: skip


def _values(plan: MergePlan, x: Tensor, size: Tensor | None) -> dict[str, Tensor]:
    got = {mode: plan.apply(x, mode) for mode in ("mean", "sum", "amax", "prune")}
    if size is not None:
        got["wavg_x"], got["wavg_size"] = plan.weighted(x, size)
    got["wavg1_x"], got["wavg1_size"] = plan.weighted(x)
    # k-th matching drops tokens at the end, and the official inverse leaves them out
    covered = plan.kept + plan.src.shape[1]
    got["unmerge_of_mean"] = plan.unmerge(got["mean"])[:, :covered]
    return got


def parity_indices(plan: MergePlan | None) -> dict[str, Tensor]:
    """The official names of an even-to-odd plan: positions inside A and B."""
    assert plan is not None
    assert_equal(plan.dst, torch.arange(1, plan.tokens, 2).expand_as(plan.dst), "dst")
    return {"unm_idx": plan.keep // 2, "src_idx": plan.src // 2, "dst_idx": plan.slot}
