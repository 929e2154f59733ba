"""OpenVINO GenAI, whose pipelines for Qwen-VL have CDPruner built in.

Source: its documentation (openvinotoolkit.github.io/openvino.genai, "Visual Token Pruning"), its
repository (openvinotoolkit/openvino.genai, ``src/cpp/src/visual_language/cdpruner``, PRs 3084 and
3499), and release 2026.4.1 as measured in ``tests/test_openvino.py``.
"""

from __future__ import annotations

import math

from tokprune.integrations.engines.engine import Engine, Export, no_counterpart
from tokprune.integrations.engines.shares import budget_of, counted
from tokprune.methods.cdpruner import CDPruner
from tokprune.methods.clip_relevance import TowerRelevance
from tokprune.methods.options import Budget

_LABEL = "OpenVINO GenAI"


def tokens_left(tokens: int, ratio: int) -> int:
    """Tokens of an image that OpenVINO GenAI keeps at a ``pruning_ratio``: the nearest whole
    number, halves up."""
    return int(tokens * (1 - ratio / 100) + 0.5)


def pruning_ratio(keep: Budget, tokens: int | None) -> int:
    """The ratio, a whole number of percent, at which as many tokens stay as ``keep`` says and no
    more, or else the most below that; of several the nearest share, for images of other sizes.

    Raises:
        ValueError: ``keep`` drops nothing, is less than a ratio can say, or is a count where
            ``tokens`` are unknown.
    """
    budget = budget_of(keep, tokens)
    if budget is None or tokens is None:
        ratio = math.ceil(round(100 * (1 - keep), 6))
        if ratio > 99:
            raise ValueError(f"keep={keep!r} should be at least 0.01: {_LABEL} takes whole percent")
        return max(1, ratio)
    least, share = tokens_left(tokens, 99), 100 * (1 - budget / tokens)
    fit = [ratio for ratio in range(1, 100) if 0 < tokens_left(tokens, ratio) <= budget]
    if not fit:
        raise ValueError(
            f"keep={keep!r} of {tokens} tokens is less than the {least} that {_LABEL} keeps at its "
            f"largest ratio, 99%; it should be at least {least}"
        )
    return max(fit, key=lambda ratio: (tokens_left(tokens, ratio), -abs(ratio - share)))


def _cdpruner(method: CDPruner, tokens: int | None) -> Export:
    relevance = method.relevance
    if isinstance(relevance, TowerRelevance) or callable(relevance):
        no_counterpart(
            _LABEL, method, "relevance",
            "it has neither CLIP's text tower nor a hook; use 'text' (from the model's own "
            "embeddings) or 'none'",
        )  # fmt: skip
    if method.centre != "none":
        no_counterpart(_LABEL, method, "centre", "features are compared as they are; leave it out")
    if method.relevance_scope != "image":
        no_counterpart(
            _LABEL, method, "relevance_scope", "no image sees those of others; leave it out"
        )
    if method.positions == "compact":
        no_counterpart(
            _LABEL, method, "positions", "tokens that stay keep theirs; use 'preserve', or leave "
            "it out",
        )  # fmt: skip
    ratio = pruning_ratio(method.keep, tokens)
    weight = 0.0
    if relevance == "text":
        weight = 1.0 if method.theta is None else float(method.theta)
    return Export(
        {"pruning_ratio": ratio, "relevance_weight": weight},
        f"config = openvino_genai.GenerationConfig(); config.pruning_ratio = {ratio}; "
        f"config.relevance_weight = {weight}; "
        "pipe.generate(prompt, images=images, generation_config=config)",
        (
            _count(method.keep, tokens, ratio),
            "the first and the second half of an image are selected from on their own, half of the "
            "tokens each; with CDPRUNER_SPLIT_THRESHOLD=0 in the environment an image is one, as "
            "in tokprune",
            *_relevance(method, weight),
            "positions of tokens that stay are the original ones, but the text after an image "
            "follows the last row or column of them, where tokprune leaves it where it was",
            "with a video Qwen2-VL and Qwen2.5-VL stop with an error; Qwen3-VL prunes it",
        ),
    )


def _count(keep: Budget, tokens: int | None, ratio: int) -> str:
    budget = budget_of(keep, tokens)
    if budget is None or tokens is None:
        return (
            f"{100 - ratio}% of an image's tokens stay, to the nearest whole number, where "
            f"tokprune rounds {keep:g} of them down: at times one more"
        )
    return counted(tokens_left(tokens, ratio), tokens, budget, "an image")


def _relevance(method: CDPruner, weight: float) -> list[str]:
    if weight == 0:
        return [
            "which token is chosen first, rounding decides, where tokprune takes the first of the "
            "image: later choices follow from it, so the same process ends with other tokens"
        ]
    about = (
        "relevance is the cosine with the mean embedding of all the prompt's text, chat template "
        "included, where tokprune takes the mean cosine with the text after the image"
    )
    if weight == 1:
        return [about]
    return [
        about,
        f"the kernel is the mean of the plain one ({1 - weight:g}) and the one weighted by "
        f"relevance ({weight:g}), where tokprune weights by exp(r·θ/(2(1−θ)))",
    ]


ENGINE = Engine(
    "openvino",
    _LABEL,
    {CDPruner: _cdpruner},
    (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    ),
)
