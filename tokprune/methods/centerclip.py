"""CenterCLIP: the tokens of a segment of frames, or of a picture, become cluster medoids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokprune.engine.contracts import (
    EncoderOutcome,
    EncoderRun,
    EncoderStage,
    ImageTokens,
    ModelFacts,
    Order,
    Plan,
    Positions,
    PromptStage,
    Reduction,
    Selection,
    TowerInput,
    TowerTokens,
)
from tokprune.errors import UnsupportedVideoError
from tokprune.methods.base import (
    Budget,
    Method,
    check_choice,
    check_keep,
    register_method,
    resolve_keep,
)
from tokprune.methods.grid import index_of_cells, keep_on_grid
from tokprune.methods.merge_stage import Scope, last_merging_layer, tile_budget
from tokprune.operators.anyres import tile_windows
from tokprune.operators.kmedoids import Distance
from tokprune.operators.segments import (
    Aggregate,
    Clusterer,
    cluster_means,
    segment_bounds,
    segment_budgets,
)
from tokprune.operators.spectral_clustering import Graph

Place = Literal["tower", "encoder", "projector"]


@register_method
@dataclass(frozen=True)
class CenterCLIP(Method):
    """Cluster the tokens of a segment and keep the medoids: real tokens, in their order.

    A video is cut into segments of consecutive frames, whose tokens are clustered together; the
    last segment takes the frames that are left over. Its clusters are always found at the
    language-model input: video models pool the frames on the way there. A still picture is one
    segment, and every tile of a tiled one a segment of its own; cells of padding take no part and
    go. Text-agnostic and deterministic.

    Inside the tower ("tower", "encoder") newline tokens of tiled pictures go; at the
    language-model input they, and class tokens, stay and are not counted.

    Args:
        keep: tokens of each video, shared evenly between its segments, or of each tile of a still
            picture; a count or a fraction.
        segments: S of a video; fewer where it has fewer frames, or ``keep`` fewer tokens.
        place: where still pictures are clustered: "tower", right after the layer that the model
            reads (no fine-tuning needed); "encoder", before encoder layer ``layer`` (the paper's,
            meant for fine-tuned towers; stills only, see :func:`tokprune.reduce_frames` for
            videos); "projector", at the language-model input.
        layer: for "encoder": 0-based layer that first sees the medoids; None: ⌈L/2⌉ of L layers.
        algorithm: "kmedoids" (k-medoids++ with a deterministic start) or "spectral" (slower; on
            CUDA its eigensolver waits for the device).
        aggregate: None keeps the medoids as they are; "mean" averages each cluster.
        distance: "euclidean" or "cosine".
        p: order of the Minkowski distance; 1 in two released checkpoints.
        iterations: most rounds of k-medoids.
        graph: of "spectral": "knn" (published) or "heat".
        sigma: of "spectral": width of the Gaussian weights; 2.0 is published, for CLIP-B inside.
            None: half the root mean square of the distances, which suits any features.
        neighbours: of the "knn" graph; None: 5 per frame, and 5 more for frames of 100 tokens on.
        order: of the tokens of tiled pictures clustered inside the tower: "published" (tile by
            tile) or "spatial".
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image" to share it between the
            most tiles that an image can have.

    Source: Zhao et al., "CenterCLIP: Token Clustering for Efficient Text-Video Retrieval", SIGIR
    2022, arXiv 2205.00823. The paper fine-tunes CLIP for retrieval and has no numbers for
    language models, so there are no presets.
    """

    name: ClassVar[str] = "centerclip"
    stages: ClassVar[tuple[str, ...]] = ("encoder, feature layer (videos: after projector)",)
    needs: ClassVar[str] = "features"
    paper: ClassVar[str] = "arXiv 2205.00823"

    keep: Budget
    segments: int = 4
    place: Place = "tower"
    layer: int | None = None
    algorithm: Literal["kmedoids", "spectral"] = "kmedoids"
    aggregate: Aggregate | None = None
    distance: Distance = "euclidean"
    p: float = 2.0
    iterations: int = 10
    graph: Graph = "knn"
    sigma: float | None = None
    neighbours: int | None = None
    order: Order = "published"
    positions: Positions = "compact"
    scope: Scope = "tile"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        _check_whole("segments", self.segments, 1)
        check_choice(self.place, "place", get_args(Place))
        if self.layer is not None:
            _check_whole("layer", self.layer, 1)
            if self.place != "encoder":
                raise ValueError(
                    f"layer={self.layer} belongs to place='encoder'; place is {self.place!r}"
                )
        check_choice(self.algorithm, "algorithm", ("kmedoids", "spectral"))
        check_choice(self.aggregate, "aggregate", (None, "mean"))
        check_choice(self.order, "order", ("published", "spatial"))
        check_choice(self.positions, "positions", ("compact", "preserve"))
        check_choice(self.scope, "scope", ("tile", "image"))
        self.clusterer()

    def clusterer(self) -> Clusterer:
        return Clusterer(
            self.algorithm, self.distance, self.p, iterations=self.iterations, graph=self.graph,
            sigma=self.sigma, neighbours=self.neighbours,
        )  # fmt: skip

    def plan(self, facts: ModelFacts) -> Plan:
        if facts.videos and isinstance(self.keep, int):
            # counted for a video, it may be more than a picture has
            budget = min(self.keep, facts.patches)
        else:
            budget = tile_budget(self.keep, facts, self.scope)
        after_projector = _InputStage(self, budget)
        if self.place == "projector":
            whole = budget == facts.patches and not facts.videos
            return Plan() if whole else Plan(prompt=(after_projector,))
        after = last_merging_layer(facts, "CenterCLIP")
        if self.place == "encoder":
            after = self._layer(facts, after) - 1
        if budget == facts.patches:
            return Plan(prompt=(after_projector,)) if facts.videos else Plan()
        stage = _TowerStage(self, after, budget)
        return Plan(encoder=(stage,), prompt=(after_projector,) if facts.videos else ())

    def _layer(self, facts: ModelFacts, last: int) -> int:
        """First encoder layer that sees the medoids.

        Raises:
            ValueError: the model does not read what that layer makes.
        """
        if self.layer is None:
            return max(1, min(-(-facts.encoder_layers // 2), last))
        if self.layer > last:
            raise ValueError(
                f"layer={self.layer} comes after layer {last}, whose output this model reads; it "
                f"should be from 1 to {last} (or place='tower')"
            )
        return self.layer


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} should be a whole number of at least {least}")


#: (top, bottom, left, right) of the cells of a tile that show the picture
Window = tuple[int, int, int, int]


def window_cells(window: Window, width: int) -> Tensor:
    """Raster cells inside a window of a tile that is ``width`` cells wide: [n] long, ascending."""
    top, bottom, left, right = window
    return (torch.arange(top, bottom)[:, None] * width + torch.arange(left, right)).flatten()


# ------------------------------------------------------------------------- in the tower


class _TowerStage(EncoderStage):
    def __init__(self, method: CenterCLIP, layer: int, budget: int) -> None:
        self.method, self.budget, self.clusterer = method, budget, method.clusterer()
        self.after_layers = frozenset({layer})
        self.order, self.positions = method.order, method.positions

    @property
    def reduces_videos(self) -> bool:
        return False  # their clusters are found at the language-model input

    def start(self, tower: TowerInput) -> EncoderRun:
        if tower.has_videos and self.method.place == "encoder":
            raise UnsupportedVideoError(
                "place='encoder' clusters still pictures; for a video use place='tower' or "
                "'projector' (or tokprune.reduce_frames on a CLIP model)"
            )
        return _TowerRun(self, tower)


class _TowerRun(EncoderRun):
    def __init__(self, stage: _TowerStage, tower: TowerInput) -> None:
        self.stage, self.tower = stage, tower

    def after(self, layer: int, hidden: Tensor, tokens: TowerTokens) -> Reduction | None:
        if self.tower.has_videos:
            return None
        windows = self._windows(hidden.shape[0])
        height, width = self.tower.facts.grid
        if all(window == (0, height, 0, width) for window in windows):
            return self._whole(hidden, tokens.first_patch)
        return self._windowed(hidden, windows, tokens.first_patch)

    def _windows(self, tiles: int) -> list[Window]:
        """Of every tile, the cells that show the picture."""
        tower, grid = self.tower, self.tower.facts.grid
        if not tower.tile_grids:
            return [(0, grid[0], 0, grid[1])] * tiles
        sizes = tower.sizes or (None,) * len(tower.tile_grids)
        shown = [tile_windows(grid, across, size) for across, size in zip(tower.tile_grids, sizes)]
        return [window for image in shown for window in image]

    def _whole(self, hidden: Tensor, first: int) -> Reduction:
        patches = hidden[:, first:]
        found = self.stage.clusterer(patches, self.stage.budget)
        lead = torch.arange(first, device=hidden.device).expand(hidden.shape[0], first)
        rows = torch.cat([lead, found.medoids + first], dim=1)
        if self.stage.method.aggregate is None:
            return Reduction(rows)
        return Reduction(
            rows,
            torch.cat([hidden[:, :first], cluster_means(patches, found)], dim=1),
            torch.cat([lead, found.assign + first], dim=1),
        )

    def _windowed(self, hidden: Tensor, windows: list[Window], first: int) -> Reduction:
        """Tiles that are padded in different ways keep different numbers."""
        stage, width = self.stage, self.tower.facts.grid[1]
        alike: dict[Window, list[int]] = {}
        for number, window in enumerate(windows):
            alike.setdefault(window, []).append(number)
        cells = {window: window_cells(window, width) for window in alike}
        kept = {window: min(stage.budget, len(cells[window])) for window in alike}
        counts = [first + kept[window] for window in windows]
        tiles, length, device = hidden.shape[0], hidden.shape[1], hidden.device
        lead = torch.arange(first, device=device)
        rows = lead.new_full((tiles, max(counts)), -1)
        group = lead.new_full((tiles, length), -1)
        rows[:, :first] = group[:, :first] = lead
        merged = hidden[:, : max(counts)].clone()
        for window, members in alike.items():
            k = kept[window]
            if k == 0:
                continue
            tile = torch.tensor(members).to(device, non_blocking=True)
            at = cells[window].to(device, non_blocking=True) + first
            patches = hidden[tile[:, None], at]
            found = stage.clusterer(patches, k)
            rows[tile, first : first + k] = at[found.medoids]
            if stage.method.aggregate == "mean":
                merged[tile, first : first + k] = cluster_means(patches, found)
                group[tile[:, None], at] = found.assign + first
        ragged = counts if min(counts) < max(counts) else None
        if stage.method.aggregate == "mean":
            return Reduction(rows, merged, group, ragged)
        return Reduction(rows, counts=ragged)

    def finish(self, tokens: TowerTokens) -> EncoderOutcome:
        return EncoderOutcome(unpad=False)  # no survivor is on padding


# ------------------------------------------------------------------- at the language-model input


@dataclass(frozen=True)
class _Segment:
    """Part of an image: where its ``size`` tokens stand [size], and how many of them stay."""

    image: int
    tokens: Tensor
    size: int
    frames: int
    keep: int


@dataclass(frozen=True)
class _Found:
    """Clusters of a segment: tokens of the image that ``stay`` [k], that each token of the segment
    has its ``home`` in [n], and the clusters' ``mean`` [k, d] where wanted."""

    segment: _Segment
    stay: Tensor
    home: Tensor
    mean: Tensor


