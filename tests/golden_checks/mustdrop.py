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
from golden_checks.case import Case, assert_close, assert_equal
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
    assert_equal(alive, case["index_mask"], "index_mask")


def compare_merge(case: Case, merge: WindowMerge) -> None:
    x, rtol = case["x"], tolerance(case["x"])
    assert merge.out.dtype == x.dtype
    assert merge.valid.all()
    assert merge.counts == [merge.out.shape[1]] * len(x)
    assert_close(merge.similarity, case["window_sim"], "window_sim", rtol)
    assert_equal(merge.r, case["r"].expand(len(x)), "r")
    for name in ("dst", "unmerged", "group", "size"):
        assert_equal(getattr(merge, name), case[name], name)
    assert_close(merge.out, case["out"], "out", rtol)
    assert_equal(merge.rows, torch.cat([case["dst"], case["unmerged"]], dim=1), "rows")


def check_key_tokens(case: Case) -> None:
    rows, rate = case["cls_row"], case.parameters["keep_rate"]
    assert_close(key_scores(rows), case["score"], "score", tolerance(rows))
    index = key_tokens(rows, rate)
    assert_equal(index, case["index"], "index")
    everything = torch.ones(rows.shape[0], rows.shape[2] - 1, dtype=torch.bool)
    assert_equal(key_tokens(rows, rate, everything), index, "index with valid")


def check_dual_filter(case: Case) -> None:
    p, attn = case.parameters, case["attn"]
    gamma, alpha = p["global_thr"], p["individual_thr"]
    keys = key_mask(case["key_set"], attn.shape[-1])
    total, peak = text_attention(attn)
    assert_close(total / total.sum(), case["share"], "share")
    assert_close(peak, case["max"], "max")
    alone = filter_score(total, peak, gamma, alpha) >= 1
    assert_equal(alone.nonzero()[:, 0], case["filter_keep"], "filter_keep")
    assert_equal(dual_filter(attn, gamma, alpha), alone, "the filter by loops")
    keep = alone | keys
    assert_equal(keep.nonzero()[:, 0], case["keep"], "keep")
    assert_equal(keys[keep].nonzero()[:, 0], case["key_set_next"], "key_set_next")
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
    assert_equal(torch.tensor(before), case["kv_len_before"], "kv_len_before")
    assert_equal(torch.tensor([len(at) for at in whole]), case["kv_len_after"], "kv_len_after")
    recorded = [name for name in case.t if name.startswith("layer_")]
    assert recorded
    for name in recorded:
        assert_equal(whole[int(name.removeprefix("layer_"))], case[name], name)


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
    tokens = case["generated"][:, :-1]
    _check_references(case, model, inputs, tokens)

    method, watch = Watched(method_of(case)), Watch(model)
    rows: dict[str, Tensor] = {}
    encoder: list[Any] = []
    layers = tokprune.families.family_of(model).parts(model).encoder_layers
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


def _check_references(case: Case, model: Any, inputs: Any, tokens: Tensor) -> None:
    """Other settings: nothing at all, stage 1 alone, stage 3 off, positions that go on."""
    options = {"retained": model_rows(case), "gamma": 1.0, "alpha": 0.0}
    if case["pixel_values"].dim() == 4:
        plain = run(model, inputs).prefill
        assert_close(plain, case["logits_unpruned"], "logits_unpruned", LOGITS)
    with tokprune.compress(model, method_of(case, **options)):  # merges no window
        got = run(model, inputs).prefill
        assert_close(got, case["logits_unpruned"], "logits_unpruned, flat tiles", LOGITS)
    with tokprune.compress(model, method_of(case, gamma=1.0, alpha=0.0)):
        got = run(model, inputs).prefill
        assert_close(got, case["logits_stage1_only"], "logits_stage1_only", LOGITS)
    for name, changes in (
        ("no_cache_policy", {"cache_policy": False}),
        ("continued_positions", {"decode_positions": "continue"}),
    ):
        with tokprune.compress(model, method_of(case, **changes)):
            logits = run(model, inputs, tokens).logits[0]
        assert_close(logits, case[f"decode_logits_{name}"], f"decode_logits_{name}", LOGITS)


