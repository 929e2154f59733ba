"""Golden checks of rectified attention: anchors, clusters, biases, and whole decoders with them."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from golden_checks.case import Case
from golden_checks.models import fill
from tokprune.operators.anchors import Clusters, clusters_around, distinctive_anchors
from tokprune.operators.diversity import divprune
from tokprune.operators.rectified import distance_bias, extended, recycled_weight


def check_anchors(case: Case) -> None:
    p = case.parameters
    got = distinctive_anchors(case["features"], p["n_merged"], p["superior"])
    case.equal(got.anchors, "anchors")
    case.equal(got.cluster, "cluster")
    case.close(got.merged, "merged", atol=1e-6)
    case.equal(got.size[..., None], "size")


def _reduced(case: Case) -> Clusters:
    """Kept tokens and anchors as one partition, in the order of their medians."""
    p, x = case.parameters, case["features"]
    kept = int(p["gamma"] * p["n_vis"])
    if p["base"] == "divprune":
        retained = divprune(x, kept).sort().values
        case.equal(retained, "retained")
    else:
        retained = case["retained"]
    alone = torch.ones(len(x), dtype=torch.bool)
    alone[retained] = False
    rest = alone.nonzero().view(-1)
    own = distinctive_anchors(x[rest], p["n_vis"] - kept, p["superior"])
    cluster = torch.empty(len(x), dtype=torch.long)
    cluster[retained] = torch.arange(kept)
    cluster[rest] = kept + own.cluster
    merged = torch.cat([x[retained].float(), own.merged])
    size = torch.cat([torch.ones(kept, dtype=torch.long), own.size])
    return Clusters(torch.cat([retained, rest[own.anchors]]), cluster, merged, size)


def check_reduce(case: Case) -> None:
    p, got = case.parameters, _reduced(case)
    by_first = got.place("first").argsort()
    case.equal(by_first.argsort()[got.cluster], "cluster")
    case.close(got.merged[by_first], "merged", atol=1e-6)
    case.close(got.size[by_first].float(), "size")
    for rule in ("first", "median", "last"):
        place = got.place(rule)[by_first]
        if rule != "last":  # the official code mirrors it
            case.equal(place.sort().values + p["n_sys"], f"positions_{rule}")
            case.equal(place.argsort(), f"order_{rule}")
    case.aside("positions_mean", "order_mean")  # fractional positions are none of ours


def _tables(positions: Tensor, width: int, base: float, axes: Any = None) -> tuple[Tensor, Tensor]:
    theta = base ** (-torch.arange(0, width, 2).double() / width)
    own = positions.double()
    angles = own[:, None] * theta if axes is None else own[torch.tensor(axes)].T * theta
    return angles.cos().float(), angles.sin().float()


def check_distance(case: Case) -> None:
    p = case.parameters
    axes = p.get("axis_of_frequency")
    width = 2 * len(axes) if axes else p["rope_dim"]
    table = _tables(case["positions"], width, p["rope_base"], axes)
    got = distance_bias(table, table, p["c"])
    wanted = case.t["bias"]
    if not wanted.triu(1).any():  # what no query sees is not recorded
        got = got.tril()
    case.close(got, "bias", rtol=1e-4, atol=2e-5)


def check_rectify(case: Case) -> None:
    p, query, key = case.parameters, case["query"], case["key"]
    bias = case["weight"].log()[None]
    own = extended(query[None], key[None], case["value"][None], bias, p["scale"])
    logits = own.query @ own.key.transpose(-1, -2) * p["scale"]
    if (offset := p["causal_offset"]) is not None:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(offset)
        logits = logits.masked_fill(~seen, -torch.inf)
    out = (logits.softmax(-1) @ own.value)[0]
    case.close(out[..., : query.shape[-1]], "out", rtol=1e-4, atol=1e-6)
    assert not out[..., query.shape[-1] :].any()


def check_recycle(case: Case) -> None:
    x, anchors = case["features"], case["anchors"]
    got = clusters_around(x, anchors)
    case.equal(got.cluster, "cluster")
    case.close(got.merged, "merged", atol=1e-6)
    case.close(recycled_weight(got.cluster, anchors), "weight_count")
    weight = case.parameters["constant"] * (1 - case["entropy"])
    case.close(recycled_weight(got.cluster, anchors, weight), "weight_saliency", atol=1e-6)


def check_e2e_llama(case: Case) -> None:
    p, got = case.parameters, _reduced(case)
    config = dict(p["config"], attn_implementation="eager")
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    fill(model, case.weights())
    place, order = got.place(p["positions"]).sort()
    embed = model.get_input_embeddings()
    sys, text, new = embed(case["sys_ids"]), embed(case["txt_ids"]), embed(case["new_ids"])
    prompt = torch.cat([sys, got.merged[order], text])
    behind = len(sys) + len(case["features"])
    position = torch.cat(
        [torch.arange(len(sys)), len(sys) + place, behind + torch.arange(len(text) + len(new))]
    )
    size = torch.ones(2, len(prompt))
    visual = slice(len(sys), len(sys) + len(order))
    size[1, visual] = got.size[order].float()
    size[0, visual] = (
        len(case["features"]) / len(order) if p["uniform_first_layer"] else size[1, visual]
    )
    case.close(size[0], "size_layer0")
    case.close(size[1], "size_layer1")
    table = _tables(position, p["rope_dim"], p["rope_base"])
    distance = distance_bias(table, table, p["c"])
    whole = torch.cat([size, torch.ones(2, len(new))], 1).log()
    cache = DynamicCache()

    def run(x: Tensor, start: int) -> Tensor:
        stop, n = start + len(x), len(prompt)
        seen = torch.ones(stop, stop, dtype=torch.bool).tril()[start:]

        def mask(layer: int) -> Tensor:
            bias = whole[min(layer, 1), :stop].expand(len(x), -1)
            if start < n or p["distance_in_decode"]:
                bias = bias + distance[start:stop, :stop]
            return bias.masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

        def hook(layer: int) -> Any:
            return lambda m, args, kwargs: (args, {**kwargs, "attention_mask": mask(layer)})

        handles = [
            layer.register_forward_pre_hook(hook(number), with_kwargs=True)
            for number, layer in enumerate(model.model.layers)
        ]
        try:
            with torch.no_grad():
                return model(
                    inputs_embeds=x[None], position_ids=position[None, start:stop],
                    past_key_values=cache, use_cache=True,
                ).logits[0]  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()

    case.close(run(prompt, 0), "logits_prefill", rtol=1e-4, atol=1e-5)
    steps = [run(new[i : i + 1], len(prompt) + i) for i in range(len(new))]
    case.close(torch.cat(steps), "logits_decode", rtol=1e-4, atol=1e-5)


CHECKS = {
    "restore.anchors": check_anchors,
    "restore.reduce": check_reduce,
    "restore.distance_bias": check_distance,
    "restore.distance_bias_mrope": check_distance,
    "restore.e2e_llama": check_e2e_llama,
    "era.rectify": check_rectify,
    "era.recycle": check_recycle,
}
