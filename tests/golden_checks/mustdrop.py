"""Golden checks of mustdrop: operators and whole LLaVA models."""

from dataclasses import dataclass, field
from typing import Any

import torch
from reference.mustdrop import cache_policy, dual_filter
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import tokprune
from golden_checks.case import Case, assert_equal
from golden_checks.flowcut import placeholder, prompt, watch_projector
from golden_checks.models import Run, Watched, fill, run
from tokprune.methods.mustdrop import MustDrop
from tokprune.operators.mustdrop import (
    filter_score,
    key_mask,
    key_scores,
    key_tokens,
    text_attention,
)
from tokprune.operators.windows import WindowMerge, spatial_merge, spatial_merge_fixed


def tolerance(*tensors: Tensor) -> float:
    """Recorded in half precision, computed by us in float32: 2e-3."""
    return 2e-3 if any(t.dtype == torch.float16 for t in tensors) else 1e-5


def check_spatial_merge(case: Case) -> None:
    p, x = case.parameters, case["x"]
    merge = spatial_merge(x, p["threshold"], tuple(p["window"]))
    compare_merge(case, merge)
    together = torch.full((len(x),), 7)
    assert_equal(
        spatial_merge(x, p["threshold"], tuple(p["window"]), share=together).r, merge.r, "r"
    )


def check_spatial_merge_fixed(case: Case) -> None:
    p, x = case.parameters, case["x"]
    merge = spatial_merge_fixed(x, tuple(p["window"]), p["retained_tokens"])
    compare_merge(case, merge)
    alive = torch.zeros(x.shape[0], x.shape[1] - 1, dtype=torch.bool).scatter(1, merge.rows, True)
    case.equal(alive, "index_mask")


def compare_merge(case: Case, merge: WindowMerge) -> None:
    x, rtol = case["x"], tolerance(case["x"])
    assert merge.out.dtype == x.dtype
    assert merge.valid.all()
    assert merge.counts == [merge.out.shape[1]] * len(x)
    case.close(merge.similarity, "window_sim", rtol)
    if (r := case.output("r")) is not None:
        assert_equal(merge.r, r.expand(len(x)), "r")
    for name in ("dst", "unmerged", "group", "size"):
        case.equal(getattr(merge, name), name)
    case.close(merge.out, "out", rtol)
    assert_equal(merge.rows, torch.cat([merge.dst, merge.unmerged], dim=1), "rows")


def check_key_tokens(case: Case) -> None:
    rows, rate = case["cls_row"], case.parameters["keep_rate"]
    case.close(key_scores(rows), "score", tolerance(rows))
    index = key_tokens(rows, rate)
    case.equal(index, "index")
    everything = torch.ones(rows.shape[0], rows.shape[2] - 1, dtype=torch.bool)
    assert_equal(key_tokens(rows, rate, everything), index, "index with valid")


def check_dual_filter(case: Case) -> None:
    p, attn = case.parameters, case["attn"]
    gamma, alpha = p["global_thr"], p["individual_thr"]
    total, peak = text_attention(attn)
    case.close(total / total.sum(), "share")
    case.close(peak, "max")
    alone = filter_score(total, peak, gamma, alpha) >= 1
    case.equal(alone.nonzero()[:, 0], "filter_keep")
    assert_equal(dual_filter(attn, gamma, alpha), alone, "the filter by loops")
    if "key_set" in case:
        keys = key_mask(case["key_set"], attn.shape[-1])
        keep = alone | keys
        case.equal(keep.nonzero()[:, 0], "keep")
        case.equal(keys[keep].nonzero()[:, 0], "key_set_next")
    batch = filter_score(*text_attention(attn[None]), gamma, alpha)[0] >= 1
    assert_equal(batch, alone, "the filter in a batch")


def check_cache_policy(case: Case) -> None:
    p = case.parameters
    start, text, cuts, layers = (
        p[name] for name in ("image_start", "text_len", "pruning_layers", "num_layers")
    )
    keeps = [case[f"stage_keep_{i}"] for i in range(len(cuts))]
    index = cache_policy(keeps, start, p["image_len"], text, layers, cuts)
    images = [p["image_len"], *(len(keep) for keep in keeps)]
    before = [start + images[sum(cut < layer for cut in cuts)] + text for layer in range(layers)]
    whole = [torch.arange(n) if at is None else at for at, n in zip(index, before)]
    case.equal(torch.tensor(before), "kv_len_before")
    case.equal(torch.tensor([len(at) for at in whole]), "kv_len_after")
    for number in case.numbered("layer_"):
        case.equal(whole[number], f"layer_{number}")


# ------------------------------------------------------------------------------- whole models

#: whole towers, logits
TOWER, LOGITS = 1e-4, 3e-5


