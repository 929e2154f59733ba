"""MustDrop: merge windows in the encoder, filter by text attention, shrink the decode cache."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tokprune.engine.contracts import (
    Attention,
    CachePolicy,
    DecoderRun,
    DecoderStage,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    KeepDecision,
    ModelFacts,
    Order,
    Plan,
    Positions,
    PromptStage,
    Reduction,
    ScoringLayer,
    Selection,
    SequenceView,
    TowerInput,
    TowerTokens,
)
from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import (
    BudgetSchedule,
    Method,
    Preset,
    check_choice,
    check_fits,
    check_keep,
    check_range,
    register_method,
    resolve_keep,
)
from tokprune.operators.mustdrop import filter_score, key_mask, key_tokens, text_attention
from tokprune.operators.topk import rank, segment_topk
from tokprune.operators.windows import WindowMerge, spatial_merge, spatial_merge_fixed

Variant = Literal["official", "lightcompress"]
DecodePositions = Literal["cache_length", "continue"]
ShareR = Literal["image", "batch"]

#: attention rows computed at once
_CHUNK = 128

_SCRIPTS = "MustDrop, evaluation scripts of the official code; tokens are an average over the data"
_PORT = "LightCompress's variant of MustDrop: windows merged on the selected features"


def _preset(name: str, gamma: float, alpha: float) -> Preset:
    return Preset("llava-1.5", name, {"gamma": gamma, "alpha": alpha}, _SCRIPTS)


def _port(model: str, budget: int) -> Preset:
    options = {"variant": "lightcompress", "retained": budget}
    return Preset(model, f"lightcompress-{budget}", options, _PORT)


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
    nothing, the published settings are presets, and :meth:`calibrate` finds γ for a mean number.
    ``keep`` is a form with fixed counts (ours, not published).

    Merged tokens enter the prompt first, by falling similarity, then the others ("published"
    order). Tiled models then get all tiles as one block, base first, without unpadding and
    newline tokens, as in the official code. With several images in a prompt each has its own
    shares and budget; the text after the last one asks. Where no text follows, everything is
    kept, with a warning. Towers without class token take the mean attention that a token receives
    in the key layer for the key set (an extension of ours).

    Args:
        keep: visual tokens per image after the last filter, a count or a fraction of the tokens
            that enter the decoder, or one such number per pruning layer. From a single K, filter
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
        pruning_layers: decoder layers, 0-based and ascending, whose output is filtered.
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

    name: ClassVar[str] = "mustdrop"
    stages: ClassVar[tuple[str, ...]] = ("encoder layer", "decoder prefill", "KV cache")
    needs: ClassVar[str] = "a class row, text rows of four decoder layers"
    paper: ClassVar[str] = "arXiv 2411.10803"
    presets: ClassVar[tuple[Preset, ...]] = (
        _preset("textvqa-192", 0.001, 0.001),
        _preset("textvqa-128", 0.0012, 0.001),
        _preset("textvqa-64", 0.011, 0.01),
        _preset("vizwiz-64", 0.005, 0.001),
        _port("llava-1.5", 192),
        _port("llava-1.5", 128),
        _port("llava-1.5", 64),
    )

    keep: BudgetSchedule | None = None
    gamma: float = 1.0
    alpha: float = 0.0
    window: tuple[int, int] = (3, 3)
    threshold: float = 0.8
    merge_after_layer: int | None = None
    key_rate: float = 0.08
    key_layer: int = -1
    pruning_layers: Sequence[int] = (2, 6, 10, 14)
    cache_policy: bool = True
    decode_positions: DecodePositions = "cache_length"
    order: Order = "published"
    share_r: ShareR = "image"
    spatial: bool = True
    variant: Variant = "official"
    retained: int | None = None
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        self._check_schedule()
        check_range(self.gamma, "gamma", 0, math.inf)
        check_range(self.alpha, "alpha", 0, math.inf)
        pair = isinstance(self.window, (tuple, list)) and len(self.window) == 2
        if not pair or not all(_whole(n) and n >= 1 for n in self.window):
            raise ValueError(f"window={self.window!r} should be (rows, columns)")
        if math.prod(self.window) < 2:
            raise ValueError(f"window={self.window!r} should hold at least two tokens")
        check_range(self.threshold, "threshold", -1, 1)
        check_range(self.key_rate, "key_rate", 0, 1)
        for name in ("merge_after_layer", "key_layer", "retained"):
            value = getattr(self, name)
            if value is not None and not _whole(value):
                raise ValueError(f"{name}={value!r} should be a whole number")
        check_choice(self.decode_positions, "decode_positions", ("cache_length", "continue"))
        check_choice(self.order, "order", ("published", "spatial"))
        check_choice(self.share_r, "share_r", ("image", "batch"))
        check_choice(self.variant, "variant", ("official", "lightcompress"))
        check_choice(self.positions, "positions", ("compact", "preserve"))
        if self.variant == "lightcompress":
            if self.filters:
                raise ValueError(
                    "variant='lightcompress' merges windows only; keep should be None and alpha 0"
                )
            if not self.spatial:
                raise ValueError("variant='lightcompress' with spatial=False would do nothing")

    def _check_schedule(self) -> None:
        layers = self.pruning_layers
        fine = isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers) > 0
        if not fine or not all(_whole(x) and x >= 0 for x in layers):
            raise ValueError(
                f"pruning_layers={layers!r} should be a sequence of layer numbers, counted from 0"
            )
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"pruning_layers={layers!r} should be ascending")
        keep = self.keep
        if keep is None:
            return
        if not isinstance(keep, Sequence) or isinstance(keep, str):
            check_keep(keep)
            return
        if len(keep) != len(layers):
            raise ValueError(
                f"keep={keep!r} should hold one budget per pruning layer, {len(layers)} in all"
            )
        for i, budget in enumerate(keep):
            check_keep(budget, f"keep[{i}]")
        for before, after in itertools.pairwise(keep):
            if type(before) is type(after) and after > before:
                raise ValueError(f"keep={keep!r} should not rise from one filter to the next")

    @property
    def filters(self) -> bool:
        """Whether stage 2 can drop anything."""
        return self.keep is not None or (self.alpha > 0 and self.gamma > 0)

    def counts(self, step: int, tokens: int) -> int:
        """Tokens left after filter ``step`` (0-based), with ``keep``, of an image that entered
        the decoder with ``tokens``."""
        assert self.keep is not None
        if isinstance(self.keep, Sequence):
            return resolve_keep(self.keep[step], tokens)
        final = resolve_keep(self.keep, tokens)
        if step + 1 == len(self.pruning_layers):
            return final
        return final + (tokens - final) // 4 ** (step + 1)

    def plan(self, facts: ModelFacts) -> Plan:
        for budget in self.keep if isinstance(self.keep, Sequence) else (self.keep,):
            if budget is not None:
                check_fits(budget, facts)
        merge_layer = self._merge_layer(facts) if self.spatial else None
        key_layer = self._key_layer(facts, merge_layer) if self.filters and self.key_rate else None
        encoder: tuple[EncoderStage, ...] = ()
        if merge_layer is not None or key_layer is not None:
            encoder = (_MustDropStage(self, facts, merge_layer, key_layer),)
        prompt: tuple[PromptStage, ...] = ()
        if self.variant == "lightcompress" and facts.tiled:
            prompt = (_KeepTagged(self.positions),)
        decoder: tuple[DecoderStage, ...] = ()
        if self.filters:
            depth = facts.decoder_layers
            if max(self.pruning_layers) > depth - 2:
                raise ValueError(
                    f"pruning_layers={tuple(self.pruning_layers)} should lie between 0 and "
                    f"{depth - 2}: the model has {depth} decoder layers and one must follow"
                )
            decoder = (_FilterStage(self),)
        return Plan(encoder=encoder, prompt=prompt, decoder=decoder)

    def _merge_layer(self, facts: ModelFacts) -> int:
        last = facts.feature_layer
        if last is None or last < 0:
            raise UnsupportedModelError(
                "MustDrop merges after an encoder layer, but this model reads its features from "
                "several layers or before the first (config.vision_feature_layer); spatial=False "
                "leaves the encoder alone"
            )
        layer = self.merge_after_layer
        if layer is None:
            layer = last if self.variant == "lightcompress" else 0
        if not 0 <= layer <= last:
            raise ValueError(
                f"merge_after_layer={layer} should be in [0, {last}]: the model reads its features "
                f"after layer {last}"
            )
        (h, w), (a, b) = facts.grid, self.window
        if h % a or w % b:
            raise ValueError(
                f"window={self.window} should divide the grid of {h} × {w} patches of this model"
            )
        if self.retained is not None:
            rows = h * w + facts.has_cls
            least = max(1, rows - (h * w // (a * b) + 1) * (a * b - 1) + 1)
            if not least <= self.retained <= rows:
                raise ValueError(
                    f"retained={self.retained} cannot be reached with windows of {self.window}: it "
                    f"should be in [{least}, {rows}]"
                )
        return layer

    def _key_layer(self, facts: ModelFacts, merge_layer: int | None) -> int:
        depth = facts.encoder_layers
        layer = self.key_layer + depth if self.key_layer < 0 else self.key_layer
        first = 0 if merge_layer is None else merge_layer + 1
        if not first <= layer < depth:
            raise ValueError(
                f"key_layer={self.key_layer} should be in [{first}, {depth - 1}]"
                + ("" if merge_layer is None else f", after the merge in layer {merge_layer}")
            )
        return layer

    def calibrate(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        target: float,
        *,
        tied: bool = True,
        tolerance: float = 0.01,
        steps: int = 24,
    ) -> MustDrop:
        """The same settings with γ chosen for a mean number of visual tokens.

        The number is that of the official counter: image tokens leaving each decoder layer,
        averaged over layers, then over images (of a tiled image all tiles together). Bisects γ;
        every step runs one prefill per batch, without decoding.

        Args:
            model: a supported model, not patched.
            batches: model inputs (``model(**batch)``) with images.
            target: mean number wanted.
            tied: α moves with γ, at their present ratio (1 : 1 where α is 0); else α stays.
            tolerance: accepted relative difference.
            steps: most bisection steps.

        Returns:
            A new method object, ``keep`` None; the nearest one found.

        Raises:
            ValueError: the model is patched, no image in ``batches``, or a target that no γ reaches
                (names what the key tokens alone, or everything, come to).
        """
        if self.variant != "official":
            raise ValueError("calibrate: variant='lightcompress' has no thresholds")
        if not batches:
            raise ValueError("batches should hold at least one batch with images")
        ratio = self.alpha / self.gamma if self.alpha and self.gamma else 1.0
        alpha = self.alpha

        def at(gamma: float) -> MustDrop:
            own = gamma * ratio if tied else alpha
            return dataclasses.replace(self, keep=None, gamma=gamma, alpha=own)

        def mean(gamma: float) -> float:
            return _mean_tokens(model, at(gamma), batches)

        if not tied and not alpha:
            raise ValueError("calibrate: alpha=0 keeps every token; give alpha, or tied=True")
        low, high = 1e-7, 2.0 * max(1.0, 1.0 / ratio)  # nothing, everything but the keys is weak
        most, least = mean(low), mean(high)
        if target < least * (1 - tolerance):
            raise ValueError(
                f"target={target} is below the floor of {least:.1f} tokens that survive any gamma"
                + (" (key tokens, and all tokens of the first layers); " if tied else " with this "
                   f"alpha={alpha}; a larger one, tied=True, ")
                + "a smaller key_rate or threshold lowers it"
            )  # fmt: skip
        if target > most * (1 + tolerance):
            raise ValueError(
                f"target={target} is above the {most:.1f} tokens without any filter; it should lie "
                f"between {least:.1f} and {most:.1f}"
            )
        best = min((abs(most - target), low), (abs(least - target), high))
        for _ in range(steps):
            if best[0] <= tolerance * target:
                break
            gamma = math.sqrt(low * high)
            got = mean(gamma)
            best = min(best, (abs(got - target), gamma))
            low, high = (gamma, high) if got > target else (low, gamma)
        return at(best[1])


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@torch.no_grad()
def _mean_tokens(model: nn.Module, method: MustDrop, batches: Sequence[Mapping[str, Any]]) -> float:
    from tokprune.api import patch, trace_of, unpatch

    total, images = 0.0, 0
    if trace_of(model) is not None:
        raise ValueError("calibrate: the model is patched; unpatch it first")
    trace = patch(model, method)
    try:
        for batch in batches:
            seen = trace.prefills
            model(**{**batch, "use_cache": False})
            if trace.last is None or trace.prefills == seen:
                continue
            layers = trace.last.layers
            leaving = [*layers[1:], layers[-1]]
            total += sum(sum(map(sum, layer.counts)) for layer in leaving) / len(layers)
            images += len(trace.last.images)
    finally:
        unpatch(model)
    if not images:
        raise ValueError("batches hold no image: pass pixel_values and image placeholder tokens")
    return total / images


# ------------------------------------------------------------------------------- stage 1


class _MustDropStage(EncoderStage):
    def __init__(
        self, method: MustDrop, facts: ModelFacts, merge_layer: int | None, key_layer: int | None
    ) -> None:
        self.method = method
        #: the port drops instead of merging on tiled models
        self.only_mark = method.variant == "lightcompress" and facts.tiled
        self.after_layers = frozenset() if merge_layer is None else frozenset({merge_layer})
        self.taps = frozenset() if key_layer is None else frozenset({key_layer})
        self.order, self.positions = method.order, method.positions

    def start(self, tower: TowerInput) -> EncoderRun:
        return _MustDropRun(self, tower)


class _MustDropRun(EncoderRun):
    def __init__(self, stage: _MustDropStage, tower: TowerInput) -> None:
        self.stage, self.tower = stage, tower
        #: what merged, and key tokens [tiles, k] by falling score (−1 = padding)
        self.merge: WindowMerge | None = None
        self.keys: Tensor | None = None

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        self.merge = merge = self._merge(hidden, tokens.has_cls)
        first = tokens.first_patch
        if self.stage.only_mark:
            return None
        if min(merge.counts) == hidden.shape[1] and not self.tower.facts.tiled:
            return None  # nothing merged anywhere; tiled models are packed anew all the same
        rows = torch.where(merge.rows < 0, -1, merge.rows + first)
        group = merge.group + first
        if first:
            zero = torch.zeros_like(rows[:, :1])
            rows, group = torch.cat([zero, rows], dim=1), torch.cat([zero, group], dim=1)
        ragged = min(merge.counts) < max(merge.counts)
        return Reduction(rows, merge.out, group, merge.counts if ragged else None)

    def _merge(self, hidden: Tensor, has_cls: bool) -> WindowMerge:
        method, grid = self.stage.method, self.tower.facts.grid
        window = (method.window[0], method.window[1])
        if method.retained is not None:
            return spatial_merge_fixed(hidden, window, method.retained, has_cls, grid)
        share: Literal["batch"] | Tensor = "batch"
        if method.share_r == "image":
            share = torch.tensor(self.tower.image_of_tile, device=hidden.device)
        return spatial_merge(hidden, method.threshold, window, has_cls, share, grid)

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        if tokens.has_cls:
            row = attention.cls_row()
        else:
            row = torch.nn.functional.pad(attention.received(), (1, 0))[:, None]
        self.keys = key_tokens(row, self.stage.method.key_rate, tokens.patch_valid)

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        tag = None
        if self.stage.only_mark:
            assert self.merge is not None
            tag = key_mask(self.merge.rows, self.tower.facts.patches)
        elif self.keys is not None:
            tag = key_mask(self.keys, tokens.rows - tokens.first_patch)
        return EncoderOutcome(tag=tag, unpad=False)


class _KeepTagged(PromptStage):
    """Drops the patches without a mark; newline and class tokens stay. One read per image."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        answers: list[Selection | None] = []
        for image in images:
            assert image.tag is not None
            answers.append(Selection((image.tag | (image.row < 0)).nonzero().view(-1)))
        return answers


