"""MMTok: tokens that cover the question's words and the image at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tokprune.engine.contracts import Plan, Positions
from tokprune.engine.model import ModelFacts
from tokprune.methods.base import Method, Preset, check_fits
from tokprune.methods.mmtok.stages import CoverageStage, Features
from tokprune.methods.mmtok.words import QuestionWords, keywords
from tokprune.methods.options import AtLeast, Budget, Range, is_sequence, is_whole
from tokprune.methods.registry import register_method
from tokprune.methods.tiles import Scope

__all__ = ["MMTok", "QuestionWords", "keywords"]

_CODE = "MMTok, arXiv 2508.18264, and its code, with text=QuestionWords(…)"

#: (height, width) in pixels
Size = tuple[int, int]


def _sizes(value: Any, name: str) -> None:
    """Nothing, or (height, width) of one or several images."""
    pairs = [value] if is_sequence(value) and all(map(is_whole, value)) else value
    fine = is_sequence(pairs) and len(pairs) > 0
    if not fine or not all(
        is_sequence(pair) and len(pair) == 2 and all(is_whole(n) and n > 0 for n in pair)
        for pair in pairs
    ):
        raise ValueError(
            f"{name}={value!r} should be (height, width) of the images in pixels, or one such pair "
            "per image"
        )


@register_method
@dataclass(frozen=True)
class MMTok(Method):
    """Greedy maximum coverage behind the projector: tokens that together cover the words of the
    question (cosines in the space of the language model's embedding table) and all tokens of the
    tile (cosines of the encoder's features). No attention is read.

    By default the words are the embeddings of the prompt's text behind its image, as they are (of
    all its text where none follows); the authors drop the chat's markup, instructions and stop
    words, which needs the text itself: pass :class:`QuestionWords`.

    Encoder features are those of the layer that the model reads, and the mean over the patches that
    become one token. Where no stage can read them, where the model concatenates several layers, and
    behind a method that drops or merges patches in the encoder, the tokens behind the projector
    stand in (ours).

    On tiled models tiles are selected separately, and so are the frames of a video; the budget is
    divided between them in proportion to the patches that show the image, and newline tokens go
    (ours: how the authors pack LLaVA-NeXT is not known for certain). Survivors enter in prompt
    order. Later questions about an image see the tokens that the first one left.

    Args:
        keep: visual tokens per image (count), all its tiles together, or fraction of its patches.
        text: "prompt", or :class:`QuestionWords`.
        alpha: weight of the image's tokens against the words.
        text_temperature, image_temperature: of the softmax over tokens, of a word and of a token.
        similarity: how tokens cover each other, by "encoder" features, or "projected" ones.
        padded: (height, width) in pixels of the images, or of each of several, where the processor
            has padded them to a square (LLaVA-1.5): patches of padding are never kept. Where fewer
            than ``keep`` others are left, fewer tokens stay.
        patch: pixels along the edge of a patch, for ``padded``.
        scope: "tile" or "image": all tiles of an image in one selection.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.

    Source: "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026,
    arXiv 2508.18264.
    """

    name = "mmtok"
    stages = ("after projector",)
    needs = "features of encoder and projector, text embeddings"
    paper = "arXiv 2508.18264"
    reads_prompt = True
    presets = (
        *(Preset("llava-1.5", keep, {"keep": keep}, _CODE) for keep in (192, 128, 64)),
        Preset("qwen2.5-vl", 0.1, {"keep": 0.1}, f"{_CODE}, form='question'"),
    )
    variants = ({"similarity": "projected"},)

    keep: Budget
    text: Literal["prompt"] | QuestionWords = "prompt"
    alpha: Annotated[float, Range(0.0)] = 0.5
    text_temperature: Annotated[float, Range(0.0, low_open=True)] = 0.02
    image_temperature: Annotated[float, Range(0.0, low_open=True)] = 0.2
    similarity: Literal["encoder", "projected"] = "encoder"
    padded: Annotated[Size | tuple[Size, ...], _sizes] | None = None
    patch: Annotated[int, AtLeast(1)] = 14
    scope: Scope = "tile"
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known: Any = self.text
        if not isinstance(known, QuestionWords) and known != "prompt":
            raise ValueError(f"text={known!r} should be 'prompt' or QuestionWords")

    def padding_of(self, images: int) -> list[Size | None]:
        """``padded`` of every image.

        Raises:
            ValueError: there are several sizes, and not as many as images.
        """
        sizes: Any = self.padded
        if sizes is None or is_whole(sizes[0]):
            return [sizes] * images
        if len(sizes) != images:
            raise ValueError(
                f"padded has {len(sizes)} sizes for {images} images; it should have one for all, "
                "or one per image"
            )
        return list(sizes)

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        tower = facts.tower or (facts.observed if facts.readable else None)
        layer = None if tower is None else tower.feature_layer
        if self.similarity == "projected" or tower is None or layer is None or layer < 0:
            return Plan(prompt=(CoverageStage(self),))
        if facts.tower is None:
            layer = tower.encoder_layers - 1  # whose output enters the merger
        features = Features(layer, packs=facts.tower is None)
        return Plan(encoder=(features,), prompt=(CoverageStage(self),))
