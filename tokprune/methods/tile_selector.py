"""Base of methods that choose patches of every tile by what the vision encoder shows of them.

The whole of a method that keeps what the class token attends to::

    @register_method
    @dataclass(frozen=True)
    class ByClassToken(TileSelector):
        name = "by-class-token"

        def choose(self, tiles: Tiles, keep: int) -> Tensor:
            return rank(tiles.score)[:, :keep]

Where a tower's rows can change, patches go behind the layer that the model reads, before the
projector. Where the model makes one token of several patches, tokens go at the language-model
input, and what was seen of their patches is averaged. :class:`TileChooser` leaves open what is
looked at, and in which layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokprune.engine.contracts import (
    Attention,
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    Order,
    Plan,
    PromptStage,
    Reduction,
    Selection,
    TowerInput,
    TowerTokens,
)
from tokprune.engine.model import ModelFacts, TowerFacts
from tokprune.methods.anchors import Anchors
from tokprune.methods.base import check_fits, resolve_keep
from tokprune.methods.cells import check_whole, index_of_cells
from tokprune.methods.tiles import TileMethod, feature_layer
from tokprune.methods.tower_rows import (
    Window,
    behind_class_token,
    cells_of,
    check_equal_rows,
    shown_windows,
    stitched_places,
)
from tokprune.operators.visionzip import Score


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of equally many patches, to choose from."""

    #: [B, N, D], any float dtype: what the tower's layer that the model reads gives, before the
    #: projector; where patches are merged after it, the tokens that enter the language model
    features: Tensor
    #: [layers, B, N] float32: what :meth:`TileSelector.look` made of the layers looked at
    scores: Tensor
    #: (height, width) of a tile
    grid: tuple[int, int]
    #: [B, N] long, the cell of each patch on the tile's grid, in raster order
    cells: Tensor

    @property
    def score(self) -> Tensor:
        """Of the last layer looked at, [B, N]."""
        return self.scores[-1]

    def part(self, at: Tensor, window: Window | None) -> tuple[Tiles, Tensor | None]:
        """Some tiles [b], of each the patches in a window (None: all), and which [n] these are."""
        own = self
        if len(at) < len(self.cells):
            own = Tiles(self.features[at], self.scores[:, at], self.grid, self.cells[at])
        if window is None:
            return own, None
        seen = cells_of(window, self.grid[1]).to(self.cells.device, non_blocking=True)
        features, scores = own.features[:, seen], own.scores[:, :, seen]
        return Tiles(features, scores, self.grid, own.cells[:, seen]), seen