# ------------------------------------------------------------------------------- stages 2, 3


@dataclass(frozen=True)
class Filtered:
    """One filter of a prefill: ``score`` [B, L] (at least 1 where the text protects a token),
    ``keep`` [B, L] and the sequence ``sequence`` that they belong to, before the drop."""

    score: Tensor
    keep: Tensor
    sequence: SequenceView


class _FilterStage(DecoderStage):
    def __init__(self, method: MustDrop) -> None:
        self.method = method
        self.taps = frozenset(method.pruning_layers)
        self.prune_layers = frozenset(layer + 1 for layer in method.pruning_layers)
        self.has_cache_policy = method.cache_policy

    def start(self) -> DecoderRun:
        return _FilterRun(self.method)


class _FilterRun(DecoderRun):
    def __init__(self, method: MustDrop) -> None:
        self.method = method
        self.score: Tensor | None = None
        #: the filters of this prefill, in layer order
        self.filters: list[Filtered] = []
        #: drops so far: the layer before which, and the old place of every survivor [B, L']
        self.drops: list[tuple[int, Tensor]] = []
        self._warned = False

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        self._warn(sequence)
        rows, real = sequence.text_rows()
        total = torch.zeros(sequence.column.shape, device=rows.device)
        peak = torch.zeros_like(total)
        if rows.shape[1]:
            for part, valid in zip(rows.split(_CHUNK, 1), real.split(_CHUNK, 1)):
                own, high = text_attention(attention.rows(part), valid, sequence.visual)
                total, peak = total + own, torch.maximum(peak, high)
        self.score = self._score(total, peak, sequence)

    def _score(self, total: Tensor, peak: Tensor, sequence: SequenceView) -> Tensor:
        """What the filter compares with 1, [B, L]: each image has shares of its own."""
        gamma, alpha = self.method.gamma, self.method.alpha
        if self.method.keep is not None and not (alpha and gamma):
            gamma = alpha = 1.0
        score = torch.zeros_like(total)
        for image in range(sequence.segments):
            own = sequence.segment == image
            share = filter_score(total.masked_fill(~own, 0.0), peak, gamma, alpha)
            score = torch.where(own, share, score)
        return score

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        if self.score is None:
            return None
        score = self.score.to(hidden.device)
        tag = sequence.tag if sequence.tag is not None else torch.zeros_like(sequence.visual)
        counts = None
        if self.method.keep is None:
            mask = ((score >= 1) | tag) & sequence.visual
        else:
            counts = self._counts(layer, sequence)
            budget = torch.tensor([row + [0] * (sequence.segments - len(row)) for row in counts])
            # whole numbers: key tokens above all others, each kind by its score
            place = rank(score).argsort(-1)
            order = torch.where(tag, 2, 1) * place.shape[1] - place
            budget = budget.to(hidden.device, non_blocking=True)
            mask = segment_topk(order, sequence.segment, budget)
        self.filters.append(Filtered(score, mask, sequence))
        return KeepDecision(mask, counts, self.method.positions)

    def _counts(self, layer: int, sequence: SequenceView) -> list[list[int]]:
        step = list(self.method.pruning_layers).index(layer - 1)
        counts = []
        for entering, now, text in zip(sequence.entering, sequence.counts, sequence.text_after):
            wanted = [self.method.counts(step, n) for n in entering]
            # without text after its images, a sample keeps all
            counts.append([min(k, n) for k, n in zip(wanted, now)] if text else list(now))
        return counts

    def _warn(self, sequence: SequenceView) -> None:
        silent = [
            b for b, text in enumerate(sequence.text_after) if not text and any(sequence.counts[b])
        ]
        if silent and not self._warned:
            self._warned = True
            warnings.warn(
                f"MustDrop: no text follows the image in batch row(s) {silent}: nothing can say "
                "which tokens matter, all are kept there",
                stacklevel=2,
            )

    def dropped(self, layer: int, index: Tensor) -> None:
        self.drops.append((layer, index))

    def after_prefill(self, sequences: Sequence[SequenceView]) -> CachePolicy | None:
        """Layers between the first filter and the last keep what is alive at the end."""
        layers, final = self.method.pruning_layers, sequences[-1]
        counted = self.method.decode_positions == "cache_length"
        end = max((layer for layer, _ in self.drops), default=0)
        if counted and self.method.positions == "preserve":
            end = max(layers) + 1  # the number of entries is another position even without a drop
        if not end:
            return None
        policy = CachePolicy(continue_positions=not counted)
        by_layer = dict(self.drops)
        arange = torch.arange(final.column.shape[1], device=final.column.device)
        place = arange.expand(final.column.shape)
        for layer in range(end - 1, min(layers) - 1, -1):
            if (index := by_layer.get(layer + 1)) is not None:
                place = index.gather(1, place.to(index.device))
            policy.index[layer] = place.masked_fill(~final.valid.to(place.device), -1)
            policy.lengths[layer] = final.lengths
        return policy
