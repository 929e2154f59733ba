"""MustDrop: merge windows in the encoder, filter by text attention, shrink the decode cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tokprune.engine.contracts import ModelFacts, Order, Plan, Positions, PromptStage
from tokprune.methods.base import Knob, Method, Preset, check_fits, check_layers_fit, resolve_keep
from tokprune.methods.depth import last_steps
from tokprune.methods.mustdrop.cells import MergeCells
from tokprune.methods.mustdrop.encoder import KeepTagged, MergeStage, key_layer, merge_layer
from tokprune.methods.mustdrop.filters import FilterStage
from tokprune.methods.options import BudgetSchedule, LayerNumbers, Range, Renamed, is_whole
from tokprune.methods.registry import register_method
from tokprune.methods.schedule import check_steps, steps_of

Variant = Literal["official", "lightcompress"]
DecodePositions = Literal["cache_length", "continue"]
ShareR = Literal["image", "batch"]

#: decoder layers, 0-based, before which tokens are filtered
_LAYERS = (3, 7, 11, 15)

_SCRIPTS = "MustDrop, evaluation scripts of the official code; tokens are an average over the data"
_PORT = "LightCompress's variant of MustDrop: windows merged on the selected features"


def _preset(name: str, gamma: float, alpha: float) -> Preset:
    return Preset("llava-1.5", name, {"gamma": gamma, "alpha": alpha}, _SCRIPTS)


def _port(model: str, budget: int) -> Preset:
    options = {"variant": "lightcompress", "retained": budget}
    return Preset(model, f"lightcompress-{budget}", options, _PORT)


def _check_window(window: Any, name: str) -> None:
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    if not pair or not all(is_whole(n) and n >= 1 for n in window):
        raise ValueError(f"{name}={window!r} should be (rows, columns)")
    if math.prod(window) < 2:
        raise ValueError(f"{name}={window!r} should hold at least two tokens")


@register_method
@dataclass(frozen=True)
class MustDrop(Method):
    """Three stages. (1) In the vision tower, windows of similar tokens are replaced by their
    mean, and the tokens that the class token looks at most in the last layer become the protected
    key set. (2) In prefill, at a few decoder layers, image tokens go that are weak for the text
    after the image both in total and for every single text token; key tokens stay. (3) Before
    the first decode step, the caches of the layers between the first and the last filter shrink
    to the tokens that survived to the end.

    Thresholds give no fixed number of tokens: with the defaults (γ = 1, α = 0) stages 2 and 3 do
    nothing, the published settings are presets, and :func:`tokprune.calibrate` finds γ (alone, or
    with α at their ratio) for a mean number; ``count="leaving"`` there is the official counter.
    ``keep`` is a form with fixed counts (ours, not published).

    Merged tokens enter the prompt first, by falling similarity, then the others ("published"
    order). Tiled models then get all tiles as one block, base first, without unpadding and
    newline tokens, as in the official code. With several images in a prompt each has its own
    shares and budget; the text after the last one asks. Where no text follows, everything is
    kept, with a warning. Towers without class token take the mean attention that a token receives
    in the key layer for the key set (an extension of ours). On models that merge patches after the
    tower, windows are of the tokens that come out of it, merged at the language-model input, and a
    key token is one whose patches receive most attention on average.

    Args:
        keep: visual tokens per image after the last filter, a count or a fraction of the tokens
            that enter the decoder, or one such number per filter. From a single K, filter
            i leaves K + (n − K) // 4^i of n tokens, the last one K: thresholds drop most at
            the first filter, too. The tokens of highest max(share / γ, peak / α) stay, key tokens
            before all others as far as the budget goes; only γ : α matters then (with α = 0: 1 : 1,
            about the published ratio).
        gamma: γ, share of the image's total attention below which a token is weak.
        alpha: α, attention from a single text token below which a token is weak; 0 keeps all.
        window: rows and columns of a window.
        threshold: least mean cosine similarity of a window that is merged.
        merge_after_layer: encoder layer, 0-based, whose output is merged; None means 0, or the
            layer that the model reads with variant "lightcompress".
        key_rate: share of the tokens of each tile that are protected, rounded up; 0 protects none.
        key_layer: encoder layer whose attention ranks them; negative counts from the end.
        prune_before: decoder layers, 0-based and ascending, before which tokens are filtered, by
            the attention of the layer before (official code: 2, 6, 10, 14, whose output is meant).
        cache_policy: False leaves the caches as they are (no stage 3).
        decode_positions: rotary positions of decode steps in the layers whose cache shrank:
            "cache_length" counts its entries (official: the query then stands before the newest
            keys), "continue" goes on where prefill ended (recommended).
        order: "published" or "spatial" (a merged token in its window's bottom-right cell).
        share_r: number of windows merged: own of each image, the least one of its tiles
            ("image"), or the least one of the whole batch ("batch", official).
        spatial: False merges nothing (tiled models then keep their own packing).
        variant: "official", or "lightcompress", a third-party port: merges the features that the
            model reads, nothing else. On tiled models the port does not even merge: of each window
            only the unchanged bottom-right token stays, newline tokens too.
        retained: merge (T − retained) // (rows · columns − 1) windows of each tile, T its tokens,
            class token included (the port's count), instead of by ``threshold`` (where the port
            has one, it is 0.6).
        positions: "compact" (official) or "preserve", at the prompt and after every filter.

    The host reads once how many windows merge (not with ``retained``) and once per filter how
    many tokens stay (not with ``keep``).

    Source: Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large
    Language Model", arXiv 2411.10803, official code.
    """

    name = "mustdrop"
    stages = ("encoder layer", "decoder prefill", "KV cache")
    needs = "[CLS] attention, text attention of four decoder layers"
    paper = "arXiv 2411.10803"
    reads_prompt = True
    adaptive = "thresholds; keep fixes the number"
    without_class_token = "the mean attention that a token receives stands in for the class token's"
    without_tower_rows = "merges at the language-model input, not inside the vision encoder"
    without_tower = ({"spatial": False, "key_rate": 0},)
    presets = (
        _preset("textvqa-192", 0.001, 0.001),
        _preset("textvqa-128", 0.0012, 0.001),
        _preset("textvqa-64", 0.011, 0.01),
        _preset("vizwiz-64", 0.005, 0.001),
        _port("llava-1.5", 192),
        _port("llava-1.5", 128),
        _port("llava-1.5", 64),
    )

    knobs = ("thresholds", "gamma", "keep")
    renamed = (Renamed("pruning_layers", "prune_before", 1),)

    keep: BudgetSchedule | None = None
    gamma: Annotated[float, Range(0)] = 1.0
    alpha: Annotated[float, Range(0)] = 0.0
    window: Annotated[tuple[int, int], _check_window] = (3, 3)
    threshold: Annotated[float, Range(-1, 1)] = 0.8
    merge_after_layer: int | None = None
    key_rate: Annotated[float, Range(0, 1)] = 0.08
    key_layer: int = -1
    prune_before: Annotated[int | tuple[int, ...], LayerNumbers(1)] = _LAYERS
    cache_policy: bool = True
    decode_positions: DecodePositions | None = None
    order: Order = "published"
    share_r: ShareR = "image"
    spatial: bool = True
    variant: Variant = "official"
    retained: int | None = None
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_steps(self.keep, self.steps, "prune_before")
        if self.variant == "lightcompress":
            if self.filters:
                raise ValueError(
                    "variant='lightcompress' merges windows only; keep should be None and alpha 0"
                )
            if not self.spatial:
                raise ValueError("variant='lightcompress' with spatial=False would do nothing")

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return last_steps(_LAYERS, decoder_layers, ranked_before=True)

    @property
    def steps(self) -> tuple[int, ...]:
        """The layers before which tokens are filtered."""
        return steps_of(self.prune_before)

    @property
    def filters(self) -> bool:
        """Whether stage 2 can drop anything."""
        return self.keep is not None or (self.alpha > 0 and self.gamma > 0)

    def count(self, step: int, tokens: int) -> int:
        """Tokens left after filter ``step`` (0-based), with ``keep``, of an image that entered
        the decoder with ``tokens``."""
        assert self.keep is not None
        if isinstance(self.keep, Sequence):
            return resolve_keep(self.keep[step], tokens)
        final = resolve_keep(self.keep, tokens)
        if step + 1 == len(self.steps):
            return final
        return final + (tokens - final) // 4 ** (step + 1)

    def knob(self, name: str) -> Knob:
        """γ with α at their present ratio (1 : 1 where α is 0), "thresholds"; γ alone, "gamma"; or
        the form with fixed counts, "keep"."""
        if name == "keep":
            return super().knob(name)
        if self.variant != "official":
            raise ValueError(f"variant={self.variant!r} has no thresholds that could be turned")
        if name == "gamma" and not self.alpha:
            raise ValueError("alpha=0 keeps every token; give alpha, or turn 'thresholds'")
        ratio = self.alpha / self.gamma if self.alpha and self.gamma else 1.0

        def at(gamma: float) -> Method:
            alpha = self.alpha if name == "gamma" else gamma * ratio
            return dataclasses.replace(self, keep=None, gamma=gamma, alpha=alpha)

        hint = "key tokens, and all tokens of the first layers, stay; "
        hint += "" if name == "thresholds" else f"a larger alpha than {self.alpha}, 'thresholds', "
        hint += "a smaller key_rate or threshold lowers it"
        # at the least value nothing is weak, at the largest all but the key tokens
        return Knob(at, (1e-7, 2.0 * max(1.0, 1.0 / ratio)), hint)

    @property
    def counts_cache(self) -> bool:
        """Whether decode steps stand at the number of cached entries."""
        return self.decode_positions != "continue"

    def on(self, facts: ModelFacts) -> MustDrop:
        if facts.axes > 1 and self.decode_positions == "cache_length":
            raise ValueError(
                "decode_positions='cache_length' counts positions on one axis, and those of "
                f"{facts.family} have {facts.axes}; it should be 'continue' or None"
            )
        own = self.decode_positions or ("continue" if facts.axes > 1 else "cache_length")
        return dataclasses.replace(super().on(facts), decode_positions=own)

    def plan(self, facts: ModelFacts) -> Plan:
        if self.keep is not None:
            check_fits(self.keep, facts)
        merged = keys = None
        tower, wants_keys = facts.tower, bool(self.filters and self.key_rate)
        prompt: tuple[PromptStage, ...] = ()
        if self.spatial and tower is None:
            prompt = (MergeCells(self),)
        if wants_keys or (self.spatial and tower is not None):
            tower = facts.need_tower(self.name, whole=self.spatial and tower is not None)
            merged = merge_layer(self, tower) if self.spatial and not prompt else None
            keys = key_layer(self, tower, merged) if wants_keys else None
        if self.filters:
            check_layers_fit(self.prune_before, facts, first=1)
        if self.variant == "lightcompress" and tower is not None and tower.tiled:
            prompt = (KeepTagged(self.new_positions),)
        encoder: tuple[MergeStage, ...] = ()
        if tower is not None and (merged is not None or keys is not None):
            encoder = (MergeStage(self, tower, merged, keys),)
        return Plan(
            encoder=encoder,
            prompt=prompt,
            decoder=(FilterStage(self),) if self.filters else (),
        )
