"""CDPruner: diverse tokens that the question is about, by a process conditioned on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from tokprune.engine.contracts import (
    ImageTokens,
    ModelFacts,
    Plan,
    Positions,
    PromptStage,
    Selection,
)
from tokprune.methods.base import (
    Budget,
    Method,
    Preset,
    check_choice,
    check_fits,
    check_keep,
    register_method,
    resolve_keep,
)
from tokprune.methods.clip_relevance import TowerRelevance
from tokprune.methods.grid import index_of_cells
from tokprune.operators.cdpruner import minmax_relevance, text_similarity
from tokprune.operators.dpp import dpp_map
from tokprune.operators.pooling import share

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
    them in proportion to the patches that show the picture (in equal parts where all do), and
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
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.

    Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for
    Token Pruning in MLLMs", NeurIPS 2025, arXiv 2506.10967.
    """

    name: ClassVar[str] = "cdpruner"
    stages: ClassVar[tuple[str, ...]] = ("after projector",)
    needs: ClassVar[str] = "features (and CLIP's text tower, or text embeddings)"
    paper: ClassVar[str] = "arXiv 2506.10967"
    presets: ClassVar[tuple[Preset, ...]] = (
        *(Preset("llava-1.5", n, {"keep": n}, _PAPER) for n in (128, 64, 32)),
        *(
            Preset("llava-next", 5 * n, {"keep": 5 * n}, f"{_PAPER}; {n} per tile, 5 tiles")
            for n in (128, 64, 32)
        ),
    )

    keep: Budget
    relevance: Relevance = "none"
    scope: Scope = "tile"
    relevance_scope: RelevanceScope = "image"
    theta: float | None = None
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not isinstance(self.relevance, TowerRelevance) and not callable(self.relevance):
            names = ("none", "text")
            if self.relevance not in names:
                raise ValueError(
                    f"relevance={self.relevance!r} should be one of "
                    f"{', '.join(map(repr, names))}, a ClipRelevance or a function of ImageTokens"
                )
        check_choice(self.scope, "scope", ("tile", "image"))
        check_choice(self.relevance_scope, "relevance_scope", ("image", "call"))
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"theta={self.theta!r} should be in [0, 1)")
        check_choice(self.positions, "positions", ("compact", "preserve"))

    def plan(self, facts: ModelFacts) -> Plan:
        check_fits(self.keep, facts)
        observed = isinstance(self.relevance, TowerRelevance)
        return Plan(
            encoder=(self.relevance.stage(facts),) if observed else (),  # type: ignore[union-attr]
            prompt=(_DPPStage(self),),
        )


class _DPPStage(PromptStage):
    def __init__(self, method: CDPruner) -> None:
        self.method, self.positions = method, method.positions
        self.wants_text = isinstance(method.relevance, str) and method.relevance == "text"

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        answers: list[Selection | None] = [None] * len(images)
        wanted = [resolve_keep(self.method.keep, image.patches) for image in images]
        busy = [i for i, image in enumerate(images) if wanted[i] < image.patches]
        if not busy:
            return answers
        relevance = self.relevance(images)
        parts = {i: self._parts(images[i], wanted[i]) for i in busy}

        # all parts of all images in one run: its many small steps cost the same for any number
        widest = max(rows.shape[1] for rows, _ in parts.values())
        padded = [pad(parts[i][0], (0, widest - parts[i][0].shape[1]), value=-1) for i in busy]
        rows = torch.cat(padded)
        at = [own.clamp(min=0) for own in padded]
        x = torch.cat([images[i].features[own] for i, own in zip(busy, at)])
        r = None
        if relevance is not None:
            r = torch.cat([relevance[i][own] for i, own in zip(busy, at)])
        steps = max(max(budgets) for _, budgets in parts.values())
        chosen = rows.gather(1, dpp_map(x, steps, r, rows >= 0))

        first = 0
        for i in busy:
            budgets = parts[i][1]
            own = [chosen[first + g, :k] for g, k in enumerate(budgets)]
            answers[i] = Selection(torch.cat(own).sort().values)
            first += len(budgets)
        return answers

    def _parts(self, image: ImageTokens, k: int) -> tuple[Tensor, list[int]]:
        """Rows of the image that compete, [parts, N] (−1: none), and the budget of each part."""
        if image.tiles > 1 and self.method.scope == "tile":
            windows = image.windows()
            cells = [(bottom - top) * (right - left) for top, bottom, left, right in windows]
            if sum(cells) == image.patches:  # no encoder stage has dropped any
                grids = [height * width for height, width in image.tile_grids()]
                own = index_of_cells(image).split(grids)
                return pad_sequence(own, batch_first=True, padding_value=-1), share(k, cells)
        return image.patch_rows()[None], [k]

    def relevance(self, images: Sequence[ImageTokens]) -> list[Tensor] | None:
        """r [n] of every image's tokens (newline tokens: of no meaning); None: r = 1."""
        method = self.method
        if isinstance(method.relevance, str) and method.relevance == "none":
            return None
        scores = [self._score(image) for image in images]
        if method.relevance_scope == "image":
            return [
                minmax_relevance(score, ~image.newline, method.theta)
                for score, image in zip(scores, images)
            ]
        counted = torch.cat([~image.newline for image in images])
        together = minmax_relevance(torch.cat(scores), counted, method.theta)
        return list(together.split([image.count for image in images]))

    def _score(self, image: ImageTokens) -> Tensor:
        """Relevance of an image's tokens as it comes, [n]."""
        source = self.method.relevance
        if isinstance(source, TowerRelevance):
            assert image.score is not None
            return image.score
        if not callable(source):
            assert image.text is not None
            return text_similarity(image.features, image.text)
        score = source(image)
        if not isinstance(score, Tensor) or tuple(score.shape) != (image.count,):
            got = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else repr(score)
            raise ValueError(
                f"relevance={source!r} returned {got}; it should be a tensor of shape "
                f"({image.count},), one number per token of the image"
            )
        return score.to(image.features.device)
