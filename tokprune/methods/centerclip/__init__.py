"""CenterCLIP: the tokens of a segment of frames, or of an image, become cluster medoids."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tokprune.engine.contracts import Plan
from tokprune.engine.model import ImageLayout, ModelFacts, TowerFacts
from tokprune.methods.base import check_fits, resolve_keep
from tokprune.methods.centerclip.prompt import SegmentStage
from tokprune.methods.centerclip.tower import TowerStage
from tokprune.methods.options import AtLeast, Budget, is_number
from tokprune.methods.registry import register_method
from tokprune.methods.tiles import TileMethod, feature_layer
from tokprune.operators.kmedoids import Distance
from tokprune.operators.segments import Aggregate, Clusterer
from tokprune.operators.spectral_clustering import Graph


def _order(value: Any, name: str) -> None:
    """Of a Minkowski distance."""
    number = is_number(value) or (isinstance(value, float) and value == math.inf)
    if not (number and value > 0):
        raise ValueError(f"{name}={value!r} should be a number above 0 (inf included)")


@register_method
@dataclass(frozen=True)
class CenterCLIP(TileMethod):
    """Cluster the tokens of a segment and keep the medoids: real tokens, in their order.

    A video is cut into segments of consecutive frames, whose tokens are clustered together; the
    last segment takes the frames that are left over. Its clusters are always found at the
    language-model input: video models pool the frames on the way there. A still image is one
    segment, and every tile of a tiled one a segment of its own; cells of padding take no part and
    go. Text-agnostic and deterministic.

    Inside the tower ("tower", "encoder") newline tokens of tiled images go; at the
    language-model input they, and class tokens, stay and are not counted.

    Args:
        keep: tokens of each video, shared evenly between its segments, or of each tile of a still
            image; a count or a fraction.
        segments: S of a video; fewer where it has fewer frames, or ``keep`` fewer tokens.
        place: where still images are clustered (always at the language-model input on models that
            merge patches after the tower): "tower", right after the layer that the model
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
        order: of the tokens of tiled images clustered inside the tower: "published" (tile by
            tile) or "spatial".
        positions: "compact" renumbers the shortened prompt, "preserve" keeps the original ids.
        scope: what ``keep`` counts on tiled models: "tile", or "image" to share it between the
            most tiles that an image can have.

    Source: Zhao et al., "CenterCLIP: Token Clustering for Efficient Text-Video Retrieval", SIGIR
    2022, arXiv 2205.00823. The paper fine-tunes CLIP for retrieval and has no numbers for
    language models, so there are no presets.
    """

    name = "centerclip"
    stages = ("encoder, feature layer (videos: after projector)",)
    paper = "arXiv 2205.00823"
    without_tower_rows = (
        "clusters after the projector, not at the layer that the features are read from"
    )
    without_tower = ({"place": "projector"},)
    variants = ({"algorithm": "spectral"}, {"place": "encoder"}, {"aggregate": "mean"})

    keep: Budget = field()  # not optional, as it is in the base
    segments: Annotated[int, AtLeast(1)] = 4
    place: Literal["tower", "encoder", "projector"] = "tower"
    layer: Annotated[int, AtLeast(1)] | None = None
    algorithm: Literal["kmedoids", "spectral"] = "kmedoids"
    aggregate: Aggregate | None = None
    distance: Distance = "euclidean"
    p: Annotated[float, _order] = 2.0
    iterations: Annotated[int, AtLeast(1)] = 10
    graph: Graph = "knn"
    sigma: float | None = None
    neighbours: Annotated[int, AtLeast(1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.place != "encoder":
            raise ValueError(
                f"layer={self.layer} belongs to place='encoder'; place is {self.place!r}"
            )
        self.clusterer()

    def clusterer(self) -> Clusterer:
        return Clusterer(
            self.algorithm, self.distance, self.p, iterations=self.iterations, graph=self.graph,
            sigma=self.sigma, neighbours=self.neighbours,
        )  # fmt: skip

    def plan(self, facts: ModelFacts) -> Plan:
        if facts.tower is None:
            if self.place == "encoder" or self.scope == "image":
                facts.need_tower(f"centerclip with place={self.place!r}, scope={self.scope!r}")
            check_fits(self.keep, facts)  # type: ignore[arg-type]
            return Plan(prompt=(SegmentStage(self, None),))
        tower = facts.tower
        if facts.videos and isinstance(self.keep, int):
            # counted for a video, it may be more than an image has
            budget = min(self.keep, tower.patches)
        else:
            budget = self.tile_budget(facts)
        whole = budget == tower.patches
        at_input = (SegmentStage(self, budget),)
        if self.place == "projector":
            return Plan(prompt=() if whole and not facts.videos else at_input)
        videos = at_input if facts.videos else ()
        layer = feature_layer(tower, "CenterCLIP")
        if self.place == "encoder":
            layer = self._first_layer(tower, layer) - 1
        return Plan(encoder=() if whole else (TowerStage(self, layer, budget),), prompt=videos)

    def fixed_count(self, facts: ModelFacts, layout: ImageLayout) -> int | None:
        tower = facts.tower
        if tower is None or tower.tiled or tower.cls_in_features:
            return None  # padding, newline and class tokens have rules of their own
        return resolve_keep(self.keep, tower.patches)  # type: ignore[arg-type]

    def _first_layer(self, facts: TowerFacts, last: int) -> int:
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
