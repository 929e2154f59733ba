"""SparseVLM: text raters rank the image tokens at a few decoder layers; dropped ones are merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    Attention,
    DecoderRun,
    DecoderStage,
    KeepDecision,
    ModelFacts,
    Order,
    Plan,
    Positions,
    ScoringLayer,
    SequenceView,
)
from tokprune.methods.base import (
    BudgetSchedule,
    Method,
    Preset,
    check_choice,
    check_range,
    register_method,
)
from tokprune.methods.schedule import check_layers, check_steps, check_steps_fit, tokens_after
from tokprune.operators.sparsevlm import (
    attention_rank,
    best_heads,
    fixed_count,
    rank_count,
    rater_attention,
    recycle_counts,
    recycle_merge,
    rotary_weight,
    text_raters,
    text_relevance,
    vision_scores,
)
from tokprune.operators.topk import rank, segment_topk

Version = Literal["v1", "plus"]

#: attention rows computed at once
_CHUNK = 128
_RECYCLE = 0.3
_HEADS = 14

_LIST = "SparseVLM, official code (v1.5 lists); merged tokens come on top of the list"
_PLUS = "SparseVLM+, official code with its second version switched on"
_SCALED = "ours: the list for LLaVA-1.5 times 5; results are published, their list is not"
_RANK = "SparseVLM, first official release: counts from the rank of the attention"


def _preset(model: str, budget: int, keep: tuple[int, int, int], source: str) -> Preset:
    return Preset(model, budget, {"keep": keep}, source)


def _plus(budget: int, keep: tuple[int, int, int]) -> Preset:
    return Preset("llava-1.5", f"plus-{budget}", {"keep": keep, "version": "plus"}, _PLUS)


@register_method
@dataclass(frozen=True)
class SparseVLM(Method):
    """Text tokens after the image that are similar to it (raters) are chosen once, on the embedded
    prompt. After each of ``pruning_layers`` the image tokens go that the raters attend to least
    in that layer; of those dropped, the best are clustered and merged into a few tokens that
    stay (recycling).

    Every image has its own budget and its own merged tokens; the text after the sample's last
    image rates all of them. Where no text follows, the last prompt token rates.

    Version "plus" (SparseVLM+) divides the attention by what rotary position embedding alone
    makes of each distance, averages over the heads that attend to the image most, recycles nothing
    and keeps the positions. Each part can be had alone by its option.

    Args:
        keep: tokens kept per image after each pruning layer, merged ones not counted: a count or
            a fraction of the tokens that entered the decoder, per layer. One number is the last
            layer's: every step then keeps the same share of what it finds. None: int(rank ·
            ``rank_scale`` + ``rank_bias``), the rank of the raters' attention to the image
            (all tokens at full rank); the host then reads the ranks once per pruning layer.
        version: "v1" or "plus".
        pruning_layers: decoder layers, counted from 0 and ascending, whose attention ranks and
            whose output is pruned (paper's first release 2, 6, 15, 19; Video-LLaVA 1).
        recycle: share of the dropped tokens that is merged, 0 merges none; None: 0.3, "plus" 0.
        cluster_size: about how many of them make one merged token.
        order: merged tokens behind the image's others by falling peak score ("published"), or at
            the place of the token in the centre of their cluster ("spatial").
        gravity: divide attention by the rotary weight; None: False, "plus" True.
        heads: heads to average over; None: all, "plus" the best 14 (or all, if fewer).
        rank_scale, rank_bias: see ``keep``; official video branch 1 and 0.
        always_drop: each step drops at least one token, as the official code does, even where the
            budget covers all. (With recycling, a single dropped token would merge with itself
            alone, so that nothing goes then.)
        positions: "compact" or "preserve"; None: "compact", "plus" "preserve".

    Ties in the clustering go to the first token; the official code breaks them at random, which
    decides its result wherever there are two clusters.

    Source: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference,
    ICML 2025, and SparseVLM+, arXiv 2410.04417, official code.
    """

    name: ClassVar[str] = "sparsevlm"
    stages: ClassVar[tuple[str, ...]] = ("decoder prefill",)
    needs: ClassVar[str] = "text rows of three decoder layers"
    paper: ClassVar[str] = "arXiv 2410.04417"
    presets: ClassVar[tuple[Preset, ...]] = (
        _preset("llava-1.5", 192, (300, 200, 110), _LIST),
        _preset("llava-1.5", 128, (303, 110, 36), _LIST),
        _preset("llava-1.5", 96, (238, 48, 26), _LIST),
        _preset("llava-1.5", 64, (66, 30, 17), _LIST),
        _plus(192, (300, 200, 118)),
        _plus(128, (238, 108, 60)),
        _plus(96, (246, 54, 28)),
        _plus(64, (66, 34, 20)),
        Preset("llava-1.5", "rank", {"keep": None, "pruning_layers": (2, 6, 15, 19)}, _RANK),
        _preset("llava-next", 640, (1515, 550, 180), _SCALED),
        _preset("llava-next", 320, (330, 150, 85), _SCALED),
    )

    keep: BudgetSchedule | None
    version: Version = "v1"
    pruning_layers: Sequence[int] = (2, 6, 15)
    recycle: float | None = None
    cluster_size: int = 10
    order: Order = "published"
    gravity: bool | None = None
    heads: int | None = None
    rank_scale: float = 13.5
    rank_bias: float = 0.0
    always_drop: bool = False
    positions: Positions | None = None

    def __post_init__(self) -> None:
        check_choice(self.version, "version", ("v1", "plus"))
        check_layers(self.pruning_layers, "pruning_layers")
        if self.keep is not None:
            check_steps(self.keep, len(self.pruning_layers), "pruning_layers")
        if self.recycle is not None:
            check_range(self.recycle, "recycle", 0, 1)
        for name in ("cluster_size", "heads"):
            value = getattr(self, name)
            fine = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not fine and (value is not None or name == "cluster_size"):
                raise ValueError(f"{name}={value!r} should be a whole number, at least 1")
        check_choice(self.order, "order", ("published", "spatial"))
        check_range(self.rank_scale, "rank_scale", 0, math.inf, low_open=True)
        if not math.isfinite(self.rank_bias):
            raise ValueError(f"rank_bias={self.rank_bias!r} should be a finite number")
        check_choice(self.positions, "positions", ("compact", "preserve", None))

    def plan(self, facts: ModelFacts) -> Plan:
        if self.keep is not None:
            check_steps_fit(self.keep, facts)
        if max(self.pruning_layers) > facts.decoder_layers - 2:
            raise ValueError(
                f"pruning_layers={tuple(self.pruning_layers)} should lie between 0 and "
                f"{facts.decoder_layers - 2}: the model has {facts.decoder_layers} decoder layers "
                "and one must follow"
            )
        return Plan(decoder=(_SparseStage(self),))

    def counts(self, step: int, entering: int, now: int, rank: int = 0) -> tuple[int, int, int]:
        """What step ``step`` (0-based) makes of an image that entered the decoder with
        ``entering`` tokens and has ``now``: (kept, recycled, merged into); ``rank`` counts
        without ``keep`` only."""
        if self.keep is None:
            kept = rank_count(rank, now, self.rank_scale, self.rank_bias, self.always_drop)
        else:
            wanted = tokens_after(self.keep, step, len(self.pruning_layers), entering)
            kept = fixed_count(wanted, now, self.always_drop)
        chosen, clusters = recycle_counts(now - kept, self._recycle, self.cluster_size)
        if clusters >= now - kept:
            return (now, 0, 0) if clusters else (kept, 0, 0)
        return kept, chosen, clusters

    @property
    def _plus(self) -> bool:
        return self.version == "plus"

    @property
    def _recycle(self) -> float:
        return (0.0 if self._plus else _RECYCLE) if self.recycle is None else self.recycle

    @property
    def _gravity(self) -> bool:
        return self._plus if self.gravity is None else self.gravity

    @property
    def _heads(self) -> int | None:
        return _HEADS if self._plus and self.heads is None else self.heads

    @property
    def _positions(self) -> Positions:
        if self.positions is not None:
            return self.positions
        return "preserve" if self._plus else "compact"


class _SparseStage(DecoderStage):
    def __init__(self, method: SparseVLM) -> None:
        self.method = method
        self.taps = frozenset(method.pruning_layers)
        # before layer 0 the raters are chosen
        self.prune_layers = frozenset({0, *(layer + 1 for layer in method.pruning_layers)})

    def start(self) -> DecoderRun:
        return _SparseRun(self.method)


class _SparseRun(DecoderRun):
    def __init__(self, method: SparseVLM) -> None:
        self.method = method
        #: text tokens that rate, [B, R]; their places are those of the text, which never goes
        self.raters: Tensor | None = None
        #: attention from the raters [B, L], and its rank per image [B, S], of the newest layer
        self.score: Tensor | None = None
        self.ranks: Tensor | None = None
        #: tokens that the newest step kept, merged ones not counted, [B, L] before its drop
        self.kept: Tensor | None = None

    def _rows(self, sequence: SequenceView) -> Tensor:
        """Places of the tokens that may rate, [B, R]: the text, and the last token where a row
        has none."""
        rows, _ = sequence.text_rows()
        return rows if min(sequence.text_after) else torch.cat([rows, sequence.last_row()], dim=1)

    def _choose(self, hidden: Tensor, sequence: SequenceView) -> None:
        rows, real = sequence.text_rows()
        raters = text_raters(text_relevance(hidden, sequence.visual, rows, real), real)
        if not min(sequence.text_after):
            raters = torch.cat([raters, ~real.any(1, keepdim=True)], dim=1)
        self.raters = raters

    def attention(self, layer: int, attention: Attention, sequence: SequenceView) -> None:
        assert self.raters is not None
        method, places = self.method, self._rows(sequence)
        raters = self.raters = self.raters.to(places.device)
        total, means = None, []
        for part, rate in zip(places.split(_CHUNK, 1), raters.split(_CHUNK, 1)):
            rows, weight = attention.rows(part), None
            if method._gravity:
                assert attention.rotary is not None
                cos, sin = (x.expand(len(part), -1, -1) for x in attention.rotary())
                weight = rotary_weight(cos, sin, part)
            own = rater_attention(rows, rate, weight)
            total = own if total is None else total + own
            if method.keep is None:
                means.append(rows.mean(1))
        assert total is not None
        heads = None
        if method._heads is not None:
            heads = best_heads(total, sequence.visual, method._heads)
        self.score = vision_scores(total, raters, heads)
        if means:
            mean = torch.cat(means, dim=1)[:, None]
            images = [sequence.segment == image for image in range(sequence.segments)]
            self.ranks = torch.stack([attention_rank(mean, raters, own) for own in images], dim=1)

    def before_layer(
        self, layer: int, hidden: Tensor, sequence: SequenceView, scoring: ScoringLayer
    ) -> KeepDecision | None:
        if layer == 0:
            self._choose(hidden, sequence)
        if self.score is None:
            return None
        score = self.score.to(hidden.device)
        plan = self._plan(layer, sequence)
        counts = [[kept + merged for kept, _, merged in row] for row in plan]
        if counts == sequence.counts:
            return None
        budget = torch.tensor(
            [[kept for kept, _, _ in row] + [0] * (sequence.segments - len(row)) for row in plan]
        )
        mask = segment_topk(score, sequence.segment, budget.to(hidden.device, non_blocking=True))
        self.kept = mask
        answer = KeepDecision(mask, counts, self.method._positions)
        recycled = [
            (b, s, chosen, merged)
            for b, row in enumerate(plan)
            for s, (_, chosen, merged) in enumerate(row)
            if merged
        ]
        if recycled:
            self._recycle(answer, recycled, hidden, sequence, score)
        return answer

    def _plan(self, layer: int, sequence: SequenceView) -> list[list[tuple[int, int, int]]]:
        """(kept, recycled, merged into) of every image."""
        step = list(self.method.pruning_layers).index(layer - 1)
        none = [[0] * len(row) for row in sequence.counts]
        ranks = none if self.ranks is None else self.ranks.tolist()  # adaptive: one host read
        return [
            [self.method.counts(step, *image) for image in zip(*row)]
            for row in zip(sequence.entering, sequence.counts, ranks)
        ]

    def _recycle(
        self, answer: KeepDecision, images: list[tuple[int, int, int, int]], hidden: Tensor,
        sequence: SequenceView, score: Tensor,
    ) -> None:  # fmt: skip
        """Merge dropped tokens; each merged one takes the slot of the centre of its cluster."""
        device, length = hidden.device, sequence.column.shape[1]
        numbers = torch.tensor(images).to(device, non_blocking=True)
        row, segment, chosen, merged = numbers.unbind(1)
        most = max(n for *_, n in images)
        own = sequence.segment[row] == segment[:, None]
        spare = score[row].masked_fill(~own | answer.mask[row], -torch.inf)
        place = rank(spare)[:, : max(n for _, _, n, _ in images)]
        valid = torch.arange(place.shape[1], device=device) < chosen[:, None]
        found = recycle_merge(hidden[row[:, None], place], most, merged, valid)
        centre = place.gather(1, found.centre.clamp(min=0))
        exists = found.centre >= 0

        def put(base: Tensor, at: Tensor, value: Tensor, real: Tensor) -> Tensor:
            """``base`` [B, L, …] with ``value`` at the places ``at`` [N, n] that are ``real``."""
            flat = base.flatten(0, 1)
            flat = torch.cat([flat, torch.zeros_like(flat[:1])])  # the last row takes the others
            flat[(row[:, None] * length + at).masked_fill(~real, len(flat) - 1)] = value
            return flat[:-1].view_as(base)

        arange = torch.arange(length, device=device)
        kept = torch.where(answer.mask | ~sequence.visual, arange, -1)
        holder = centre.gather(1, found.cluster.clamp(min=0))
        answer.group = put(kept, place, holder, valid)
        answer.hidden = put(hidden, centre, found.out, exists)
        answer.mask = put(answer.mask, centre, torch.ones_like(exists), exists)
        if self.method.order == "published":
            end = torch.where(own, arange, -1).amax(1, keepdim=True)
            behind = end * (most + 1) + 1 + torch.arange(most, device=device)
            spaced = (arange * (most + 1)).expand(sequence.column.shape)
            answer.order = put(spaced, centre, behind, exists)