class _InputStage(PromptStage):
    """Still pictures only with place="projector"; videos always."""

    def __init__(self, method: CenterCLIP, budget: int) -> None:
        self.method, self.budget, self.clusterer = method, budget, method.clusterer()
        self.positions = method.positions

    def select(self, images: Sequence[ImageTokens]) -> list[Selection | None]:
        parts = [self._segments(number, image) for number, image in enumerate(images)]
        alike: dict[tuple[int, int, int], list[_Segment]] = {}
        for part in parts:
            if all(segment.keep == segment.size for segment in part):
                continue
            for segment in part:
                if segment.size:
                    key = (segment.size, segment.frames, segment.keep)
                    alike.setdefault(key, []).append(segment)
        chosen: dict[int, list[_Found]] = {}
        for (_, frames, keep), segments in alike.items():  # segments of one size together
            x = torch.stack([images[s.image].features[s.tokens] for s in segments])
            found = self.clusterer(x, keep, frames)
            means = cluster_means(x, found) if self.method.aggregate == "mean" else x[:, :0]
            for segment, medoids, assign, mean in zip(segments, found.medoids, found.assign, means):
                stay = segment.tokens[medoids]
                one = _Found(segment, stay, stay[assign], mean)
                chosen.setdefault(segment.image, []).append(one)
        answers: list[Selection | None] = [None] * len(images)
        for number, own in chosen.items():
            answers[number] = self._answer(images[number], own)
        return answers

    def _segments(self, number: int, image: ImageTokens) -> list[_Segment]:
        if image.video:
            return self._of_video(number, image)
        return self._of_still(number, image) if self.method.place == "projector" else []

    def _of_video(self, number: int, image: ImageTokens) -> list[_Segment]:
        n = image.grid[0] * image.grid[1]
        keep = resolve_keep(self.method.keep, image.frames * n)
        bounds = segment_bounds(image.frames, min(self.method.segments, image.frames, keep))
        budgets = segment_budgets(keep, [(stop - start) * n for start, stop in bounds])
        place = index_of_cells(image)
        return [
            _Segment(number, place[start * n : stop * n], (stop - start) * n, stop - start, own)
            for (start, stop), own in zip(bounds, budgets)
        ]

    def _of_still(self, number: int, image: ImageTokens) -> list[_Segment]:
        place = index_of_cells(image)
        segments, start = [], 0
        for (height, width), window in zip(image.tile_grids(), image.windows()):
            cells = window_cells(window, width) + start
            start += height * width
            tokens = place[cells.to(place.device, non_blocking=True)]
            keep = min(self.budget, len(cells))
            segments.append(_Segment(number, tokens, len(cells), 1, keep))
        return segments

    def _answer(self, image: ImageTokens, parts: list[_Found]) -> Selection:
        """Medoids and tokens off the grid (newline, class token), in prompt order."""
        stay = torch.cat([part.stay for part in parts])
        dropped = sum(part.segment.size - part.segment.keep for part in parts)
        index = keep_on_grid(image, stay, dropped)
        if self.method.aggregate is None:
            return Selection(index)
        features = image.features.clone()
        row_of = torch.full_like(image.column, -1)
        row_of[index] = torch.arange(len(index), device=index.device)
        group = row_of.clone()
        for part in parts:
            features[part.stay] = part.mean
            group[part.segment.tokens] = row_of[part.home]
        return Selection(index, features[index], group)
