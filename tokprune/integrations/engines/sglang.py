"""SGLang, which has EVS for the videos of NVIDIA's Nemotron Nano VL models.

Source: its repository (sgl-project/sglang, ``python/sglang/srt/multimodal/evs``,
``…/processors/nano_nemotron_vl.py``, PR 14051). Nothing of it was run.
"""

from __future__ import annotations

import json

from tokprune.integrations.engines.engine import Engine, Export, no_counterpart
from tokprune.integrations.engines.shares import budget_of, counted, share_removed
from tokprune.methods.evs import EVS
from tokprune.methods.options import Budget

_LABEL = "SGLang"


def tokens_left(tokens: int, rate: float) -> int:
    """Tokens of a video that SGLang keeps at a pruning rate, the first frame aside: rounded
    down."""
    return int(tokens * (1 - rate))


def _evs(method: EVS, tokens: int | None) -> Export:
    if method.positions == "preserve":
        no_counterpart(
            _LABEL, method, "positions", "the shortened prompt is numbered anew; use 'compact', or "
            "leave it out",
        )  # fmt: skip
    options = {"video_pruning_rate": share_removed(method.keep, tokens, tokens_left)}
    return Export(
        options,
        f"sglang serve --model-path MODEL --json-model-override-args '{json.dumps(options)}'",
        (
            _count(method.keep, tokens, options["video_pruning_rate"]),
            "the rule is the same: the first frame stays whole, of the others the tokens that "
            "changed most; on equal features the same tokens stay",
            "the rate is the server's, for every video of every request",
            "tokprune knows no Nemotron model, so there is nothing to compare answers with",
            "not run here: what stands here follows its documentation and source",
        ),
    )


def _count(keep: Budget, tokens: int | None, rate: float) -> str:
    budget = budget_of(keep, tokens)
    if budget is None or tokens is None:
        return (
            f"{1 - rate:g} of a video's tokens stay, rounded down as in tokprune: at times one "
            "fewer, where the share is a whole number that floats just miss"
        )
    return counted(tokens_left(tokens, rate), tokens, budget, "a video")


ENGINE = Engine(
    "sglang",
    _LABEL,
    {EVS: _evs},
    ("NemotronH_Nano_VL_V2", "NemotronH_Nano_Omni_Reasoning_V3"),
)
