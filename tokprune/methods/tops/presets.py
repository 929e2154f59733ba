"""Published settings of TOPS; budgets are nominal, each says what the mean over the layers is."""

from __future__ import annotations

from typing import Any

from tokprune.methods.base import Preset

#: of 32 layers twice the budget in 12, the budget in 12, a quarter in 8
_LLAVA: dict[str, dict[int, dict[str, Any]]] = {
    "llava-1.5": {128: {}, 64: {"decoder_lam": 1.0}, 32: {"decoder_lam": 1.0}},
    "llava-next": {640: {}, 320: {"decoder_lam": 0.4}, 160: {}},
}
#: of 28 layers
_QWEN = {256: (281, 77), 128: (139, 39), 64: (71, 19)}


def _words(keep: int, mean: float, layers: int, more: str = "") -> str:
    told = f"nominal {keep}, {mean:.0f} on the mean over {layers} layers"
    return f"TOPS, arXiv 2606.27161: {told}{more}"


PRESETS = (
    *(
        Preset(
            model, keep, {"keep": keep, **more},
            _words(
                keep, 1.1875 * keep, 32,
                "; all tiles in one choice is our reading" if model == "llava-next" else "",
            ),
        )
        for model, budgets in _LLAVA.items()
        for keep, more in budgets.items()
    ),
    *(
        Preset(
            "qwen2.5-vl",
            keep,
            {"keep": cuts, "input_keep": 2 * keep, "prune_before": (12, 16), "decoder_lam": 0.4},
            _words(keep, (12 * 2 * keep + 4 * cuts[0] + 12 * cuts[1]) / 28, 28),
        )
        for keep, cuts in _QWEN.items()
    ),
)  # fmt: skip