@dataclass(frozen=True)
class TileChooser(TileMethod):
    """Keeps ``keep`` patches of every tile; no text, no merging.

    On tiled models the tokens of the base tile enter first, then those of all crops in raster order
    of the stitched image; newline tokens go.

    Args:
        keep: tokens of each tile (count), or fraction of its patches.
        order: on tiled models: "spatial" chooses among the patches that show the image, so a tile
            that shows little keeps less; "published" as the official codes of such methods,
            where padding competes and may be kept.
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image", whose tiles then share it
            equally.
        anchors: the share of an image's budget that goes to tokens which others are merged into, or
            a mapping with the options of :class:`~tokprune.methods.anchors.Anchors`; None: none.
            The choice is then made at the language-model input, and sees the tokens there.
    """

    stages: ClassVar[tuple[str, ...]] = ("encoder, feature layer",)
    without_tower_rows: ClassVar[str] = (
        "chooses at the language-model input, not at the feature layer"
    )

    order: Order = "spatial"
    anchors: Anchors | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchors", Anchors.of(self.anchors))
        super().__post_init__()

    def layers(self, tower: TowerFacts) -> tuple[int, ...]:
        """The encoder layers looked at (0-based), ascending."""
        return (feature_layer(tower, self.name),)

    @abstractmethod
    def look(self, attention: Attention, tokens: TowerTokens) -> Tensor:
        """Of one layer's attention a number [B, N] for every patch, float32."""

    @abstractmethod
    def choose(self, tiles: Tiles, keep: int) -> Tensor:
        """The patches that stay, [B, keep] long in any order, none twice; keep < N."""

    def counts(self, patches: int, tiles_per_image: Sequence[int]) -> list[int]:
        """Patches to keep of every tile, image by image."""
        keep = self.keep
        assert keep is not None
        if self.scope == "tile" or isinstance(keep, float):
            return [resolve_keep(keep, patches)] * sum(tiles_per_image)
        each = [min(patches, max(1, keep // tiles)) for tiles in tiles_per_image]
        return [count for count, tiles in zip(each, tiles_per_image) for _ in range(tiles)]

    def plan(self, facts: ModelFacts) -> Plan:
        tower = facts.need_tower(self.name, whole=False)
        assert self.keep is not None
        if facts.tower is None or self.anchors is not None:
            check_fits(self.keep, facts)
            return Plan(encoder=(_Observer(self, tower),), prompt=(AtInput(self),))
        whole = self.tile_budget(facts) == tower.patches
        stills = (
            () if whole else (_InTower(self, tower, pooled_videos=facts.frame_grid is not None),)
        )
        if facts.frame_grid is None:
            return Plan(encoder=stills)
        watch = stills or (_Observer(self, tower),)
        return Plan(encoder=watch, prompt=(AtInput(self, videos_only=True),))

    def chosen(self, tiles: Tiles, counts: list[int], windows: Sequence[Window | None]) -> Tensor:
        """The patches of every tile that stay, ascending, [B, most]; −1 at the end of tiles that
        keep fewer. ``counts``, ``windows``: of each tile (host)."""
        result = torch.full((len(counts), max(counts)), -1, device=tiles.cells.device)
        groups: dict[tuple[Window | None, int], list[int]] = {}
        for tile, like in enumerate(zip(windows, counts)):
            groups.setdefault(like, []).append(tile)
        for (window, count), members in groups.items():
            at = torch.tensor(members).to(result.device, non_blocking=True)
            own, seen = tiles.part(at, window)
            n = own.cells.shape[1]
            index = torch.arange(n, device=result.device).expand(len(at), n)
            if count < n:
                index = self.choose(own, count).sort(-1).values
            result[at, :count] = index if seen is None else seen[index]
        return result


@dataclass(frozen=True)
class TileSelector(TileChooser):
    """Chooses by the attention of one layer.

    Args:
        score: "cls" looks at the class token's attention; "mean_received" at the mean attention
            that a patch receives from all others, which "cls" means as well where the tower has
            no class token.
        keep, order, positions, scope: as of every :class:`TileChooser`.
    """

    needs: ClassVar[str] = "class-token attention of one layer"
    without_class_token: ClassVar[str] = (
        "the mean attention that a patch receives stands in for the class token's"
    )

    score: Score = "cls"

    def look(self, attention: Attention, tokens: TowerTokens) -> Tensor:
        if tokens.has_cls and self.score == "cls":
            return attention.cls_row().mean(1)[:, 1:]
        return attention.received(others_only=True)[:, tokens.first_patch :]


# ------------------------------------------------------------------------ in the encoder


class _Looking(EncoderRun):
    """Sees the layers."""

    def __init__(self, method: TileChooser) -> None:
        self.method = method
        self.seen: dict[int, tuple[Tensor, TowerTokens]] = {}

    def attention(self, layer: int, attention: Attention, tokens: TowerTokens) -> None:
        self.seen[layer] = self.method.look(attention, tokens), tokens

    def scores(self, tokens: TowerTokens) -> Tensor:
        """[layers, B, T] at the patches of now."""
        return torch.stack([tokens.carry(*self.seen[layer]) for layer in sorted(self.seen)])


class _Observer(EncoderStage):
    """Looks at a tower whose rows do not change."""

    def __init__(self, method: TileChooser, tower: TowerFacts) -> None:
        self.method, self.taps = method, frozenset(method.layers(tower))

    @property
    def share_key(self) -> Hashable:
        look = type(self.method).look
        score = getattr(self.method, "score", None)
        return look.__module__, look.__qualname__, score, *sorted(self.taps)

    def start(self, tower: TowerInput) -> EncoderRun:
        return _Observing(self.method)


class _Observing(_Looking):
    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome(metric=self.scores(tokens).permute(1, 2, 0))


class _InTower(EncoderStage):
    """Drops patches behind the layer that the model reads; of videos whose frames are pooled after
    it, it only looks at them."""

    def __init__(self, method: TileChooser, tower: TowerFacts, pooled_videos: bool) -> None:
        self.method, self.taps = method, frozenset(method.layers(tower))
        self.pooled_videos = pooled_videos
        self.after_layers = frozenset({feature_layer(tower, method.name)})
        self.order, self.positions = method.order, method.new_positions

    @property
    def reduces_videos(self) -> bool:
        return not self.pooled_videos

    def start(self, tower: TowerInput) -> EncoderRun:
        if self.pooled_videos and tower.has_videos:
            return _Observing(self.method)
        return _Dropping(self.method, tower)


class _Dropping(_Looking):
    def __init__(self, method: TileChooser, tower: TowerInput) -> None:
        super().__init__(method)
        self.tower = tower
        #: patches of padding are known to be none of those kept
        self.no_padding = False

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        facts, tower = self.tower.facts, self.tower
        check_equal_rows(tokens, self.method.name)
        first = tokens.first_patch
        patches, cells = hidden[:, first:], tokens.slots[:, first:]
        counts = self.method.counts(patches.shape[1], tower.tiles_per_image)
        if min(counts) == patches.shape[1]:
            return None
        windows: list[Window | None] = [None] * len(counts)
        if facts.tiled and self.method.order == "spatial" and patches.shape[1] == facts.patches:
            windows, self.no_padding = shown_windows(tower), True
            counts = [min(n, _size(window, n)) for n, window in zip(counts, windows)]
        tiles = Tiles(patches, self.scores(tokens), facts.grid, cells)
        index = self.method.chosen(tiles, counts, windows)
        ragged = counts if min(counts) < max(counts) else None
        return behind_class_token(hidden, first, Reduction(index, counts=ragged))

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        unpad = self.method.order == "spatial" and not self.no_padding
        if not self.tower.facts.tiled:
            return EncoderOutcome(unpad=False)
        return EncoderOutcome(key=self._key(tokens), unpad=unpad)

    def _key(self, tokens: TowerTokens) -> Tensor:
        """Sort keys: the base tile, the stitched crops, their class tokens where there are any."""
        facts = self.tower.facts
        block, keys = facts.max_tiles * facts.patches, []
        cells = tokens.slots[:, tokens.first_patch :].clamp(min=0)
        for base, places in stitched_places(cells, self.tower):
            keys += [base, places + block]
        key = torch.cat(keys)
        return pad(key, (1, 0), value=2 * block) if facts.cls_in_features else key


def _size(window: Window | None, n: int) -> int:
    return n if window is None else (window[1] - window[0]) * (window[3] - window[2])


# ------------------------------------------------------------------ language-model input


class AtInput(PromptStage):
    """Drops tokens of models that merge patches behind their tower, and merges them to anchors."""

    def __init__(self, method: TileChooser, videos_only: bool = False) -> None:
        self.method, self.positions, self.videos_only = method, method.new_positions, videos_only

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        return [self._one(image) for image in images]

    def _one(self, image: ImageTokens) -> Selection | None:
        if self.videos_only and not image.video:
            return None
        anchors, grids = self.method.anchors, image.tile_grids()
        sizes = [height * width for height, width in grids]
        counts = [self.method.counts(size, [len(grids)])[0] for size in sizes]
        if counts == sizes:
            return None
        check_whole(image, self.method.name)
        windows: list[Window | None] = [None] * len(grids)
        if sum(sizes) > image.patches:  # the model crops its tiles
            windows = list(image.windows())
            counts = [min(n, _size(window, n)) for n, window in zip(counts, windows)]
        budget = sum(counts)
        if budget == image.patches:
            return None
        if anchors is not None:
            counts = [anchors.chosen(count) for count in counts]
        stay = self._chosen(image, grids, counts, windows)
        if anchors is not None:
            return anchors.merged(image, stay, budget - stay.shape[0], newlines=False)
        return Selection(stay.sort().values, in_order=True)

    def _chosen(
        self, image: ImageTokens, grids: Sequence[tuple[int, int]], counts: Sequence[int],
        windows: Sequence[Window | None],
    ) -> Tensor:  # fmt: skip
        """Tokens that stay [k], so many of every tile, of those that its window shows."""
        places = index_of_cells(image).split([height * width for height, width in grids])
        alike: dict[tuple[int, int], list[int]] = {}
        for tile, grid in enumerate(grids):
            if counts[tile]:
                alike.setdefault(grid, []).append(tile)
        stay = [places[0][:0]]
        for grid, members in alike.items():
            place = torch.stack([places[tile] for tile in members])
            cells = torch.arange(place.shape[1], device=place.device).expand_as(place)
            scores = torch.empty(0, *place.shape, device=place.device)  # nothing was looked at
            at = place.clamp(min=0)
            if image.metric is not None:
                scores = image.metric[at].permute(2, 0, 1)
            tiles = Tiles(image.features[at], scores, grid, cells)
            own = [counts[tile] for tile in members]
            index = self.method.chosen(tiles, own, [windows[tile] for tile in members])
            stay += [place[row, index[row, :count]] for row, count in enumerate(own)]
        return torch.cat(stay)
