"""The architectures that are served: names of our own, so that an engine that does not know them
stops instead of serving every token without a word."""

from __future__ import annotations

from collections.abc import Sequence

from tokprune.errors import UnsupportedModelError

#: what stands before the name of the model class of transformers and vLLM
PREFIX = "Tokprune"
#: model class → module of this package that has the class for vLLM
SERVED: dict[str, str] = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "Qwen2VLForConditionalGeneration": "qwen",
    "Qwen2_5_VLForConditionalGeneration": "qwen",
    "Qwen3VLForConditionalGeneration": "qwen3",
    "Qwen3VLMoeForConditionalGeneration": "qwen3",
    "InternVLForConditionalGeneration": "internvl",
    "Gemma3ForConditionalGeneration": "gemma3",
}
#: names of the families of tokprune behind them; a class may hold models of others, too
FAMILIES = frozenset(
    {
        "llava-1.5", "llava-next", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl",
        "internvl", "gemma3",
    }
)  # fmt: skip


def served_by(architectures: Sequence[str] | None) -> str:
    """The model class, of a config's ``architectures``, with or without our prefix.

    Raises:
        UnsupportedModelError: it is not served; lists those that are.
    """
    given = [name.removeprefix(PREFIX) for name in architectures or ()]
    found = next((name for name in given if name in SERVED), None)
    if found is None:
        raise UnsupportedModelError(
            f"architectures={list(architectures or ())} is not served with tokprune in vLLM; it "
            f"should be one of {', '.join(SERVED)}"
        )
    return found
