"""Golden checks of pitome."""

import torch
from torch import Tensor

from golden_checks.case import Case, assert_close
from golden_checks.merge_plan import check_plan, outputs, parity_indices
from tokprune.operators.bipartite import ratio_bsm
from tokprune.operators.energy import energy, energy_bsm, pitome
from tokprune.operators.merging import MergePlan
from tokprune.operators.spectral import coarsen, distance_graph, spectra, spectral_distance


def check_ratio(case: Case) -> None:
    p = case.parameters
    # the edge that merges the class token is recorded, so no protection here
    plan = ratio_bsm(case["in.metric"], p["ratio"], p["class_token"], protect_class=False)
    assert plan is not None
    assert plan.src.shape[1] == p["r"]
    check_plan(case, plan, parity_indices(plan))


def check_protect(case: Case, kind: str = "elu", split: str = "alternate") -> None:
    p, metric, cls = case.parameters, case["in.metric"], int(case.parameters["class_token"])
    alpha = p.get("alpha", 1.0)
    plan = pitome(
        metric,
        p["ratio"],
        margin=p["margin"],
        kind=kind,
        alpha=alpha,
        class_token=bool(cls),
        split=split,
    )
    assert plan is not None
    assert plan.src.shape[1] == p["r"]
    assert_class_leads(plan, cls)
    indices = energies(case, kind)
    indices["protected_idx"] = plan.keep[:, cls:] - cls
    indices |= {"a_idx": plan.src - cls, "b_idx": plan.dst - cls, "dst_idx": plan.slot}
    check_plan(case, plan, indices)


def check_energy_bsm(case: Case) -> None:
    p, metric, cls = case.parameters, case["in.metric"], int(case.parameters["class_token"])
    plan = energy_bsm(
        metric, p["ratio"], margin=p["margin"], alpha=p["alpha"], class_token=bool(cls)
    )
    assert plan is not None
    assert plan.src.shape[1] == p["r"]
    assert_class_leads(plan, cls)
    indices = energies(case, "elu")
    a_idx = indices["order"][:, 0::2]
    where = torch.empty(a_idx.shape[0], plan.tokens - cls, dtype=torch.long)
    where.scatter_(1, a_idx, torch.arange(a_idx.shape[1]).expand_as(a_idx))
    indices |= {"a_idx": a_idx, "b_idx": plan.dst - cls, "dst_idx": plan.slot}
    indices["src_idx"] = where.gather(1, plan.src - cls)
    indices["unm_idx"] = where.gather(1, plan.keep[:, cls:] - cls)
    check_plan(case, plan, indices)


def check_v1(case: Case) -> None:
    if case.parameters["margin"] >= case.parameters["bsm_when_margin_ge"]:
        check_ratio(case)
    else:
        check_protect(case, "gauss")


def energies(case: Case, kind: str) -> dict[str, Tensor]:
    p = case.parameters
    free = case["in.metric"][:, int(p["class_token"]) :]
    got = energy(free, p["margin"], kind, p.get("alpha", 1.0))
    return {"energy": got, "order": got.argsort(dim=-1, descending=True, stable=True)}


def assert_class_leads(plan: MergePlan, cls: int) -> None:
    assert (plan.keep[:, :cls] == 0).all()


def check_spectral(case: Case) -> None:
    features, group = case["in.metric"], case["in.group"]
    weights = distance_graph(features)
    coarse, size = coarsen(weights, group)
    mean = coarse / torch.outer(size, size)
    got = {"W": weights, "W_coarse_mean": mean, "W_lifted": mean[group][:, group]}
    for name, laplacian in (("eig", "normalized"), ("eig_comb", "combinatorial")):
        got[name], got[f"{name}_lifted"] = spectra(features, group, laplacian)
        got[f"sd_{laplacian}"] = spectral_distance(features, group, laplacian).reshape(1)
    assert outputs(case) == set(got)
    for name, tensor in got.items():
        assert tensor.dtype == torch.float64
        assert_close(tensor, case[f"out.{name}"], name, atol=1e-10)


CHECKS = {
    "pitome_vision[protect]": check_protect,
    "pitome_vision[energy_bsm]": check_energy_bsm,
    "pitome_vision_v1": check_v1,
    "pitome_text": lambda case: check_protect(case, "gauss_text", "halves"),
    "ratio_bsm": check_ratio,
    "spectral_distance": check_spectral,
}
