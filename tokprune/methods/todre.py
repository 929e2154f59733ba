"""ToDRE: a diverse subset after the projector, then all visual tokens go once text ignores them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    DecoderStage,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    KeepDecision,
    ModelFacts,
    Plan,
    Positions,
    PromptStage,
    ScoringLayer,
    Selection,
    SequenceView,
    TowerInput,
    TowerTokens,
)
from tokprune.methods.base import (
    Budget,
    Method,
    Preset,
    check_choice,
    check_fits,
    check_keep,
    check_range,
    register_method,
    resolve_keep,
)
from tokprune.operators.diversity import (
    center_pivot,
    cls_pivot,
    cls_scores,
    farthest_pivot,
    k_center,
    max_sum,
    random_pivot,
)
from tokprune.operators.relevance import ratio_from_rows, should_drop

Select = Literal["max_sum", "k_center"]
Pivot = Literal["cls", "farthest", "center", "random"]

_PAPER = "arXiv 2505.18757v2, Table 1"

#: attention rows computed at once in stage 2
_CHUNK = 256


@register_method
@dataclass(frozen=True)
class ToDRE(Method):
    """Two stages, each usable alone. Stage 1 keeps the ``keep`` most diverse patches of every
    image, all its tiles together. Stage 2 looks at one decoder layer: where text and image attend
    to each other less than ``tau``, that sample's visual tokens are all dropped.

    Newline tokens are no candidates and go; survivors enter in prompt order. Stage 2 decides per
    sample and costs one read by the host. An image that has no more patches than ``keep`` is left
    untouched. With a several-image prompt each image is selected on its own, and stage 2 drops
    all images of the sample or none.

    Args:
        keep: visual tokens per image (count) or fraction of the image's patches (floored, at
            least 1); None or 1.0 runs stage 2 alone.
        select: "max_sum" (v2 of the paper) or "k_center" (v1).
        pivot: the first token: "cls" has the largest class attention of the last vision layer
            (tiled images: of the base tile; videos: of all frames, after the model's own pooling);
            "farthest" from or "center" nearest to the mean feature; "random" (seeded). "cls"
            becomes "farthest" on a tower without class token.
        seed: of the random pivot.
        tau: stage 2 drops where both ratios are below it.
        check_layers: decoder layers, counted from 1, after which stage 2 looks; the first where
            the rule holds drops. None means ⌊7L/8⌋ of L layers. Layer L decides but saves nothing.
        stage2: False runs stage 1 alone.
        positions: of stage 1: "compact" renumbers the shortened prompt, "preserve" keeps the
            original ids. After stage 2 the text keeps the ids it has.

    Source: ToDRE, arXiv 2505.18757v2 (v1 for ``k_center``); no official code exists.
    """

    name: ClassVar[str] = "todre"
    stages: ClassVar[tuple[str, ...]] = ("after projector", "decoder prefill")
    needs: ClassVar[str] = "features, one class row (pivot), text rows of one decoder layer"
    paper: ClassVar[str] = "arXiv 2505.18757"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset("llava-next", 720, {"keep": 720}, f"{_PAPER}: 25 % of 2880"),
        Preset("llava-next", 288, {"keep": 288}, f"{_PAPER}: 10 % of 2880"),
        Preset("llava-next", "stage 2", {"keep": None}, "arXiv 2505.18757v2, stage 2 alone"),
    )

    keep: Budget | None
    select: Select = "max_sum"
    pivot: Pivot = "cls"
    seed: int = 0
    tau: float = 0.10
    check_layers: int | Sequence[int] | None = None
    stage2: bool = True
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        elif not self.stage2:
            raise ValueError(
                "keep=None with stage2=False does nothing; keep should be a count or a fraction, "
                "or stage2 should be True"
            )
        check_choice(self.select, "select", ("max_sum", "k_center"))
        check_choice(self.pivot, "pivot", ("cls", "farthest", "center", "random"))
        check_range(self.tau, "tau", 0, 1)
        check_choice(self.positions, "positions", ("compact", "preserve"))
        layers = self._given_layers()
        if self.check_layers is not None and (
            not layers or any(isinstance(x, bool) or not isinstance(x, int) for x in layers)
        ):
            raise ValueError(
                f"check_layers={self.check_layers!r} should be a layer number, counted from 1, or "
                "several of them"
            )

    def _given_layers(self) -> tuple[int, ...]:
        given = self.check_layers
        if given is None:
            return ()
        return tuple(given) if isinstance(given, Sequence) else (given,)

    def plan(self, facts: ModelFacts) -> Plan:
        if self.keep is not None:
            pictures = facts.max_tiles * facts.tokens_per_tile
            check_fits(self.keep, facts, None if facts.videos else pictures)
        depth = facts.decoder_layers
        layers = self._given_layers() or (max(1, 7 * depth // 8),)
        if any(not 1 <= layer <= depth for layer in layers):
            raise ValueError(
                f"check_layers={self.check_layers!r} should lie between 1 and the model's {depth} "
                "layers (counted from 1)"
            )
        decoder = (_RelevanceStage(self.tau, layers),) if self.stage2 else ()
        if self.keep is None or (isinstance(self.keep, float) and self.keep == 1):
            return Plan(decoder=decoder)
        observe = self.pivot == "cls" and facts.has_cls
        return Plan(
            encoder=(_ClassAttention(facts.encoder_layers - 1),) if observe else (),
            prompt=(_DiversityStage(self, self.keep),),
            decoder=decoder,
        )


# ------------------------------------------------------------------------------- pivot


class _ClassAttention(EncoderStage):
    """Observes the class token's attention in the last layer of the tower."""

    def __init__(self, layer: int) -> None:
        self.taps = frozenset({layer})

    @property
    def share_key(self) -> Hashable:
        return "class attention", *self.taps

    def start(self, tower: TowerInput) -> EncoderRun:
        return _ClassAttentionRun()


class _ClassAttentionRun(EncoderRun):
    def __init__(self) -> None:
        self.score: Tensor | None = None
        self.tokens: TowerTokens | None = None

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self.score, self.tokens = cls_scores(attention.cls_row()), tokens

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        score, seen = self.score, self.tokens
        if score is not None and seen is not None:
            # another method reduced this very layer after its attention: follow its rows
            score = tokens.carry(score, seen)
        return EncoderOutcome(score=score)


# ------------------------------------------------------------------------------- stage 1


class _DiversityStage(PromptStage):
    def __init__(self, method: ToDRE, keep: Budget) -> None:
        self.method, self.keep, self.positions = method, keep, method.positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        orders = self.order(images)
        return [None if order is None else Selection(order.sort().values) for order in orders]

    def order(self, images: Sequence[ImageTokens]) -> list[Tensor | None]:
        """Rows of each image in selection order, the pivot first; None: nothing to drop.

        Images with equally many patches are selected together.
        """
        orders: list[Tensor | None] = [None] * len(images)
        alike: dict[int, list[int]] = {}
        for i, image in enumerate(images):
            if resolve_keep(self.keep, image.patches) < image.patches:
                alike.setdefault(image.patches, []).append(i)
        for n, members in alike.items():
            k = resolve_keep(self.keep, n)
            chosen = [images[i] for i in members]
            patches = torch.stack([image.patch_rows() for image in chosen])
            x = torch.stack([image.features[rows] for image, rows in zip(chosen, patches)])
            pick = max_sum if self.method.select == "max_sum" else k_center
            order = patches.gather(1, pick(x, k, self._pivot(chosen, patches, x)))
            for i, own in zip(members, order):
                orders[i] = own
        return orders

    def _pivot(self, images: list[ImageTokens], patches: Tensor, x: Tensor) -> Tensor:
        """First token of each image, [B], as a column of ``patches`` [B, n]."""
        rule = self.method.pivot
        if rule == "center":
            return center_pivot(x)
        if rule == "random":  # drawn on the host, so every device draws the same
            one = random_pivot(x.shape[1], torch.Generator().manual_seed(self.method.seed))
            return one.to(x.device).expand(x.shape[0])
        scores = [image.score for image in images if image.score is not None]
        if rule == "farthest" or len(scores) < len(images):
            return farthest_pivot(x)
        score = torch.stack([s[rows] for s, rows in zip(scores, patches)])
        # the base tile of a picture, all frames of a video
        base = torch.stack(
            [(image.tile[rows] == 0) | image.video for image, rows in zip(images, patches)]
        )
        return cls_pivot(score, base)


# ------------------------------------------------------------------------------- stage 2


@dataclass(frozen=True)
class RelevanceCheck:
    """What stage 2 found after decoder layer ``layer`` (counted from 1): the ratios and the
    decision per sample, [B] on the model's device; NaN ratios where there is nothing to compare.
    """

    layer: int
    alpha_tv: Tensor
    alpha_vt: Tensor
    drop: Tensor


class _RelevanceStage(DecoderStage):
    def __init__(self, tau: float, layers: Sequence[int]) -> None:
        self.tau = tau
        self.taps = frozenset(layer - 1 for layer in layers)
        self.prune_layers = frozenset(layers)

    def start(self) -> DecoderRun:
        return _RelevanceRun(self.tau)


class _RelevanceRun(DecoderRun):
    def __init__(self, tau: float) -> None:
        self.tau = tau
        #: the checks of this prefill, in layer order
        self.checks: list[RelevanceCheck] = []

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        if not any(map(any, sequence.counts)):
            return  # every sample has dropped its visual tokens
        tv, vt = _ratios(attention, sequence)
        self.checks.append(RelevanceCheck(layer + 1, tv, vt, should_drop(tv, vt, self.tau)))

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        if not self.checks or self.checks[-1].layer != layer:
            return None
        drop = self.checks[-1].drop.to(hidden.device)
        return KeepDecision(sequence.visual & ~drop[:, None], None, "preserve")


def _ratios(attention: Attention, sequence: SequenceView) -> tuple[Tensor, Tensor]:
    """(α_tv, α_vt) [B] of eq. 8; NaN for samples without later text or without visual tokens.

    Only the rows needed are computed: text after the first visual token; visual rows of second
    and later images, the only ones that can see such text. How many is known on the host.
    """
    visual = sequence.visual
    text = sequence.valid & ~visual & (visual.cumsum(1) > 0)
    several = sequence.segments > 1
    if several:
        real = [n - sum(own) for n, own in zip(sequence.lengths, sequence.counts)]
        rows, row_valid = _rows_of(text, max(real))
    else:
        rows, row_valid = sequence.text_rows()
    alpha_tv = _mass(attention, rows, row_valid, visual) / text.sum(1)
    mass = torch.zeros_like(alpha_tv)
    if several:
        later = max(sum(own[1:]) for own in sequence.counts)
        mass = _mass(attention, *_rows_of(sequence.segment > 0, later), text)
    return alpha_tv, mass / visual.sum(1)


def _rows_of(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positions of True, (index [B, width], real [B, width]); ``width`` covers every row."""
    order = mask.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    return order, mask.gather(1, order)


def _mass(attention: Attention, rows: Tensor, real: Tensor, columns: Tensor) -> Tensor:
    """Head-mean weight of some rows on some columns, summed over both: [B] float32."""
    total = torch.zeros(columns.shape[0], device=columns.device)
    one = torch.ones_like(total)
    for part, valid in zip(rows.split(_CHUNK, 1), real.split(_CHUNK, 1)):
        total = total + ratio_from_rows(attention.rows(part), valid, columns, count=one)
    return total
