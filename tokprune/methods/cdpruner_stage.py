"""What CDPruner does at the language-model input: relevance, and the process on every tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from tokprune.engine.contracts import ImageTokens, PromptStage, Selection
from tokprune.methods.base import resolve_keep
from tokprune.methods.cells import index_of_cells
from tokprune.methods.centring import centred
from tokprune.methods.clip_relevance import TowerRelevance
from tokprune.operators.cdpruner import minmax_relevance, text_similarity
from tokprune.operators.dpp import dpp_map
from tokprune.operators.pooling import share

if TYPE_CHECKING:
    from tokprune.methods.cdpruner import CDPruner


class DPPStage(PromptStage):
    def __init__(self, method: CDPruner) -> None:
        self.method, self.positions = method, method.new_positions
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
        x, weight = centred(x, self.method.centre, rows >= 0)
        if weight is not None:
            r = weight if r is None else r * weight
        chosen = rows.gather(1, dpp_map(x, steps, r, rows >= 0))

        first = 0
        for i in busy:
            budgets = parts[i][1]
            own = [chosen[first + g, :k] for g, k in enumerate(budgets)]
            answers[i] = Selection(torch.cat(own).sort().values, in_order=True)
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
