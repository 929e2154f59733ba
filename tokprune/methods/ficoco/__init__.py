"""FiCoCo: layer after layer, merge the most redundant visual tokens softly into others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tokprune.engine.contracts import ModelFacts, Order, Plan
from tokprune.methods.base import Preset, check_fits, resolve_keep
from tokprune.methods.depth import LEAST_DEPTH, PUBLISHED_DEPTH
from tokprune.methods.ficoco.decoder import DecoderMerge
from tokprune.methods.ficoco.encoder import EncoderMerge
from tokprune.methods.options import AtLeast, Range
from tokprune.methods.registry import register_method
from tokprune.methods.tiles import TileMethod, feature_layer

_CODE = "official code: r = {} in every layer from {} on; results of our repaired form will differ"

#: decoder layer, of 32, from which FiCoCo-L merges
_FIRST = 5


@register_method
@dataclass(frozen=True)
class FiCoCo(TileMethod):
    """In every layer from some layer on, the r most redundant visual tokens are merged, each into
    the few kept ones that it correlates with most, by shares that sum to 1; a kept token becomes
    (x + Σ share · merged) / (1 + Σ share).

    Inside the vision encoder (FiCoCo-V), between attention and MLP: logits among patches count as
    redundancy, those of the class token against it, and the most redundant patch of every 2 × 2
    window counts more, once per image. Inside the decoder (FiCoCo-L): logits to other visual tokens
    against those of the text after the last image, correlation mixed with the path over that text;
    read in a layer's attention and merged after the layer (official code: before its MLP), so
    that the last layer's merge, which nothing would see, is left out. Every image on its own.

    This is the paper's idea in our reading: results are those of a repaired form. The released code
    moves the class token to the end and lets a patch play its part, numbers targets in one order
    and applies them in another, keeps the window state from image to image, merges into tokens that
    are dropped in the same step, and in the decoder takes the first positions of the prompt for the
    image. It is not offered. How the published figures relate to either is not known.

    Args:
        keep: tokens left of each tile, in the decoder of each image in its last layer (count or
            fraction), removed in equal parts per layer. Give ``keep`` or ``r``.
        r: tokens that each layer merges (official: 42 in the encoder, 14 in the decoder).
        place: "encoder" (FiCoCo-V) or "decoder" (FiCoCo-L).
        first: first merging layer, 0-based; None: half of the encoder, or layer 5 of 32 of the
            decoder.
        beta: weight of the class token's logits against those among patches.
        gamma: weight of logits among visual tokens against those of the text.
        alpha: share of the direct correlation against the path over text.
        quantile: of a token's correlations; those above it are its targets, at least one.
        order: of the tokens in the prompt; they stay in raster order either way.
        positions: "compact" renumbers the shortened prompt (official), "preserve" keeps the ids.
        scope: what ``keep`` counts on tiled models in the encoder: "tile" or "image".

    Towers without class token: the mean logits that a patch receives stand in for it.

    Source: Filter, Correlate, Compress: Training-Free Token Reduction for MLLM Acceleration,
    AAAI 2026, arXiv 2411.17686.
    """

    name = "ficoco"
    stages = ("encoder layers", "decoder prefill")
    needs = "queries and keys of the merging layers"
    paper = "arXiv 2411.17686"
    source = "paper's equations"
    reads_prompt = 'with place="decoder"'
    without_class_token = "the mean logits that a patch receives stand in for the class token's"
    without_tower = ({"place": "decoder"},)
    presets = (
        Preset("llava-1.5", 114, {"r": 42}, _CODE.format(42, 12)),
        Preset("llava-1.5", "L", {"r": 14, "place": "decoder"}, _CODE.format(14, 5)),
    )
    variants = ({"place": "decoder"},)
    one_of = ("keep", "r")
    budget_options = frozenset({"keep", "r"})

    r: Annotated[int, AtLeast(0)] | None = None
    place: Literal["encoder", "decoder"] = "encoder"
    first: Annotated[int, AtLeast(0)] | None = None
    beta: Annotated[float, Range(0, 1)] = 0.35
    gamma: Annotated[float, Range(0, 1)] = 0.6
    alpha: Annotated[float, Range(0, 1)] = 0.6
    quantile: Annotated[float, Range(0, 1)] = 0.998
    order: Order = "spatial"

    def plan(self, facts: ModelFacts) -> Plan:
        if self.place == "encoder":
            return self._in_encoder(facts)
        if self.keep is not None:
            check_fits(self.keep, facts)
        depth = facts.decoder_layers
        published = _FIRST if depth >= LEAST_DEPTH else round(_FIRST * depth / PUBLISHED_DEPTH)
        # what the last layer would merge, no layer would see
        layers = self._layers(max(1, published), depth - 2, "decoder")
        if facts.attention_layers is not None:
            layers = tuple(layer for layer in layers if layer in facts.attention_layers)
        return Plan(decoder=(DecoderMerge(self, layers),)) if layers and self.r != 0 else Plan()

    def _in_encoder(self, facts: ModelFacts) -> Plan:
        tower = facts.need_tower(self.name)
        last = feature_layer(tower, type(self).__name__)
        layers = self._layers(min(tower.encoder_layers // 2, last), last, "vision encoder")
        left = None if self.keep is None else self.tile_budget(facts)
        counts = self.counts(tower.patches, len(layers), left)
        if counts[-1] == tower.patches:
            return Plan()
        removed = {
            layer: now - after
            for layer, now, after in zip(layers, (tower.patches, *counts), counts)
            if after < now
        }
        return Plan(encoder=(EncoderMerge(self, removed),))

    def _layers(self, published: int, last: int, where: str) -> tuple[int, ...]:
        first = published if self.first is None else self.first
        if first > last and self.first is not None:
            raise ValueError(
                f"first={first} should be at most {last}, the last layer of this model's {where} "
                "after which a merge has an effect"
            )
        return tuple(range(first, last + 1))

    def counts(self, tokens: int, steps: int, left: int | None = None) -> tuple[int, ...]:
        """Tokens after each of ``steps`` merges of ``tokens``, at least 1: by ``r``, or in equal
        parts down to ``left`` (None: by ``keep``)."""
        if self.r is not None:
            return tuple(max(min(tokens, 1), tokens - self.r * step) for step in _count(steps))
        if left is None:
            assert self.keep is not None
            left = resolve_keep(self.keep, tokens)
        return tuple(tokens - (tokens - left) * step // steps for step in _count(steps))


def _count(steps: int) -> range:
    return range(1, steps + 1)