def load(case: Case, attention: str) -> Any:
    """The recorded model. Tiles that the official code packs as one block become the base and a
    row of crops, whose image fills them exactly."""
    p, tiles = case.parameters, case["pixel_values"].shape[1]
    tiled = case["pixel_values"].dim() == 5
    side = p["clip_config"]["image_size"]
    options: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**p["clip_config"]),
        "text_config": LlamaConfig(**p["llm_config"]),
        "image_token_id": placeholder(case, p["llm_config"]["vocab_size"]),
        "vision_feature_layer": p["vision_feature_layer"],
        "vision_feature_select_strategy": "default",
    }
    if tiled:
        options["image_grid_pinpoints"] = [[side, side * (tiles - 1)]]
    made = LlavaNextConfig(**options) if tiled else LlavaConfig(**options)
    made._attn_implementation = attention
    cls: Any = LlavaNextForConditionalGeneration if tiled else LlavaForConditionalGeneration
    model = cls(made).eval()
    fill(model, case.weights(), without=("image_newline",))
    return model


def model_inputs(case: Case, model: Any) -> dict[str, Tensor]:
    pixels = case["pixel_values"].float()
    size = None
    if pixels.dim() == 5:
        side = pixels.shape[-1]
        size = (side, side * (pixels.shape[1] - 1))
    return {**prompt(model, case["input_ids"], size), "pixel_values": pixels}


