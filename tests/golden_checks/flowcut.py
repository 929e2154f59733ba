"""Golden checks of flowcut: operators, whole towers, whole LLaVA models."""

from dataclasses import replace
from typing import Any

import torch
from reference.packing import raster_pack
from tiny import tokens_of
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import tokprune
from golden_checks.case import Case, assert_close, assert_equal
from golden_checks.models import Watched, fill, run
from golden_checks.towers import clip_tower, run_tower, tower_facts
from tokprune.engine.contracts import EncoderStage
from tokprune.methods.flowcut import FlowCut
from tokprune.operators.anyres import raster_position, unpad_bounds
from tokprune.operators.attention import attention_rows
from tokprune.operators.flow import (
    FlowKeep,
    accumulate,
    attention_entropy,
    attn_terms,
    encoder_keep,
    flow_score,
    global_query_terms,
    prune_count,
    text_terms,
)
from tokprune.operators.topk import keep_topk

#: Recorded in half precision, computed by us in float32.
HALF = 2e-3


def check_attn_terms(case: Case) -> None:
    q, k, v = case["q"], case["k"], case["v"]
    terms = attn_terms(q, k, v)
    case.close(terms.attention, "cls_attn")
    case.close(terms.value, "value")
    case.close(terms.semantic, "semantic_attn")
    # an image's row may be tiny, exp of a large difference: compare it on its own scale too
    recorded = case.output("semantic_attn")
    for i, (got, want) in enumerate(zip(terms.semantic, () if recorded is None else recorded)):
        assert_close(got, want, f"semantic_attn of image {i}", rtol=1e-4, atol=1e-20)
    row_alone = attn_terms(q[:, :, :1], k, v)
    assert all(torch.equal(a, b) for a, b in zip(terms, row_alone))
    w = case.weights()
    if "hidden" in case and "q_proj.weight" in w:
        for name, got in zip("qkv", projections(case["hidden"], w, q.shape[1])):
            case.close(got, name)
    if "out_proj.weight" in w:
        y = (attention_rows(q, k) @ v).transpose(1, 2).flatten(2)
        case.close(y @ w["out_proj.weight"].T + w["out_proj.bias"], "attn_output")


