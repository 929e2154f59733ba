"""ApET: keep what a small basis of tokens cannot reconstruct, merge the others into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from tokprune.engine.contracts import ModelFacts, Order, Plan
from tokprune.methods.apet.decoder import LayerStage
from tokprune.methods.apet.door import CellStage, TowerStage
from tokprune.methods.base import Preset, check_fits, check_layers_fit, resolve_keep
from tokprune.methods.depth import last_steps
from tokprune.methods.options import AtLeast, Budget, Range, Seed
from tokprune.methods.registry import register_method
from tokprune.methods.tiles import TileMethod, feature_layer
from tokprune.operators.apet import Compressed, WriteBack, compress

_SCRIPT = "ApET, scripts of the official code"
_INFERRED = "ApET: token counts inferred from the scripts for 192 and 64"
_LAYER = 16


@register_method
@dataclass(frozen=True)
class ApET(TileMethod):
    """A few tokens, far from each other, are the basis; they stay, with those that a linear
    combination of them approximates worst, and all others are merged into the most similar of
    the latter. Neither attention nor text is read. Once in every tile or frame before the
    projector, and, with ``decoder_keep``, once more in the image inside the decoder.

    Where the model makes one token of several patches, the first step is at the language-model
    input, on its tokens. Newline tokens go (the official code keeps those of rows on LLaVA-NeXT),
    and patches on padding compete.

    Args:
        keep: tokens of each tile (count), or fraction of its patches.
        decoder_keep: visual tokens of each image after the decoder step, a count or a fraction of
            those that entered the decoder; None: no such step.
        prune_before: decoder layer, 0-based, before which it is made (16: after the 16th).
        basis: size of the basis; at most one less than what stays (the official code fails there).
        start: first token of the basis: "norm", the largest; "first"; "random", drawn from ``seed``
            and the number of tokens (official: anew in every run). The first two are ours.
        seed: of the draw.
        ridge: added to the squared norms of the basis, absolute as the errors are.
        parity: "repaired" keeps the basis at its own places. "official" writes it over the kept
            tokens of least error, which stand for other places.
        order: of the tokens of a tiled image: "spatial", in the places that they had, or
            "published", tile by tile.
        positions: "compact" renumbers the shortened prompt (official), "preserve" keeps the ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image" to share it between the
            most tiles that an image can have.

    A tile or image that has no more tokens than its budget is left alone.

    Source: ApET: Approximation-Error Guided Token Compression for Efficient VLMs, CVPR 2026,
    arXiv 2602.19870.
    """

    name = "apet"
    stages = ("encoder, before projector", "decoder prefill")
    paper = "arXiv 2602.19870"
    without_tower_rows = "merges at the language-model input, not at the feature layer"
    presets = (
        Preset("llava-1.5", 192, {"keep": 288, "decoder_keep": 96}, _SCRIPT),
        Preset("llava-1.5", 128, {"keep": 192, "decoder_keep": 64}, _INFERRED),
        Preset("llava-1.5", 64, {"keep": 96, "decoder_keep": 32}, _SCRIPT),
        Preset(
            "qwen2.5-vl",
            0.2,
            {"keep": 0.3, "decoder_keep": 0.333, "prune_before": 14},
            _SCRIPT + "; 256 to 2048 · 28² pixels; mean over 28 layers",
        ),
    )

    budget_options = frozenset({"keep", "decoder_keep"})
    variants = ({"parity": "official"},)

    decoder_keep: Budget | None = None
    prune_before: Annotated[int, AtLeast(0)] = _LAYER
    basis: Annotated[int, AtLeast(1)] = 10
    start: Literal["norm", "first", "random"] = "norm"
    seed: Seed = 0
    ridge: Annotated[float, Range(0, 1e6, low_open=True)] = 1e-5
    parity: Literal["repaired", "official"] = "repaired"
    order: Order = "spatial"

    @classmethod
    def options_for_depth(cls, decoder_layers: int) -> dict[str, Any]:
        return {name: layers[0] for name, layers in last_steps((_LAYER,), decoder_layers).items()}

    @property
    def stochastic(self) -> bool:
        return self.start == "random"

    def plan(self, facts: ModelFacts) -> Plan:
        decoder: tuple[LayerStage, ...] = ()
        if self.decoder_keep is not None:
            check_fits(self.decoder_keep, facts, name="decoder_keep")
            check_layers_fit(self.prune_before, facts)
            decoder = (LayerStage(self),)
        if facts.tower is None:
            assert self.keep is not None
            check_fits(self.keep, facts)
            return Plan(prompt=(CellStage(self),), decoder=decoder)
        keep = self.tile_budget(facts)
        stills: tuple[TowerStage, ...] = ()
        pools = facts.frame_grid is not None
        if keep < facts.tower.patches:
            stills = (TowerStage(self, feature_layer(facts.tower, self.name), keep, pools),)
        videos = (CellStage(self, videos_only=True),) if pools else ()
        return Plan(encoder=stills, prompt=videos, decoder=decoder)

    def budget(self, cells: int, tiles: int) -> int:
        """Tokens to leave of each of ``tiles`` tiles of an image at the language-model input."""
        assert self.keep is not None
        if self.scope == "image" and isinstance(self.keep, int):
            return min(cells, max(1, self.keep // tiles))
        return resolve_keep(self.keep, cells)

    def compress(self, x: Tensor, keep: int, official: WriteBack) -> Compressed:
        """``keep`` of the tokens [B, N, D]; ``official``: where the official code writes its basis
        at this stage."""
        start = None
        if self.start != "norm":
            first = torch.zeros(1, dtype=torch.long)
            if self.start == "random":  # drawn on the host, so that every device draws the same
                generator = torch.Generator().manual_seed(self.seed)
                first = torch.randint(x.shape[1], (1,), generator=generator)
            start = first.to(x.device, non_blocking=True).expand(len(x))
        back = official if self.parity == "official" else "none"
        return compress(x, keep, self.basis, start, self.ridge, back)
