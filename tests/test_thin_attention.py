"""Methods that rank with a layer ahead have it project no more than they read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from family_cases import SHAPES, case_of, model_of
from flop_counts import counted

from tokprune.engine import scoring_layer

FAMILIES = ("llava-1.5", "llava-1.5/qwen3", "qwen2.5-vl", "gemma3", "internvl")


def prefill(method: str, family: str, shape: str) -> tuple[int, Any, list[int]]:
    """MACs, logits, and the lengths of the layers."""
    case = case_of(method, family, SHAPES[shape], model_of(family, "eager"))
    inputs, result = case.inputs(), []
    with case.compress() as trace, torch.no_grad():
        macs = counted(lambda: result.append(case.model(**inputs, use_cache=True).logits))
    return macs, result[0], [max(map(sum, layer.counts)) for layer in trace.last.layers]


@pytest.mark.parametrize("shape", ["single", "ragged"])
@pytest.mark.parametrize("method", ["pyramiddrop", "transprune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_take_no_other_queries_and_no_values(
    family: str, method: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    macs, logits, lengths = prefill(method, family, shape)
    saved: list[int] = []

    @contextmanager
    def whole(attention: Any, rows: torch.Tensor) -> Iterator[None]:
        def look(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            batch, length, width = args[0].shape
            left = rows.shape[1] if module is attention.q_proj else 1
            saved.append(batch * (length - left) * width * output.shape[-1])

        hooks = [m.register_forward_hook(look) for m in (attention.q_proj, attention.v_proj)]
        try:
            yield
        finally:  # the layer is left at its attention
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(scoring_layer, "OnlyRows", whole)
    whole_macs, whole_logits, whole_lengths = prefill(method, family, shape)
    assert lengths == whole_lengths
    torch.testing.assert_close(logits, whole_logits, atol=1e-5, rtol=0)
    assert saved
    assert whole_macs - macs == sum(saved)
