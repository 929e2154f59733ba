"""What the golden checks of whole decoders share: prompts given as embeddings, one image in each,
and tokens that are dropped on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import tokprune
from golden_checks.case import Case, assert_close, assert_equal
from golden_checks.models import run


def image_of(case: Case) -> slice:
    """Columns of the image of a case."""
    p = case.parameters
    return slice(p["image_start"], p["image_start"] + p["image_len"])


def run_recorded(model: Any, method: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    """Run under a method that has ``recorded()``: the last prefill's trace, the run, and what was
    recorded of the first decoder run."""
    recorded: list[Any] = []
    with tokprune.compress(model, method) as trace:
        stage: Any = method.plans[0].decoder[0]
        start = stage.start

        def watched() -> Any:
            made = start()
            recorded.append(method.recorded())
            return made

        stage.start = watched
        got = run(model, inputs, **more)
    return trace.last, got, recorded[0]


def check_stages(case: Case, last: Any, gap: int, layers: Sequence[int]) -> list[Tensor]:
    """What is left before each of the ``layers`` that drop, and its positions; ``gap``: padding
    before the prompt. Returns the columns that are left at every stage."""
    stages = []
    for i, layer in enumerate(layers):
        seen = last.layers[layer]
        real = seen.column[0] >= 0
        kept = seen.column[0][real] - gap
        case.equal(kept, f"stage{i}_keep_original")
        positions = case.output(f"stage{i}_positions")
        if positions is not None:
            assert_equal(seen.position[0][real], positions.view(-1), f"stage{i}_positions")
        stages.append(kept[seen.segment[0][real] >= 0])
    return stages


def check_end(case: Case, last: Any, got: Any, gap: int, steps: int = 0) -> None:
    """Lengths of the cache, logits of the prefill and of the steps after it."""
    lengths = torch.tensor([layer.lengths[0] for layer in last.layers])
    case.equal(lengths, "kv_lengths")
    if not gap:
        cached = torch.tensor(got.cache_lengths()) - steps
        case.equal(cached, "kv_lengths", where="cached")
    case.close(got.prefill[:1, -int(lengths[-1]) :], "logits")
    close_steps(case, got)


def decode_steps(case: Case, rows: int = 1) -> list[Tensor]:
    """Embeddings [rows, 1, d] of the recorded steps after the prompt, if any."""
    steps = case.get("decode_embeds")
    if steps is None:
        return []
    return [(x if x.dim() == 3 else x[None]).expand(rows, -1, -1) for x in steps]


def close_steps(case: Case, got: Any) -> None:
    """Logits of the steps after the prompt."""
    decoded = got.logits[0, 1:]
    want = case.output("decode_logits") if len(decoded) else None
    if want is not None:
        assert_close(decoded, want.view_as(decoded), "decode_logits")
