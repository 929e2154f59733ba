"""CDPruner: diverse tokens that the question is about, by a process conditioned on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokprune.engine.contracts import ImageTokens, ModelFacts, Plan, Positions
from tokprune.engine.model import ImageLayout
from tokprune.methods.base import Method, Preset, check_fits, resolve_keep
from tokprune.methods.cdpruner_stage import DPPStage
from tokprune.methods.centring import Centre
from tokprune.methods.clip_relevance import TowerRelevance
from tokprune.methods.options import Budget
from tokprune.methods.registry import register_method

Relevance = Literal["text", "none"] | TowerRelevance | Callable[[ImageTokens], Tensor]
Scope = Literal["tile", "image"]
RelevanceScope = Literal["image", "call"]

_PAPER = "CDPruner, arXiv 2506.10967, relevance from CLIP's text tower (see ClipRelevance)"


@register_method
@dataclass(frozen=True)
class CDPruner(Method):
    """Greedy MAP of a determinantal point process over each tile's projected tokens, with kernel
    r_i · cos(x_i, x_j) · r_j: a token is taken for its relevance r to the question, less what the
    chosen ones already say.

    Where the paper has CLIP's text tower, a VLM checkpoint has none, and by default r = 1: the
    plain process, which the paper ablates as DPPruner. For the published method pass a
    :class:`ClipRelevance`. ``relevance="text"`` is a substitute of ours from what the model does
    have: the mean cosine between a token after the projector and the embeddings of the prompt's
    text behind its image (of all its text where none follows). Every relevance is stretched to
    (0, 1].

    On tiled models tiles are selected separately, as in the paper; the budget is divided between
    them in proportion to the patches that show the image (in equal parts where all do), and
    newline tokens go. So are the frames of a video. Survivors enter in prompt order. After a
    method that reduces the encoder, all of an image's survivors compete. An image with no more
    patches than ``keep`` is left untouched.

    Args:
        keep: visual tokens per image (count), all its tiles together, or fraction of its patches.
        relevance: "none", r = 1, the plain process; "text", the substitute above; a
            :class:`ClipRelevance`; or any function of an image's tokens
            (:class:`tokprune.engine.contracts.ImageTokens`) that returns a relevance [n] for them.
        scope: "tile" or "image": all tiles of an image in one selection.
        relevance_scope: stretch r over each "image", or, as the official code does, over all
            images of the "call", which lets a batch change a sample's selection.
        theta: in [0, 1): weight of relevance against diversity, r becomes exp(r · θ/(2(1 − θ))).
        centre: "plain" or "standardised" compares tokens around their mean, and multiplies their
            relevance by how unlike all others a token is ("Centering before Pruning",
            arXiv 2608.30263); "none" as CDPruner itself.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.

    Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for
    Token Pruning in MLLMs", NeurIPS 2025, arXiv 2506.10967.
    """

    name = "cdpruner"
    stages = ("after projector",)
    needs = "features (and CLIP's text tower, or text embeddings)"
    paper = "arXiv 2506.10967"
    reads_prompt = "with a relevance"
    presets = (
        *(Preset("llava-1.5", n, {"keep": n}, _PAPER) for n in (128, 64, 32)),
        *(
            Preset("llava-next", 5 * n, {"keep": 5 * n}, f"{_PAPER}; {n} per tile, 5 tiles")
            for n in (128, 64, 32)
        ),
    )
    variants = ({"relevance": "text"}, {"centre": "plain"})

    keep: Budget
    relevance: Relevance = "none"
    scope: Scope = "tile"
    relevance_scope: RelevanceScope = "image"
    theta: float | None = None
    centre: Centre = "none"
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = isinstance(self.relevance, TowerRelevance) or callable(self.relevance)
        if not given and self.relevance not in ("none", "text"):
            raise ValueError(
                f"relevance={self.relevance!r} should be one of 'none', 'text', a ClipRelevance or "
                "a function of ImageTokens"
            )
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"theta={self.theta!r} should be in [0, 1)")

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        observed = isinstance(self.relevance, TowerRelevance)
        return Plan(
            encoder=(self.relevance.stage(facts),) if observed else (),  # type: ignore[union-attr]
            prompt=(DPPStage(self),),
        )

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        left = resolve_keep(self.keep, layout.patches)
        return left if left < layout.patches else layout.count
