"""SparseVLM: text raters rank the image tokens at a few decoder layers; dropped ones are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tokprune.engine.contracts import ModelFacts, Order, Plan, Positions
from tokprune.methods.base import Method, Preset, check_fits, check_layers_fit
from tokprune.methods.depth import last_steps
from tokprune.methods.options import AtLeast, BudgetSchedule, PruneBefore, Range, Renamed
from tokprune.methods.registry import register_method
from tokprune.methods.schedule import check_steps, mean_of_steps, steps_of, tokens_after
from tokprune.methods.sparsevlm_stage import SparseStage
from tokprune.operators.sparsevlm import fixed_count, rank_count, recycle_counts

Version = Literal["v1", "plus"]

_LAYERS = (3, 7, 16)
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
    prompt. Before each layer of ``prune_before`` the image tokens go that the raters attend to
    least in the layer that has just run; of those dropped, the best are clustered and merged into a
    few tokens that stay (recycling).

    Every image has its own budget and its own merged tokens; the text after the sample's last
    image rates all of them. Where no text follows, the last prompt token rates.

    Version "plus" (SparseVLM+) divides the attention by what rotary position embedding alone
    makes of each distance, averages over the heads that attend to the image most, recycles nothing
    and keeps the positions. Each part can be had alone by its option.

    Args:
        keep: tokens kept per image after each step, merged ones not counted: a count or a fraction
            of the tokens that entered the decoder, per layer. One number is the last step's: every
            step then keeps the same share of what it finds. None: int(rank · ``rank_scale`` +
            ``rank_bias``), the rank of the raters' attention to the image (all tokens at full
            rank); the host then reads the ranks once per step.
        version: "v1" or "plus".
        prune_before: decoder layers, 0-based and ascending, before which tokens are dropped, each
            time ranked in the layer that has just run (paper's first release 3, 7, 16, 20;
            Video-LLaVA 2).
        recycle: share of the dropped tokens that is merged, 0 merges none; None: 0.3, "plus" 0.
        cluster_size: about how many of them make one merged token.
        order: merged tokens behind the image's others by falling peak score ("published"), or at
            the place of the token in the centre of their cluster ("spatial").
        gravity: divide attention by the rotary weight; None: False, "plus" True.
        gravity_floor: least weight to divide by, as a share of the weight at distance 0: at long
            distances it falls to 0 and below. None: no bound, as the official code.
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

    name = "sparsevlm"
    stages = ("decoder prefill",)
    needs = "text attention of three decoder layers"
    paper = "arXiv 2410.04417"
    reads_prompt = True
    presets = (
        _preset("llava-1.5", 192, (300, 200, 110), _LIST),
        _preset("llava-1.5", 128, (303, 110, 36), _LIST),
        _preset("llava-1.5", 96, (238, 48, 26), _LIST),
        _preset("llava-1.5", 64, (66, 30, 17), _LIST),
        _plus(192, (300, 200, 118)),
        _plus(128, (238, 108, 60)),
        _plus(96, (246, 54, 28)),
        _plus(64, (66, 34, 20)),
        Preset("llava-1.5", "rank", {"keep": None, "prune_before": (*_LAYERS, 20)}, _RANK),
        _preset("llava-next", 640, (1515, 550, 180), _SCALED),
        _preset("llava-next", 320, (330, 150, 85), _SCALED),
    )
    variants = ({"version": "plus"}, {"recycle": 0.0})
    renamed = (Renamed("pruning_layers", "prune_before", 1),)

    keep: BudgetSchedule | None
    version: Version = "v1"
    prune_before: PruneBefore = _LAYERS
    recycle: Annotated[float, Range(0, 1)] | None = None
    cluster_size: Annotated[int, AtLeast(1)] = 10
    order: Order = "published"
    gravity: bool | None = None
    gravity_floor: Annotated[float, Range(0, 1, low_open=True)] | None = 1e-3
    heads: Annotated[int, AtLeast(1)] | None = None
    rank_scale: Annotated[float, Range(0, low_open=True)] = 13.5
    rank_bias: float = 0.0
    always_drop: bool = False
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_steps(self.keep, self.steps, "prune_before")

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return last_steps(_LAYERS, decoder_layers, ranked_before=True)

    def plan(self, facts: ModelFacts) -> Plan:
        if self.keep is not None:
            check_fits(self.keep, facts)
        check_layers_fit(self.prune_before, facts, first=1)
        return Plan(decoder=(SparseStage(self),))

    @property
    def steps(self) -> tuple[int, ...]:
        """The layers before which tokens are dropped."""
        return steps_of(self.prune_before)

    def mean_tokens(self, tokens: int, layers: int) -> float | None:
        if self.keep is None:  # the prompt decides
            return None

        def after(step: int, now: int) -> int:
            kept, _, merged = self.counts(step, tokens, now)
            return kept + merged

        return mean_of_steps(tokens, self.steps, layers, after)

    def counts(self, step: int, entering: int, now: int, rank: int = 0) -> tuple[int, int, int]:
        """What step ``step`` (0-based) makes of an image that entered the decoder with
        ``entering`` tokens and has ``now``: (kept, recycled, merged into); ``rank`` counts
        without ``keep`` only."""
        if self.keep is None:
            kept = rank_count(rank, now, self.rank_scale, self.rank_bias, self.always_drop)
        else:
            wanted = tokens_after(self.keep, step, len(self.steps), entering)
            kept = fixed_count(wanted, now, self.always_drop)
        chosen, clusters = recycle_counts(now - kept, self.recycled_share, self.cluster_size)
        if clusters >= now - kept:
            return (now, 0, 0) if clusters else (kept, 0, 0)
        return kept, chosen, clusters

    @property
    def _plus(self) -> bool:
        return self.version == "plus"

    @property
    def recycled_share(self) -> float:
        return (0.0 if self._plus else _RECYCLE) if self.recycle is None else self.recycle

    @property
    def uses_gravity(self) -> bool:
        return self._plus if self.gravity is None else self.gravity

    @property
    def head_count(self) -> int | None:
        return _HEADS if self._plus and self.heads is None else self.heads

    @property
    def new_positions(self) -> Positions:
        return self.positions or ("preserve" if self._plus else self.published_positions)
