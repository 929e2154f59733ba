"""Half precision, models split over devices by accelerate, and no host reads in a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods_table import CORE
from tiny import BUILDERS, make_inputs

import tokprune

PROMPTS = [[4, "image", 6], [7, "image", 9]]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", CORE)
def test_half_precision_runs_and_stays_close(case: str, family: str, dtype: torch.dtype) -> None:
    """Same budget as in float32, output in the model's dtype, finite, batch rows independent."""
    method, options = CORE[case]
    model = BUILDERS[family]().to(dtype)
    inputs = make_inputs(model, PROMPTS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with tokprune.compress(model, method, **options) as trace, torch.no_grad():
        logits = model(**inputs).logits
        model.generate(**inputs, **GREEDY)
    assert logits.dtype == dtype
    assert torch.isfinite(logits[:, -1]).all()
    assert trace.last.layers[-1].lengths[0] < trace.last.original_lengths[0]


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", CORE)
def test_device_map_with_offload_to_disk(case: str, family: str, tmp_path: Any) -> None:
    """Decoder layers offloaded to disk (weights on meta between calls) give the same tokens."""
    accelerate = pytest.importorskip("accelerate")
    method, options = CORE[case]
    model = BUILDERS[family]()
    inputs = make_inputs(model, PROMPTS)
    with tokprune.compress(model, method, **options), torch.no_grad():
        want = model.generate(**inputs, **GREEDY)
    device_map: dict[str, str] = {"lm_head": "cpu"}
    for name in ("vision_tower", "multi_modal_projector", "image_newline"):
        if hasattr(model.model, name):
            device_map[f"model.{name}"] = "cpu"
    for name in ("embed_tokens", "norm", "rotary_emb"):
        device_map[f"model.language_model.{name}"] = "cpu"
    for i in range(len(model.model.language_model.layers)):
        device_map[f"model.language_model.layers.{i}"] = "disk" if i % 3 == 2 else "cpu"
    split = accelerate.dispatch_model(
        model, device_map=device_map, main_device="cpu", offload_dir=str(tmp_path)
    )
    assert any(p.device.type == "meta" for p in split.parameters())
    with tokprune.compress(split, method, **options), torch.no_grad():
        got = split.generate(**inputs, **GREEDY)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", CORE)
def test_output_hidden_states_have_the_layers_lengths(case: str, family: str) -> None:
    """output_hidden_states=True works; each entry is as long as the sequence of its layer."""
    method, options = CORE[case]
    model = BUILDERS[family]()
    inputs = make_inputs(model, PROMPTS)
    with tokprune.compress(model, method, **options) as trace, torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    widths = [layer.column.shape[1] for layer in trace.last.layers]
    assert [s.shape[1] for s in states[1:-1]] == widths[:-1]
    assert states[-1].shape[1] == widths[-1]