@dataclass
class Watch:
    """What a run showed: inputs of the second encoder layer and of the projector, and the
    position of every decode step in every decoder layer."""

    model: Any
    seen: dict[str, Tensor] = field(default_factory=dict)
    positions: list[list[int]] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def before_patching(self, layers: list[Any], merge_layer: int) -> None:
        def second(module: Any, args: Any, kwargs: Any) -> None:
            self.seen["after_merge"] = args[0] if args else kwargs["hidden_states"]

        after = layers[merge_layer + 1]
        self.handles.append(after.register_forward_pre_hook(second, with_kwargs=True))
        self.handles.append(watch_projector(self.model, self.seen))

    def after_patching(self) -> None:
        decoder = self.model.model.language_model.layers

        def hook(number: int) -> Any:
            def before(module: Any, args: Any, kwargs: Any) -> None:
                position = kwargs["position_ids"]
                if position.shape[1] > 1:
                    return
                if number == 0:
                    self.positions.append([])
                self.positions[-1].append(int(position[0, 0]))

            return before

        for number, layer in enumerate(decoder):
            self.handles.append(layer.register_forward_pre_hook(hook(number), with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def method_of(case: Case, **changes: Any) -> MustDrop:
    p = case.parameters
    options = {
        "gamma": p["global_thr"],
        "alpha": p["individual_thr"],
        "window": tuple(p["merge"]["window"]),
        "threshold": p["merge"]["threshold"],
        "merge_after_layer": p["merge"]["after_layer"],
        "key_rate": p["key"]["keep_rate"],
        "key_layer": p["key"]["layer"],
        "prune_before": tuple(layer + 1 for layer in p["pruning_layers"]),
        **changes,
    }
    return MustDrop(**options)


def watch_encoder(stage: Any, rows: dict[str, Tensor], runs: list[Any]) -> None:
    """Records the runs of an encoder stage, and the head-mean [CLS] attention that they read."""
    start = stage.start

    def watched(tower: Any) -> Any:
        made = start(tower)
        attention = made.attention

        def seen(layer: int, calls: Any, tokens: Any) -> None:
            rows["cls_attn"] = key_scores(calls.cls_row())
            attention(layer, calls, tokens)

        made.attention = seen
        runs.append(made)
        return made

    stage.start = watched


def check_e2e(case: Case) -> None:
    for attention in ("eager", "sdpa"):
        _check_model(case, load(case, attention))


def _check_model(case: Case, model: Any) -> None:
    inputs = model_inputs(case, model)
    tokens = None
    if "generated" in case:
        tokens = case["generated"][:, :-1]
    elif "decode_logits" in case:
        tokens = case["decode_logits"][:-1].argmax(-1)[None]
    _check_references(case, model, inputs, tokens)

    method, watch = Watched(method_of(case)), Watch(model)
    rows: dict[str, Tensor] = {}
    encoder: list[Any] = []
    layers = tokprune.families.family_of(model).parts(model).tower.layers
    watch.before_patching(layers, case.parameters["merge"]["after_layer"])
    with tokprune.compress(model, method) as trace:
        watch.after_patching()
        for stage in method.plans[0].encoder:
            watch_encoder(stage, rows, encoder)
        got = run(model, inputs, tokens)
        watch.remove()
    (tower,) = encoder
    _check_tower(case, tower, {**watch.seen, **rows})
    last: Any = trace.last
    _check_filters(case, method.runs[0].filters)  # type: ignore[attr-defined]
    _check_decoder(case, last, got, watch.positions)


def _check_references(case: Case, model: Any, inputs: Any, tokens: Tensor | None) -> None:
    """Other settings: nothing at all, stage 1 alone, stage 3 off, positions that go on."""
    options = {"retained": model_rows(case), "gamma": 1.0, "alpha": 0.0}
    if "logits_unpruned" in case and case["pixel_values"].dim() == 4:
        plain = run(model, inputs).prefill
        case.close(plain, "logits_unpruned", LOGITS)
    settings: Any = (
        ("logits_unpruned", options),  # merges no window, and tiles lie flat
        ("logits_stage1_only", {"gamma": 1.0, "alpha": 0.0}),
    )
    for name, changes in settings:
        if name in case:
            with tokprune.compress(model, method_of(case, **changes)):
                case.close(run(model, inputs).prefill, name, LOGITS, where="by the method")
    settings = (
        ("no_cache_policy", {"cache_policy": False}),
        ("continued_positions", {"decode_positions": "continue"}),
    )
    for name, changes in settings:
        if f"decode_logits_{name}" in case and tokens is not None:
            with tokprune.compress(model, method_of(case, **changes)):
                logits = run(model, inputs, tokens).logits[0]
            case.close(logits, f"decode_logits_{name}", LOGITS)


def model_rows(case: Case) -> int:
    clip = case.parameters["clip_config"]
    return (clip["image_size"] // clip["patch_size"]) ** 2 + 1


def _check_tower(case: Case, tower: Any, seen: dict[str, Tensor]) -> None:
    merge = tower.merge
    case.close(merge.similarity, "window_sim", TOWER)
    case.equal(merge.dst, "merge_dst")
    case.equal(merge.unmerged, "merge_unmerged")
    (r,) = set(merge.r.tolist())
    case.told(r, "r")
    case.close(seen["after_merge"], "after_layer0", TOWER)
    case.close(seen["projector_in"], "vision_features", TOWER)
    projected = seen["projector_out"].flatten(0, 1)[None]
    case.close(projected, "projected", TOWER)
    case.told(projected.shape[1], "tokens_after_merge")
    case.close(seen["cls_attn"], "cls_attn", TOWER)
    case.equal(tower.keys, "key_index")
    rows = seen["cls_attn"].shape[1]
    offset = torch.arange(len(tower.keys))[:, None] * rows
    case.equal((tower.keys + offset).flatten(), "key_set")


def _check_filters(case: Case, filters: list[Any]) -> None:
    assert len(filters) == len(case.parameters["pruning_layers"])
    key_set = None
    if (recorded := case.output("key_set")) is not None:
        key_set = recorded.sort().values
    for i, stage in enumerate(filters):
        block = stage.sequence.visual[0]
        keep, tag = stage.keep[0][block], stage.sequence.tag[0][block]
        if key_set is not None:
            assert_equal(tag.nonzero()[:, 0], key_set, f"key set entering stage {i}")
        alone = (stage.score[0][block] >= 1).nonzero()[:, 0]
        case.equal(alone, f"stage{i}_filter_keep")
        case.equal(keep.nonzero()[:, 0], f"stage{i}_keep")
        key_set = tag[keep].nonzero()[:, 0]
        case.equal(key_set, f"stage{i}_key_set_next")


def _check_decoder(case: Case, last: Any, got: Run, positions: list[list[int]]) -> None:
    p = case.parameters
    block = (last.layers[0].segment[0] >= 0).nonzero()[:, 0]
    case.told(int(block[0]), "image_start")
    case.told(len(block), "tokens_after_merge")
    case.told(last.layers[0].lengths[0] - len(block) - int(block[0]), "text_len")
    counts = [sum(layer.counts[0]) for layer in last.layers]
    case.told([counts[cut + 1] for cut in p["pruning_layers"]], "visual_tokens_after_stage")
    leaving = [*counts[1:], counts[-1]]
    tiles = last.images[0].record.layout.tiles
    mean = sum(leaving) / len(leaving) / tiles
    if "mean_tokens_reported" in p:
        assert abs(mean - p["mean_tokens_reported"]) < 1e-9, "mean_tokens_reported"
    lengths = torch.tensor([layer.lengths[0] for layer in last.layers])
    case.equal(lengths, "prefill_len")
    cached = torch.tensor([layer.cached[0] for layer in last.layers])
    case.equal(cached, "kv_len_after_prefill")
    case.close(got.prefill, "logits", LOGITS)
    if got.logits.shape[1] > 1:  # steps were fed
        case.equal(torch.tensor(got.cache_lengths()), "kv_len_last")
        case.equal(torch.tensor(positions), "decode_positions")
        case.close(got.logits[0], "decode_logits", LOGITS)
        case.equal(got.logits.argmax(-1), "generated")


CHECKS = {
    "mustdrop.spatial_merge": check_spatial_merge,
    "mustdrop.spatial_merge_fixed": check_spatial_merge_fixed,
    "mustdrop.key_tokens": check_key_tokens,
    "mustdrop.dual_filter": check_dual_filter,
    "mustdrop.cache_policy": check_cache_policy,
    "mustdrop.e2e_llava": check_e2e,
    "mustdrop.e2e_next": check_e2e,
}
