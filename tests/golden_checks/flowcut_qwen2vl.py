"""Golden check of FlowCut on a whole Qwen2-VL: encoder cuts, positions, decoder cut, steps."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import tokprune
from golden_checks.case import Case
from golden_checks.flowcut import LOGITS, TOWER
from golden_checks.models import Watched, fill
from tokprune.methods.flowcut import FlowCut
from tokprune.testing.grid_prompts import TYPED


def load(case: Case) -> Any:
    p = case.parameters
    llm = dict(p["llm_config"])
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marked = {name: llm.pop(name) for name in marks}
    llm.pop("vision_token_id")
    rope = {"rope_type": "default", "mrope_section": llm.pop("rope_scaling")["mrope_section"]}
    theta = llm.pop("rope_theta")
    llm["rope_theta"], llm["rope_scaling"] = theta, rope
    if TYPED:  # the releases that type tokens keep the base with the sections
        llm["rope_parameters"] = {**rope, "rope_theta": theta}
        del llm["rope_theta"], llm["rope_scaling"]
    config = Qwen2VLConfig(vision_config=p["vision_config"], text_config=llm, **marked)
    model = Qwen2VLForConditionalGeneration(config).eval()
    weights = case.weights()
    fill(model, weights)
    return model


def check(case: Case) -> None:
    p = case.parameters
    model = load(case)
    seen: dict[str, Tensor] = {}

    def merger(module: Any, args: Any, output: Tensor) -> None:
        seen["merger_in"], seen["image_embeds"] = args[0], output

    def last(module: Any, args: Any, output: Tensor) -> None:
        seen.setdefault("hidden_last", output)

    def first(module: Any, args: Any, kwargs: Any) -> None:
        seen.setdefault("inputs_embeds", args[0] if args else kwargs["hidden_states"])

    inner = model.model
    inner.visual.merger.register_forward_hook(merger)
    inner.language_model.norm.register_forward_hook(last)
    ids = case["input_ids"]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": case["pixel_values"],
        "image_grid_thw": case["image_grid_thw"],
    }
    if TYPED:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    logits, tokens = case.get("decode_logits"), case.get("generated")
    steps = 4 if tokens is None else tokens.shape[1] - ids.shape[1]
    steps = steps if logits is None else len(logits)
    method = Watched(FlowCut(p["target_num"]))
    with tokprune.compress(model, method) as trace:
        # after the engine's own hooks: what the layer gets
        inner.language_model.layers[0].register_forward_pre_hook(first, with_kwargs=True)
        out = model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, num_beams=1,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        prefill = trace.last
        assert prefill is not None
    record = prefill.records[0]
    assert record is not None
    assert [slots.shape[1] for _, slots in record.history] == p["tower_tokens_after_prune"]
    for number, (_, slots) in enumerate(record.history):
        case.equal(slots[0], f"vision_keep.{number}")
    for name in ("merger_in", "image_embeds"):
        case.close(seen[name], name, TOWER)
    case.close(seen["inputs_embeds"], "inputs_embeds", LOGITS)
    entering, final = prefill.layers[0], prefill.layers[-1]
    case.equal(entering.position, "position_ids_used")
    case.equal(final.position, "position_ids_late")
    block = entering.column[0][entering.segment[0] >= 0]
    kept = final.column[0][final.segment[0] >= 0]
    full = case.get("position_ids_full")
    if full is not None:
        case.equal(full[:, :, entering.column[0]], "position_ids_used")
    case.equal((block[:, None] == kept).nonzero()[:, 0].sort().values, "llm_keep")
    score = method.runs[0].score[0][entering.segment[0] >= 0]  # type: ignore[attr-defined]
    case.close(score, "llm_score", LOGITS)
    assert final.next_position is not None
    told = torch.arange(steps - 1)[:, None] + final.next_position
    case.equal(told.expand(-1, 3), "decode_positions")
    case.close(seen["hidden_last"], "hidden_last", LOGITS)
    case.close(torch.cat(out.logits), "decode_logits", LOGITS)
    case.equal(out.sequences, "generated")
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    case.equal(torch.tensor(lengths), "kv_len_final")


CHECKS = {"flowcut.e2e_qwen2vl": check}
