"""Golden checks of pitome."""

from typing import Any

import torch
from reference.merging import bsm
from reference.spectral import distance_graph, group_means, lifted, spectral_distance, spectrum
from torch import Tensor

from golden_checks.case import Case, assert_close
from golden_checks.merge_plan import check_plan, outputs, parity_indices
from golden_checks.towers import clip_tower, run_tower, tower_facts, vit_classifier
from tokprune.methods.merging.stage import MergeStage
from tokprune.methods.pitome import PiToMe
from tokprune.methods.tome import ToMe
from tokprune.operators.bipartite import bipartite_soft_matching, removed_by_ratio
from tokprune.operators.energy import energy, energy_bsm, pitome
from tokprune.operators.merging import MergePlan


def check_ratio(case: Case) -> None:
    p = case.parameters
    metric, cls = case["in.metric"], p["class_token"]
    tokens = metric.shape[1]
    r = removed_by_ratio(tokens, p["ratio"])
    case.told(r, "r")
    if r <= (tokens - cls) // 2:
        plan = bipartite_soft_matching(metric, r, cls)
    else:  # the edge at which the published code merges the class token; ours never does
        plan = MergePlan(*bsm(metric, r, cls), tokens)
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
    case.told(plan.src.shape[1], "r")
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
    case.told(plan.src.shape[1], "r")
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
    lift = lifted(weights, group)
    got = {"W": weights, "W_coarse_mean": group_means(weights, group), "W_lifted": lift}
    for name, laplacian in (("eig", "normalized"), ("eig_comb", "combinatorial")):
        got[name], got[f"{name}_lifted"] = (spectrum(w, laplacian) for w in (weights, lift))
        got[f"sd_{laplacian}"] = spectral_distance(features, group, laplacian).reshape(1)
    assert outputs(case) <= set(got)
    for name, tensor in got.items():
        assert tensor.dtype == torch.float64
        case.close(tensor, f"out.{name}", atol=1e-10)


def stage_of(method: PiToMe | ToMe, tokens: int, layers: int) -> MergeStage:
    """The encoder stage of a method that merges up to the very last layer."""
    steps = method.schedule(tokens, True, layers, layers - 1)
    return MergeStage(method.recipe, steps, layers - 1, method.order, method.positions)


def check_clip_tower(case: Case) -> None:
    p = case.parameters
    config = p["config"]
    layers, side = config["num_hidden_layers"], config["image_size"] // config["patch_size"]
    model, pixels = clip_tower(case.weights("weight."), config), case["in.pixel_values"]
    facts = tower_facts(layers, side, layers - 2)
    compared = set()
    for name, options in {"unpatched": {}, **p["variants"]}.items():
        stages = []
        if name != "unpatched":
            method: PiToMe | ToMe = (
                ToMe(variant="pitome_baseline_head", **options)
                if name == "tome_ratio"
                else PiToMe(variant=name, **options)
            )
            stages.append(stage_of(method, side * side + 1, layers))
        run = run_tower(model, pixels, stages, facts)
        got: dict[str, Tensor] = {
            "counts": run.counts,
            "last": run.hidden[-1],
            "pooler": run.output.pooler_output,
            "hidden_m2": run.hidden[-2],
            **{f"hidden_{i}": x for i, x in enumerate(run.hidden)},
        }
        if stages:
            got["groups"] = run.groups()
            got["margins"] = margins(method, layers)
        compared |= compare(case, name, got)
    assert compared == outputs(case)


def margins(method: Any, layers: int) -> Tensor:
    """Margins of all layers, also of those that a variant leaves out."""
    if not isinstance(method, PiToMe):
        return torch.empty(0)
    used = {rule.layer: rule.margin for rule in method.rules(layers, layers - 1)}
    every = PiToMe(ratio=method.ratio, variant="head", margin=method.margin)
    rules = every.rules(layers, layers - 1)
    assert all(rule.margin == used.get(rule.layer, rule.margin) for rule in rules)
    return torch.tensor([rule.margin for rule in rules], dtype=torch.float64)


def compare(case: Case, name: str, got: dict[str, Tensor]) -> set[str]:
    """Compare what one run recorded; hidden states to the 1e-4 that the notes of the cases name
    for whole towers. Returns the names compared."""
    wanted = {key for key in outputs(case) if key.startswith(f"{name}.")}
    for key in sorted(wanted):
        own = got[key[len(name) + 1 :]]
        if own.is_floating_point():
            case.close(own, f"out.{key}", atol=1e-6)
        else:
            case.equal(own, f"out.{key}")
    return wanted


def check_classifier(case: Case) -> None:
    """Runs of PiToMe (DeiT placement) or ToMe in an image classifier."""
    p = case.parameters
    config = p["hf_config"]
    layers, side = config["num_hidden_layers"], config["image_size"] // config["patch_size"]
    model, pixels = vit_classifier(case.weights("weight."), config), case["in.pixel_values"]
    facts = tower_facts(layers, side, layers - 1)
    compared = compare(case, "unpatched", {"logits": run_tower(model, pixels, [], facts).output})
    for name, options in p["runs"].items():
        knob = options["r_or_ratio"]
        if options["kind"] == "pitome":
            method: PiToMe | ToMe = PiToMe(ratio=knob, variant="deit")
        else:
            r = tuple(knob) if isinstance(knob, list) and len(knob) == 2 else knob
            method = ToMe(r=r, prop_attn=options["prop_attn"])
        stage = stage_of(method, side * side + 1, layers)
        assert sorted(stage.steps) == options["layers_with_merge"]
        if options["kind"] == "tome":
            r_per_layer = [stage.steps[i].r if i in stage.steps else 0 for i in range(layers)]
            assert r_per_layer == options["r_per_layer"]
        run = run_tower(model, pixels, [stage], facts)
        size: Any = run.tower.runs[0].size  # type: ignore[attr-defined]
        got = {
            "counts": run.merge_counts(),
            "groups": run.groups(),
            "final_size": size,
            "last_pre_norm": run.hidden[-1],
            "logits": run.output,
        }
        compared |= compare(case, name, got)
        assert_close(size.sum((1, 2)), torch.full((len(pixels),), side * side + 1.0), "mass")
    assert compared == outputs(case)


CHECKS = {
    "e2e CLIP vision tower": check_clip_tower,
    "e2e ViT classifier": check_classifier,
    "pitome_vision[protect]": check_protect,
    "pitome_vision[energy_bsm]": check_energy_bsm,
    "pitome_vision_v1": check_v1,
    "pitome_text": lambda case: check_protect(case, "gauss_text", "halves"),
    "ratio_bsm": check_ratio,
    "spectral_distance": check_spectral,
}
