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
from tiny import BUILDERS, make_inputs

import tokprune
from tokprune.engine import entry, session

#: methods whose numbers depend on the data: what they read back, and when
ADAPTIVE = {
    "flowcut": "tokens dropped per layer (entropy of the class attention)",
    "mustdrop": "windows merged, tokens over the thresholds",
    "todre": "stage 2 drops per sample or not",
}
#: settings of those methods whose numbers are fixed after all
FIXED_SETTINGS = {"mustdrop-fixed"}

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 itself reads the placeholders"
)


def run_on_meta(
    family: str, method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BUILDERS[family]()
    inputs = make_inputs(model, [[4, "image", 6], [4, "image", 6]], [(20, 40), (20, 40)])
    real = entry.read_layout
    ids = inputs["input_ids"] == model.config.image_token_id
    monkeypatch.setattr(
        entry, "read_layout", lambda visual, mask, past, counts: real(ids, None, past, counts)
    )
    monkeypatch.setattr(session, "_check_finite", lambda finite: None)
    package = "llava" if family == "llava" else "llava_next"
    modeling = getattr(transformers.models, package)
    modeling = __import__(f"{modeling.__name__}.modeling_{package}", fromlist=["x"])
    monkeypatch.setattr(modeling, "torch_compilable_check", lambda *a, **k: None, raising=False)
    model = model.to("meta")
    meta = {k: v.to("meta") for k, v in inputs.items() if k not in ("attention_mask",)}
    if "image_sizes" in meta:
        meta["image_sizes"] = inputs["image_sizes"]
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


def test_the_meta_device_catches_reads() -> None:
    """The instrument works: reading a value there fails."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(2, device="meta").sum().item()
