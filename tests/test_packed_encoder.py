"""FlowCut in the encoder of Qwen2-VL: rows that leave, tokens that the merger makes of the rest."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

import tokprune
from tokprune.testing.case import Case
from tokprune.testing.checks.numbers import equals_oracle, keeps_everything
from tokprune.testing.tiny import tiny_family
from tokprune.trace.flops import prefill_macs, unpruned_macs

#: two images of different sizes in one prompt; videos of several frames
PROMPTS = {
    "images": [[4, "image", 2, "image", 6], [3, "image", 5]],
    "video": [[4, "video", 6], [3, "video", 5]],
}

#: random weights look at everything alike: by their entropy only the last layer would cut
OPTIONS = {"keep": 3, "prune_before": 2, "entropy": 0.5}


def case_of(prompts: list[Any], attention: str = "sdpa", **options: Any) -> Case:
    family = tiny_family("qwen2-vl")
    model = family.build(attention=attention)
    method = tokprune.make_method("flowcut", **{**OPTIONS, **options})
    return Case(method, family, model, prompts)


def watch_merger(model: Any) -> tuple[list[Tensor], Any]:
    """Inputs of the merger, call by call, and the hook that records them."""
    seen: list[Tensor] = []

    def hook(module: Any, args: Any) -> None:
        seen.append(args[0].detach())

    return seen, model.model.visual.merger.register_forward_pre_hook(hook)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", list(PROMPTS))
def test_the_rest_of_the_model_is_the_decoder_on_what_is_left(kind: str, attention: str) -> None:
    prefill = equals_oracle(case_of(PROMPTS[kind], attention)).prefill
    assert sum(prefill.layers[0].counts[0]) < sum(prefill.original_counts)
    assert prefill.layers[-1].counts[1] == [3]


@pytest.mark.parametrize("kind", list(PROMPTS))
def test_rows_that_stay_are_those_of_the_whole_encoder_with_the_others_hidden(kind: str) -> None:
    case = case_of(PROMPTS[kind])
    model, inputs = case.model, case.inputs()
    seen, handle = watch_merger(model)
    with torch.no_grad(), case.compress() as trace:
        model(**inputs)
        prefill = trace.last
        assert prefill is not None
    #: per frame, in order: (layer, rows alive after it)
    alive = [
        [(layer, slots[frame][slots[frame] >= 0]) for layer, slots in record.history]
        for record in prefill.records
        for frame in range(record.layout.tiles)
    ]
    blocks = list(model.model.visual.blocks)
    met = dict.fromkeys(range(len(blocks)), 0)

    def hidden_keys(module: Any, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
        layer = next(n for n, block in enumerate(blocks) if block.attn is module)
        frame, met[layer] = met[layer], met[layer] + 1
        earlier = [rows for cut, rows in alive[frame] if cut < layer]
        seen_keys = torch.ones(k.shape[2], dtype=torch.bool)
        if earlier:
            seen_keys = torch.zeros_like(seen_keys).index_fill(0, earlier[-1], True)
        out = scaled_dot_product_attention(q, k, v, seen_keys.expand(q.shape[2], -1))
        return out.transpose(1, 2), None

    AttentionInterface.register("hidden_keys", hidden_keys)
    visual = model.model.visual
    before = visual.config._attn_implementation
    visual.config._attn_implementation = "hidden_keys"
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        visual.config._attn_implementation = before
        handle.remove()
    assert met == dict.fromkeys(met, len(alive))
    compressed, whole = seen
    frames = whole.split([rows for r in prefill.records for rows in r.layout.segments.full])
    want = torch.cat([frame[cuts[-1][1]] for frame, cuts in zip(frames, alive, strict=True)])
    assert compressed.shape == want.shape
    assert compressed.shape[0] < whole.shape[0]
    torch.testing.assert_close(compressed, want, rtol=1e-5, atol=1e-5)


def test_an_image_does_not_depend_on_those_beside_it() -> None:
    together = case_of([[4, "image", 2, "image", 6]])
    alone = together.having(prompts=[[4, "image", 2]])
    kept = []
    for case in (together, alone):
        with torch.no_grad(), case.compress() as trace:
            case.model(**case.inputs())
            assert trace.last is not None
            kept.append([slots.tolist() for _, slots in trace.last.records[0].history])
    assert kept[0] == kept[1]


def test_the_trace_tells_what_ran() -> None:
    case = case_of([[4, "image", 6]], decoder_cut=False)
    with torch.no_grad(), case.compress() as trace:
        case.model(**case.inputs())
        prefill = trace.last
        assert prefill is not None
        told, printed = json.loads(json.dumps(trace.to_dict())), trace.summary()
    record, layers = prefill.records[0], told["encoder"]
    patches = record.layout.segments.full[0]
    left = {layer: slots.shape[1] for layer, slots in record.history}
    rows = patches
    for layer in layers:
        assert layer["attention_rows"] == [[rows]]
        rows = left.get(layer["layer"], rows)
    assert 0 < rows < patches
    assert not told["nothing_removed"]
    assert prefill_macs(prefill).encoder[-1] < unpruned_macs(prefill).encoder[-1]
    assert prefill_macs(prefill).projector * patches == unpruned_macs(prefill).projector * rows
    tokens = told["images"][0]["stages"][0]["tokens"]
    assert len(tokens) == rows // 4
    # they stand in the first cells, and hold what the patches that are left show
    assert (tokens[0]["tile"], tokens[0]["row"], tokens[0]["col"]) == (0, 0, 0)
    held = {tuple(s) for t in tokens for s in t.get("sources", [[t["tile"], t["row"], t["col"]]])}
    width = record.layout.token_grid.grids[0][1]
    places = {(0, *divmod(int(slot) // 4, width)) for slot in record.history[-1][1][0]}
    assert held == places
    assert "encoder 0" in printed


def test_keeping_everything_changes_nothing() -> None:
    keeps_everything(case_of([[4, "image", 6]], keep=1.0))


def test_the_size_of_tiles_is_no_option_here() -> None:
    case = case_of([[4, "image", 6]], tower_keep=8)
    with pytest.raises(ValueError, match="tower_keep=8 is for towers of tiles"), case.compress():
        pass
    assert not case.model.model.visual.blocks[0]._forward_hooks
