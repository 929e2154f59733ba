"""No host synchronisation in a forward, except where a method's definition forces it.

The model runs on the meta device, where tensors have shapes but no values: whatever reads one
(``.item()``, ``.tolist()``, ``nonzero``, a boolean index, an ``if``) raises. Two reads of every
prefill are stood in for: where the images are in the prompt (once, at its start), and whether
the features were finite (at its end).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from methods_table import ALL
from test_video_families import VIDEO_ALL, unit_of
from tiny import BUILDERS, VIDEO_BUILDERS, VIDEO_TOKEN, make_inputs

import tokprune
from tokprune.engine import entry, session

#: methods whose numbers depend on the data: what they read back, and when
ADAPTIVE = {
    "dart": "places of the pivots, whose order the official code takes from a Python set",
    "flowcut": "tokens dropped per layer (entropy of the class attention)",
    "mustdrop": "windows merged, tokens over the thresholds",
    "sparsevlm": "rank of the raters' attention (keep=None), once per pruning layer",
    "todre": "stage 2 drops per sample or not",
}
#: settings of those methods whose numbers are fixed after all
FIXED_SETTINGS = {"dart-few", "dart-norm", "mustdrop-fixed"} | {
    case for case in ALL if ALL[case][0] == "sparsevlm" and ALL[case][1]["keep"] is not None
}

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 itself reads the placeholders"
)


def run_on_meta(
    family: str,
    method: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    prompt: tuple[Any, ...] = (4, "image", 6),
) -> None:
    model = {**BUILDERS, **VIDEO_BUILDERS}[family]()
    inputs = make_inputs(model, [[*prompt], [*prompt]], [(20, 40), (20, 40)])
    real = entry.read_layout
    ids = inputs["input_ids"]
    kind = (ids == model.config.image_token_id).long() + 2 * (ids == VIDEO_TOKEN)
    monkeypatch.setattr(
        entry, "read_layout", lambda visual, mask, past, *counts: real(kind, None, past, *counts)
    )
    monkeypatch.setattr(session, "_check_finite", lambda finite: None)
    modeling = getattr(transformers.models, family)
    modeling = __import__(f"{modeling.__name__}.modeling_{family}", fromlist=["x"])
    monkeypatch.setattr(modeling, "torch_compilable_check", lambda *a, **k: None, raising=False)
    model = model.to("meta")
    meta = {k: v.to("meta") for k, v in inputs.items() if k not in ("attention_mask",)}
    for name in ("image_sizes", "batch_num_images"):
        if name in meta:
            meta[name] = inputs[name]
    with tokprune.compress(model, method, **options), torch.no_grad():
        out = model(**meta, use_cache=True)
        model(
            input_ids=torch.zeros(2, 1, dtype=torch.long, device="meta"),
            past_key_values=out.past_key_values,
            use_cache=True,
        )


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize(
    "case", [c for c in ALL if ALL[c][0] not in ADAPTIVE or c in FIXED_SETTINGS]
)
def test_prefill_and_step_read_nothing_back(
    case: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_meta(family, *ALL[case], monkeypatch)


@pytest.mark.parametrize("family", VIDEO_BUILDERS)
@pytest.mark.parametrize(
    "case", [c for c in VIDEO_ALL if VIDEO_ALL[c][0] not in ADAPTIVE or c in FIXED_SETTINGS]
)
def test_videos_read_nothing_back(case: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, options = VIDEO_ALL[case]
    video_unit = unit_of(case, method)
    prompt = (4, "video", 3, "image", 6)
    if method == "fastv" and video_unit == "video":
        prompt = (4, "video", 6)  # images that share a budget: how many of each stay is read back
    run_on_meta(family, method, {**options, "video_unit": video_unit}, monkeypatch, prompt)


def test_the_meta_device_catches_reads() -> None:
    """The instrument works: reading a value there fails."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(2, device="meta").sum().item()