def model_rows(case: Case) -> int:
    clip = case.parameters["clip_config"]
    return (clip["image_size"] // clip["patch_size"]) ** 2 + 1


def _check_tower(case: Case, tower: Any, seen: dict[str, Tensor]) -> None:
    merge = tower.merge
    assert_close(merge.similarity, case["window_sim"], "window_sim", TOWER)
    assert_equal(merge.dst, case["merge_dst"], "merge_dst")
    assert_equal(merge.unmerged, case["merge_unmerged"], "merge_unmerged")
    assert set(merge.r.tolist()) == {case.parameters["r"]}
    assert_close(seen["after_merge"], case["after_layer0"], "after_layer0", TOWER)
    assert_close(seen["projector_in"], case["vision_features"], "vision_features", TOWER)
    projected = seen["projector_out"].flatten(0, 1)[None]
    assert_close(projected, case["projected"], "projected", TOWER)
    assert projected.shape[1] == case.parameters["tokens_after_merge"]
    assert_close(seen["cls_attn"], case["cls_attn"], "cls_attn", TOWER)
    assert_equal(tower.keys, case["key_index"], "key_index")
    rows = case["cls_attn"].shape[1]
    offset = torch.arange(len(tower.keys))[:, None] * rows
    assert_equal((tower.keys + offset).flatten(), case["key_set"], "key_set")


def _check_filters(case: Case, filters: list[Any]) -> None:
    assert len(filters) == len(case.parameters["pruning_layers"])
    key_set = case["key_set"].sort().values
    for i, stage in enumerate(filters):
        block = stage.sequence.visual[0]
        keep, tag = stage.keep[0][block], stage.sequence.tag[0][block]
        assert_equal(tag.nonzero()[:, 0], key_set, f"key set entering stage {i}")
        alone = (stage.score[0][block] >= 1).nonzero()[:, 0]
        assert_equal(alone, case[f"stage{i}_filter_keep"], f"stage{i}_filter_keep")
        assert_equal(keep.nonzero()[:, 0], case[f"stage{i}_keep"], f"stage{i}_keep")
        key_set = tag[keep].nonzero()[:, 0]
        assert_equal(key_set, case[f"stage{i}_key_set_next"], f"stage{i}_key_set_next")


def _check_decoder(case: Case, last: Any, got: Run, positions: list[list[int]]) -> None:
    p = case.parameters
    block = (last.layers[0].segment[0] >= 0).nonzero()[:, 0]
    assert int(block[0]) == p["image_start"]
    assert len(block) == p["tokens_after_merge"]
    assert last.layers[0].lengths[0] - len(block) - p["image_start"] == p["text_len"]
    counts = [sum(layer.counts[0]) for layer in last.layers]
    assert [counts[cut + 1] for cut in p["pruning_layers"]] == p["visual_tokens_after_stage"]
    leaving = [*counts[1:], counts[-1]]
    tiles = last.images[0].record.layout.tiles
    mean = sum(leaving) / len(leaving) / tiles
    assert abs(mean - p["mean_tokens_reported"]) < 1e-9, "mean_tokens_reported"
    lengths = torch.tensor([layer.lengths[0] for layer in last.layers])
    assert_equal(lengths, case["prefill_len"], "prefill_len")
    cached = torch.tensor([layer.cached[0] for layer in last.layers])
    assert_equal(cached, case["kv_len_after_prefill"], "kv_len_after_prefill")
    assert_equal(torch.tensor(got.cache_lengths()), case["kv_len_last"], "kv_len_last")
    assert_equal(torch.tensor(positions), case["decode_positions"], "decode_positions")
    assert_close(got.prefill, case["logits"], "logits", LOGITS)
    assert_close(got.logits[0], case["decode_logits"], "decode_logits", LOGITS)
    assert_equal(got.logits.argmax(-1), case["generated"], "generated")


CHECKS = {
    "mustdrop.spatial_merge": check_spatial_merge,
    "mustdrop.spatial_merge_fixed": check_spatial_merge_fixed,
    "mustdrop.key_tokens": check_key_tokens,
    "mustdrop.dual_filter": check_dual_filter,
    "mustdrop.cache_policy": check_cache_policy,
    "mustdrop.e2e_llava": check_e2e,
    "mustdrop.e2e_next": check_e2e,
}
