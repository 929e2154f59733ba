"""Half precision, models split over devices by accelerate, and no host reads in a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods_table import CORE
from tiny import BUILDERS, make_inputs

import tokprune
from tokprune.methods import make_method
from tokprune.testing import Case, tiny_family
from tokprune.testing.case import GREEDY
from tokprune.testing.checks.numbers import hidden_states_fit, runs_in

PROMPTS: list[list[Any]] = [[4, "image", 6], [7, "image", 9]]


def case_of(case: str, family: str) -> Case:
    method, options = CORE[case]
    tiny = tiny_family(BUILDERS[family])
    return Case(make_method(method, **options), tiny, tiny.build(), PROMPTS, [(20, 40)] * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("case", CORE)
def test_half_precision_runs(case: str, family: str, dtype: torch.dtype) -> None:
    """Tokens go, output in the model's dtype, finite."""
    prefill = runs_in(case_of(case, family), dtype)[1]
    assert prefill.layers[-1].lengths[0] < prefill.original_lengths[0]


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
    hidden_states_fit(case_of(case, family))