def projections(hidden: Tensor, w: dict[str, Tensor], heads: int) -> list[Tensor]:
    made = (hidden @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"] for n in "qkv")
    return [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in made]


def check_score(case: Case) -> None:
    a, s, value = case["cls_attn"], case["semantic_attn"], case["value"]
    compare_score(flow_score(a, s, value), case)


def check_qwen_score(case: Case) -> None:
    a, s, value = case["relation"], case["semantic"], case["value"]
    compare_score(flow_score(a, s, value, renormalize=False), case)
    if a.dtype == torch.float32:
        # rows that sum to 1: the two scores agree up to rounding
        case.close(flow_score(a, s, value), "score", rtol=1e-4, where="renormalised score")


def compare_score(got: Tensor, case: Case) -> None:
    want = case.output("score")
    if want is None:
        return
    assert got.dtype == torch.float32
    for i in range(len(want)):
        rtol = 1e-5 if want.dtype == torch.float32 else HALF
        assert_close(got[i], want[i].float(), f"score of image {i}", rtol)


def check_prune_count(case: Case) -> None:
    p, attention = case.parameters, case["attn"]
    form = {} if case.operator == "flowcut.prune_count" else {"renormalize": False, "eps": 1e-7}
    exact = attention.dtype == torch.float32
    single = prune_count(attention, p["remaining"], p["target"], **form)
    batch = prune_count(attention, p["remaining"], p["target"], reduce="batch", **form)
    assert_equal(batch, single.amax().expand_as(single), "batch count")
    for got, name in ((batch[:1], "count"), (single, "count_per_image")):
        if (want := case.output(name)) is not None:
            compare_counts(got, want, exact, name)
    if "check_ratio_f64" in case:
        h = attention_entropy(attention, **form)
        case.close(h, "check_ratio_f64")
    if (raw := case.output("check_raw_f64")) is None:
        return
    clear = ((raw - raw.floor()) - 0.5).abs() > 1e-3
    assert_equal(single[clear], raw.round().long()[clear], "rounded check_raw_f64")


def compare_counts(got: Tensor, want: Tensor, exact: bool, what: str) -> None:
    """Half-precision entropies are too coarse near 1: their counts may be off by one."""
    if exact:
        assert_equal(got, want, what)
    else:
        assert got.shape == want.shape, what
        assert (got - want).abs().max() <= 1, f"{what}: {got.tolist()} != {want.tolist()}"


def check_encoder_step(case: Case) -> None:
    p, attention, ids = case.parameters, case["cls_attn"], case["keep_in"]
    target = p["target_with_cls"] - 1
    history = case.get("cumulative_in")
    keep: FlowKeep | None = None
    case.aside("semantic_attn", "value")  # not looked at where nothing is to be dropped
    if attention.shape[1] > target:
        score = flow_score(attention, case["semantic_attn"], case["value"])
        history = accumulate(history, score)
        keep = encoder_keep(history, attention, p["remaining"], target, reduce="batch")
    hidden = case["hidden"]
    if keep is not None:
        index = keep.index
        assert keep.counts == [index.shape[1]] * len(index)
        ids, history = ids.gather(1, index), history.gather(1, index)
        patches = hidden[:, 1:].gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        hidden = torch.cat([hidden[:, :1], patches], dim=1)
    case.told(ids.shape[1], "kept")
    case.equal(ids, "keep_out")
    case.equal(hidden, "hidden_out")
    if history is None:
        assert "cumulative_out" not in case
    else:
        case.close(history, "cumulative_out")


def check_llm_select(case: Case) -> None:
    p, q, k, v = case.parameters, case["q"], case["k"], case["v"]
    keep = []
    for i, (start, n, end) in enumerate(
        zip(p["visual_start"], p["visual_num"], p["last_pos_exclusive"])
    ):
        if i not in p["rows"]:
            assert n <= p["target"], f"sample {i}, no more tokens than the budget"
            continue
        allowed = torch.zeros(1, q.shape[2], dtype=torch.bool)
        allowed[:, start : start + n] = True
        row = slice(end - 1, end)
        terms = text_terms(
            q[i : i + 1, :, row], k[i : i + 1], v[i : i + 1, :, row], v[i : i + 1], allowed=allowed
        )
        score = flow_score(*terms)[0, start : start + n]
        case.close(score, f"check_score_f64.{i}", where=f"score of sample {i}")
        keep.append(keep_topk(score, p["target"]))
        keys, values = (x[i].repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (k, v))
        block = slice(start, start + n)
        terms = text_terms(q[i][:, row], keys[:, block], values[:, row], values[:, block])
        again = keep_topk(flow_score(*terms), p["target"])
        assert_equal(again, keep[-1], f"sample {i}, the image alone, heads repeated")
    case.equal(torch.stack(keep), "keep_indices")


def check_anyres_pack(case: Case) -> None:
    p, kept, side = case.parameters, case["keep_indices"], case.parameters["grid"]
    tiles, size = (p["h"], p["w"]), tuple(p["image_size_wh"])
    rows = torch.cat([case["base"][None], case["tiles"]])
    height, width = side * p["h"], side * p["w"]
    bounds = unpad_bounds(height, width, size)
    for name, inside in (("out_no_unpad", None), ("out_unpad", bounds)):
        at = raster_pack(kept, tiles, side, len(case["base"]), inside)
        case.equal(rows[at[:, 0], at[:, 1]], name)
    order = raster_position(kept, tiles, side).flatten().argsort()
    crops = torch.stack([order // kept.shape[1] + 1, order % kept.shape[1]], dim=1)
    assert_equal(crops, raster_pack(kept, tiles, side, 0), "order of the crops")
    mask = torch.zeros(height * width, dtype=torch.long)
    mask[raster_position(kept, tiles, side).flatten()] = 1
    mask = mask.view(height, width)
    case.equal(mask, "mask")
    top, bottom, left, right = bounds
    shown = torch.zeros_like(mask)
    shown[top:bottom, left:right] = 1
    case.equal(mask * shown, "mask_unpad")


def check_qwen_vit_terms(case: Case) -> None:
    p, q, k, v = case.parameters, case["q"], case["k"], case["v"]
    attention, value = global_query_terms(q[None], k[None], v[None])
    case.close(attention, "attn")
    score = flow_score(attention, None, value, renormalize=False)
    case.close(score, "score")
    for want in p.get("prune_count", ()):
        got = prune_count(attention, want["remaining"], want["target"], renormalize=False, eps=1e-7)
        assert got.tolist() == [want["count"]], want
    edges = torch.tensor(p["segments"])
    segment = torch.bucketize(torch.arange(q.shape[1]), edges, right=True)
    y = attention_rows(q, k, allowed=segment[:, None] == segment) @ v
    w = case.weights()
    case.aside("hidden", "rotary")  # what q, k and v were made of
    if "proj.weight" in w:
        y = y.transpose(0, 1).flatten(1) @ w["proj.weight"].T + w["proj.bias"]
        case.close(y, "attn_output")


# ------------------------------------------------------------------------------- whole models

#: whole towers, logits (section 10 of the method's description)
TOWER, LOGITS = 1e-4, 3e-5


def record_counts(stage: EncoderStage) -> list[list[float]]:
    """Makes a stage write down [layer, largest number to drop before rounding] of every cut whose
    number depends on the entropy."""
    raw: list[list[float]] = []
    start = stage.start

    def watched(tower: Any) -> Any:
        own: Any = start(tower)
        keep = own._keep

        def recorded(remaining: int, tokens: Any) -> Any:
            if remaining:
                n, target = own.row.shape[1], own.stage.patches
                h = attention_entropy(own.row.double(), tokens.patch_valid)
                number = (n - target) / remaining**0.5 * (1 - h**2)
                raw.append([own.stage.last - remaining, float(number.max())])
            return keep(remaining, tokens)

        own._keep = recorded
        return own

    stage.start = watched  # type: ignore[method-assign]
    return raw


def compare_counts_before_rounding(got: list[list[float]], want: list[list[float]]) -> None:
    assert [layer for layer, _ in got] == [layer for layer, _ in want], (got, want)
    for (_, a), (_, b) in zip(got, want):
        assert abs(a - b) <= 1e-3, (got, want)


def check_clip(case: Case) -> None:
    p = case.parameters
    config = p["config"]
    layers, side = config["num_hidden_layers"], config["image_size"] // config["patch_size"]
    facts = tower_facts(layers, side, layers + p["select_layer"])
    cls = int(p["select_feature"] == "cls_patch")
    tower = replace(facts.tower, cls_in_features=bool(cls), tokens_per_tile=side * side + cls)
    facts, feature_layer = replace(facts, tower=tower), layers + p["select_layer"]
    stages = FlowCut(p["target_num"], count_reduce="batch").plan(facts).encoder
    raw = [record_counts(stage) for stage in stages]
    for attention in ("eager", "sdpa"):
        for numbers in raw:
            numbers.clear()
        model = clip_tower(case.weights(), config, attention)
        plain = None
        if "features_unpruned" in case:
            plain = run_tower(model, case["pixel_values"], (), facts).hidden[feature_layer + 1]
        pruned = run_tower(model, case["pixel_values"], stages, facts)
        alive = torch.arange(side * side).expand(p["B"], -1)
        after = dict(pruned.tower.history)
        for layer in range(layers):
            alive = after[layer].slots[:, 1:] if layer in after else alive
            case.equal(alive, f"layer.{layer}.keep")
        if alive.shape[1] < side * side:
            case.equal(alive, "keep_indices")
        else:  # the official list has an entry too many
            case.aside("keep_indices")
        rows = torch.tensor([x.shape[1] for x in pruned.hidden[1:]])
        case.equal(rows, "tokens_after_layer")
        case.told(rows.tolist(), "tokens_after_layer_incl_cls")
        if "raw_prune_number" in p:
            compare_counts_before_rounding(raw[0] if raw else [], p["raw_prune_number"])
        features = pruned.hidden[feature_layer + 1]
        case.close(features[:, 1 - cls :], "features", TOWER)
        if plain is not None:  # recorded with or without the class token
            number = case["features_unpruned"].shape[1]
            case.close(plain[:, -number:], "features_unpruned", TOWER)


def load_checkpoint(case: Case, attention: str) -> Any:
    """A model from weights named as in the checkpoints of the original LLaVA code."""
    p = case.parameters
    clip, llm, llava = p["clip_config"], p["llm_config"], p["llava"]
    tiled = llava["image_aspect_ratio"] == "anyres"
    options: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**clip),
        "text_config": LlamaConfig(**llm),
        "image_token_id": placeholder(case, llm["vocab_size"]),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if tiled:  # (width, height) in the original code, (height, width) in transformers
        options["image_grid_pinpoints"] = [[h, w] for w, h in llava["image_grid_pinpoints"]]
    made = LlavaNextConfig(**options) if tiled else LlavaConfig(**options)
    made._attn_implementation = attention
    cls: Any = LlavaNextForConditionalGeneration if tiled else LlavaForConditionalGeneration
    model = cls(made).eval()
    names = (
        ("model.vision_tower.vision_tower.", "model.vision_tower."),
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    )
    weights = {}
    for name, value in case.weights().items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        weights[name] = value
    fill(model, weights, without=("vision_tower.post_layernorm",))
    return model


def placeholder(case: Case, vocabulary: int) -> int:
    """A token that the case does not use, for the places of the image."""
    used = set(case["input_ids"].flatten().tolist())
    if "generated" in case:
        used |= set(case["generated"].flatten().tolist())
    return max(set(range(vocabulary)) - used)


def prompt(model: Any, ids: Tensor, size: tuple[int, int] | None) -> dict[str, Tensor]:
    """Model inputs of ``ids`` [1, n], where −200 stands for the image."""
    row = ids[0].tolist()
    at = row.index(-200)
    image = [model.config.image_token_id] * tokens_of(model, size)
    expanded = torch.tensor([row[:at] + image + row[at + 1 :]])
    inputs = {"input_ids": expanded, "attention_mask": torch.ones_like(expanded)}
    if size is not None:
        inputs["image_sizes"] = torch.tensor([size])
    return inputs


def watch_projector(model: Any, seen: dict[str, Tensor]) -> Any:
    """Records input and output of the projector in the next call; remove the handle after it.
    To be installed before the model is patched."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["projector_in"], seen["projector_out"] = args[0].detach(), output.detach()

    return model.model.multi_modal_projector.register_forward_hook(hook)


def check_llava(case: Case) -> None:
    p = case.parameters
    size = None
    if "image_sizes_wh" in case:
        width, height = case["image_sizes_wh"][0].tolist()
        size = (height, width)
    tokens = None
    if "generated" in case:  # after a placeholder; the last one is not fed back
        tokens = case["generated"][:, 1:-1]
    elif "decode_logits" in case:
        tokens = case["decode_logits"][:-1].argmax(-1)[None]
    for attention in ("eager", "sdpa"):
        model = load_checkpoint(case, attention)
        pixels = case["pixel_values"]
        inputs = {**prompt(model, case["input_ids"], size), "pixel_values": pixels}
        method = Watched(FlowCut(p["target_num"], count_reduce="batch"))
        seen: dict[str, Tensor] = {}
        handle = watch_projector(model, seen)
        with tokprune.compress(model, method) as trace:
            got = run(model, inputs, tokens)
        handle.remove()
        last: Any = trace.last
        compare_run(case, method, last, got, seen)


def compare_run(case: Case, method: Watched, last: Any, got: Any, seen: dict[str, Tensor]) -> None:
    record = last.records[0]
    rows = [after[0] for _, after in last.tower_rows(record)]
    case.told(rows, "tokens_after_tower_layer_incl_cls")
    case.equal(record.history[-1][1], "vision_keep")
    for name, value in seen.items():
        case.close(value, name, TOWER)
    case.close(got.entered, "inputs_embeds", TOWER)
    entering, final = last.layers[0], last.layers[-1]
    visual = entering.segment[0] >= 0
    case.told([int(visual.nonzero()[0])], "visual_token_pos")
    case.told([int(visual.sum())], "visual_token_num")
    if "llm_keep" in case or "llm_score" in case:
        block = entering.column[0][visual]
        kept = final.column[0][final.segment[0] >= 0]
        place = (block[:, None] == kept).nonzero()[:, 0]
        case.equal(place[None], "llm_keep")
        score = method.runs[0].score[0][visual]  # type: ignore[attr-defined]
        case.close(score[None], "llm_score", LOGITS)
    lengths = torch.tensor([layer.lengths[0] for layer in last.layers])
    case.equal(lengths, "kv_len_after_prefill")
    steps = got.logits.shape[1] - 1
    assert_equal(torch.tensor(got.cache_lengths()) - steps, lengths, "keys in the cache")
    case.close(got.hidden, "hidden_last", LOGITS)
    case.close(got.logits[:, 0], "prefill_logits_last", LOGITS)
    if steps:
        case.close(got.logits[0], "decode_logits", LOGITS)
        if (generated := case.output("generated")) is not None:
            assert_equal(got.logits.argmax(-1), generated[:, 1:], "generated")


CHECKS = {
    "flowcut.attn_terms": check_attn_terms,
    "flowcut.score": check_score,
    "flowcut.prune_count": check_prune_count,
    "flowcut.e2e_clip": check_clip,
    "flowcut.e2e_llava": check_llava,
    "flowcut.encoder_step": check_encoder_step,
    "flowcut.llm_select": check_llm_select,
    "flowcut.anyres_pack": check_anyres_pack,
    "flowcut.qwen_vit_terms": check_qwen_vit_terms,
    "flowcut.qwen_prune_count": check_prune_count,
    "flowcut.qwen_score_llm": check_qwen_score,
}
