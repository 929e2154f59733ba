"""What cannot work in a server that counts tokens before it looks at an image, and what to do."""

from __future__ import annotations

from typing import Any, NoReturn

from tokprune.engine.contracts import EncoderStage, ModelFacts, Plan
from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import Method

#: methods that always work, for error texts
INSTEAD = "divprune, cdpruner, visionzip, todre with stage2=False, grid, pool"


def check(method: Method, plan: Plan, facts: ModelFacts) -> None:
    """Whether a plan can run in vLLM.

    Raises:
        UnsupportedModelError: it cannot; says why, and what can.
    """
    if plan.decoder:
        _refuse(
            method,
            "prunes inside the decoder; vLLM allots one length for all layers. Use it in "
            f"transformers, or a method that works before the language model: {INSTEAD}",
        )
    if plan.rectify is not None:
        _refuse(
            method,
            "rectifies the attention of the decoder, whose kernels in vLLM take no bias; leave "
            "rectify out",
        )
    if any(stage.wants_text for stage in plan.prompt):
        _refuse(
            method,
            "chooses by the question; vLLM encodes an image once for all prompts that show it, and "
            f"does not pass their text. Use a method that looks at the image alone: {INSTEAD}",
        )
    for stage in plan.encoder:
        _check_encoder(method, stage, facts)
    kinds = [stage.positions for stage in plan.encoder if stage.reduces]
    kinds += [stage.positions for stage in plan.prompt]
    if facts.axes > 1 and "compact" in kinds:
        _refuse(
            method,
            "renumbers positions, which stay the original ones in vLLM where they have three axes; "
            "leave positions out",
        )
    if facts.axes == 1 and "preserve" in kinds:
        _refuse(
            method,
            "keeps the original positions, which vLLM counts itself where they have one axis: "
            "only with M-RoPE. Set positions to 'compact'",
        )


def not_fixed(method: Method) -> NoReturn:
    """For a method whose number of tokens is not known beforehand."""
    _refuse(
        method,
        "keeps a number of tokens that depends on the picture, or that is not known before it is "
        f"encoded; vLLM reserves them by its size alone. Give keep, or use one of {INSTEAD}",
    )


def _check_encoder(method: Method, stage: EncoderStage, facts: ModelFacts) -> None:
    if facts.tower is None:
        _refuse(
            method,
            f"looks into the vision encoder of {facts.family}, which it cannot in vLLM. Use a "
            "method that works on its output: divprune, cdpruner, grid, pool, todre with "
            "stage2=False and pivot='farthest'",
        )
    deep = stage.between_layers or stage.bias_layers or stage.alters
    if deep or stage.after_layers - {facts.tower.feature_layer}:
        _refuse(
            method,
            "changes what the vision encoder computes, or drops tokens inside it at several "
            "layers; its kernels in vLLM take neither masks nor biases. Use visionzip, divprune",
        )
    if stage.across == "call":
        _refuse(
            method,
            "compares all images of a batch, which in vLLM belong to different requests; choose "
            "the option of it that lets every image stand for itself",
        )


def _refuse(method: Any, why: str) -> NoReturn:
    raise UnsupportedModelError(f"tokprune in vLLM: {method!r} {why}")
