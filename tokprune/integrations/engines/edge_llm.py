"""TensorRT Edge-LLM, which has DART on the embeddings that enter its engine.

Source: its documentation (nvidia.github.io/TensorRT-Edge-LLM, "Visual-Token Pruning (DART)") and
repository (NVIDIA/TensorRT-Edge-LLM, ``cpp/runtime/preprocess/dartPruner``). Nothing of it was run.
"""

from __future__ import annotations

import math
import struct

from tokprune.integrations.engines.engine import Engine, Export, no_counterpart
from tokprune.integrations.engines.shares import budget_of, counted, share_removed
from tokprune.methods.dart import DART
from tokprune.methods.options import Budget

_LABEL = "TensorRT Edge-LLM"
#: image and text pivots together, at most
_PIVOTS = 64


def tokens_left(tokens: int, ratio: float) -> int:
    """Tokens of an image that TensorRT Edge-LLM keeps at a reduction ratio, which it holds as a
    float32: rounded up, at least 1."""
    single: float = struct.unpack("f", struct.pack("f", ratio))[0]
    return max(1, min(tokens, math.ceil(tokens * (1 - single))))


def _dart(method: DART, tokens: int | None) -> Export:
    if method.centre != "none":
        no_counterpart(_LABEL, method, "centre", "features are compared as they are; leave it out")
    if method.positions == "compact":
        no_counterpart(
            _LABEL, method, "positions", "tokens that stay keep theirs; use 'preserve', or leave "
            "it out",
        )  # fmt: skip
    if method.image_pivots + method.text_pivots > _PIVOTS:
        no_counterpart(
            _LABEL, method, "image_pivots", f"with text_pivots={method.text_pivots} it should be "
            f"at most {_PIVOTS}",
        )  # fmt: skip
    ratio = share_removed(method.keep, tokens, tokens_left)
    options = {
        "visualPrune": True,
        "dartReductionRatio": ratio,
        "dartPivotImageTokens": method.image_pivots,
        "dartPivotTextTokens": method.text_pivots,
    }
    words = [f"--{name} {value}" for name, value in options.items() if value is not True]
    return Export(
        options,
        " ".join(["llm_inference …", "--visualPrune", *words]),
        (
            _count(method.keep, tokens, ratio),
            f"tokens go before the first decoder layer, not before layer {method.prune_before}, "
            "and pivots and likeness are those of the input embeddings, not of keys and hidden "
            "states: other tokens stay, and no layer sees all of them",
            "text pivots come from all of the prompt's text, for all images alike, where tokprune "
            "takes the text after an image",
            *_order(method),
            "it prunes only with M-RoPE, a fresh KV cache and at least 16 visual tokens in a "
            "request (in release 0.11 also: one request at a time, no speculative decoding), and "
            "else keeps everything without a word: look for pruned_tokens in its profile",
            "not run here: what stands here follows its documentation and source",
        ),
    )


def _count(keep: Budget, tokens: int | None, ratio: float) -> str:
    budget = budget_of(keep, tokens)
    if budget is None or tokens is None:
        return (
            f"{1 - ratio:g} of an image's tokens stay, rounded up, where tokprune rounds down: one "
            "more, or two where floats just miss a whole number"
        )
    return counted(tokens_left(tokens, ratio), tokens, budget, "an image")


def _order(method: DART) -> list[str]:
    if method.pivot_order == "norm":
        return []
    return [
        "pivots choose by falling norm, those of the image first (pivot_order='norm'), where "
        f"pivot_order={method.pivot_order!r} follows the paper's code"
    ]


ENGINE = Engine(
    "edge-llm",
    _LABEL,
    {DART: _dart},
    ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
)
