"""What is known of each image after the vision encoder: its tokens, their cells, their order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokprune.engine.contracts import ADDED, ImageTokens, TowerFacts, VideoUnit
from tokprune.engine.encoder import TowerPass
from tokprune.errors import UnsupportedVideoError

if TYPE_CHECKING:
    from tokprune.engine.model import ImageLayout, Tiles, TokenGrid

_ATTRIBUTE = "_tokprune_image"


@dataclass(eq=False)
class ImageRecord:
    """One encoded image, from the vision tower to the prompt.

    ``layout`` says how the model packs it. Where an encoder stage reduced it, ``features``
    [k, D] are the projected survivors in the order in which they enter the prompt and ``cell``
    [k] their place ``tile · F + row of the tile`` (−1: the class token, −2: a row that a stage
    added); otherwise both are None and the tokens are the model's own. ``group`` [tiles, N] holds,
    per original patch, the number of the survivor that contains it (−1 dropped), for merges and the
    trace. ``score`` and ``tag``: of every survivor, or of every feature row that can be packed.
    """

    layout: ImageLayout
    facts: TowerFacts | None
    device: torch.device
    features: Tensor | None = None
    cell: Tensor | None = None
    score: Tensor | None = None
    tag: Tensor | None = None
    metric: Tensor | None = None
    group: Tensor | None = None
    #: tokens that each survivor stands for, where attention is rectified
    stands_for: Tensor | None = None
    raw: Tensor | None = None
    newline: Tensor | None = None
    #: rows alive in the tower after each reducing layer: (layer, slots [tiles, T])
    history: list[tuple[int, Tensor]] = field(default_factory=list)
    #: for the same layers: row that held each original patch [tiles, N], −1 dropped
    history_groups: list[Tensor] = field(default_factory=list)
    #: rows that stages added to every tile at the start of the tower, and the layer behind which
    #: they were cut off again (None: a reduction has seen to them)
    added: int = 0
    added_until: int | None = None

    @property
    def count(self) -> int:
        """Prompt tokens the model makes of this image."""
        return len(self.layout.packed)

    @property
    def token_grid(self) -> TokenGrid | None:
        """The grids that its tokens stand on, where they are not those of the tower's tiles."""
        grid = self.layout.token_grid
        return grid if self.cell is None or (grid is not None and grid.nearest is None) else None

    def split(self, video_unit: VideoUnit) -> list[ImageRecord]:
        """A video in the parts that are compressed as one.

        Raises:
            UnsupportedVideoError: its frames were reduced inside the tower, each by itself.
        """
        parts = self.layout.parts(video_unit)
        if len(parts) == 1:
            return [self]
        if self.features is not None:
            raise UnsupportedVideoError(
                f"video_unit={video_unit!r} is for methods at the language-model input and in the "
                "decoder; inside the vision tower every frame is compressed by itself: leave it out"
            )
        records = []
        for part in parts:
            own = replace(self, layout=part)
            for name in ("score", "tag", "metric", "raw"):
                if (value := getattr(self, name)) is not None:
                    frames = value.unflatten(0, (self.layout.frames, -1))
                    frames = frames[part.first_frame : part.first_frame + part.frames]
                    setattr(own, name, frames.flatten(0, 1))
            records.append(own)
        return records

    def tokens(self, embedded: Tensor, columns: Tensor) -> ImageTokens:
        """The image as it stands at the language-model input; ``embedded`` [n, D] are the model's
        own packed features, ``columns`` [n] their prompt columns."""
        facts, packed = self.facts, self.layout.packed.to(self.device)
        if self.features is None:
            cell, features, column = packed, embedded, columns
            score = self._at_cells(self.score, packed)
            tag, metric = self._at_cells(self.tag, packed), self._at_cells(self.metric, packed)
        else:
            assert self.cell is not None
            cell, features = self.cell, self.features
            column = self.places(cell, columns)
            # tokens without a place of their own (class token, cropped cells) stand at the start,
            # added ones at the end
            start = columns[0]
            if self.added:
                start = torch.where(cell == ADDED, columns[-1], start)
            column = torch.where(column < 0, start, column)
            score, tag, metric = self.score, self.tag, None
        newline = cell < 0 if self.features is None else torch.zeros_like(cell, dtype=torch.bool)
        token_grid, tiles, grids = self.token_grid, self.layout.tiles, None
        width: Tensor | int
        if token_grid is None:
            assert facts is not None
            grid, width, per_tile = facts.grid, facts.grid[1], facts.tokens_per_tile
            tile, patch = cell // per_tile, cell % per_tile - int(facts.cls_in_features)
        else:
            grid, tiles = token_grid.grids[0], len(token_grid.grids)
            grids = token_grid.grids if len(set(token_grid.grids)) > 1 else None
            tile, patch, width = _on_grids(cell, token_grid.grids)
        off_grid = (cell < 0) | (patch < 0)
        return ImageTokens(
            features=features,
            tile=torch.where(cell < 0, -1, tile),
            row=torch.where(off_grid, -1, patch // width),
            col=torch.where(off_grid, -1, patch % width),
            column=column,
            newline=newline,
            patches=int((self.layout.packed >= 0).sum())
            if self.features is None
            else features.shape[0],
            tiles=tiles,
            grid=grid,
            original=self.count,
            score=score,
            tag=tag,
            metric=metric,
            stands_for=self.stands_for,
            raw=self.raw if self.features is None else None,
            newline_feature=self.newline,
            size=self.layout.size,
            tile_grid=self.layout.tile_grid,
            frames=self.layout.frames,
            video=self.layout.video,
            grids=grids,
        )

    def places(self, cell: Tensor, values: Tensor) -> Tensor:
        """What ``values`` [n], one per packed prompt token, say of the feature rows ``cell``
        (any shape); −1 for the class token and for rows that the packing crops away."""
        token_grid = self.layout.token_grid
        if token_grid is not None:
            if token_grid.nearest is not None:
                nearest = token_grid.nearest.to(self.device)
                cell = torch.where(cell < 0, -1, nearest[cell.clamp(min=0)])
            rows = sum(height * width for height, width in token_grid.grids)
        else:
            assert self.facts is not None
            rows = self.layout.tiles * self.facts.tokens_per_tile
        place = torch.full((rows + 1,), -1, device=self.device)
        # newline tokens (−1) write into the spare last entry
        place[self.layout.packed.to(self.device)] = values
        return torch.where(cell < 0, -1, place[cell.clamp(min=0)])

    def _at_cells(self, values: Tensor | None, packed: Tensor) -> Tensor | None:
        """Per-feature values [tiles · F] at packed places; newline tokens get 0."""
        if values is None:
            return None
        taken = values[packed.clamp(min=0)]
        off = (packed < 0).view(-1, *[1] * (taken.dim() - 1))
        return torch.where(off, torch.zeros_like(taken), taken)


def _on_grids(
    cell: Tensor, grids: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Tile, cell of the tile and width of its grid, for cells numbered one grid after the other."""
    sizes = [height * width for height, width in grids]
    if len(set(grids)) == 1:
        return cell // sizes[0], cell % sizes[0], grids[0][1]
    starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
    widths = torch.tensor([width for _, width in grids])
    both = torch.stack([starts, widths]).to(cell.device, non_blocking=True)
    tile = (cell[:, None] >= both[0]).sum(1).sub(1).clamp(min=0)
    return tile, cell - both[0][tile], both[1][tile]


@dataclass(frozen=True)
class Encoding:
    """What is known of the images or videos of one encoder call: ``images`` (or tiles), how many
    entries its features have, and the records of the images when these are known. Features that
    are copied share it; those that are saved go without."""

    images: list[ImageLayout] | Tiles
    entries: int
    records: Callable[[list[ImageLayout]], list[ImageRecord]]

    def __deepcopy__(self, memo: object) -> Encoding:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # nothing, and torch.load(weights_only=True) takes it


def attach(output: Any, encoding: Encoding) -> None:
    """Let what is known of the images travel with the output that holds their features (through
    ``generate``, beams, …), where it is an object that can carry it; the features carry it, too, as
    accelerate's hooks make outputs anew."""
    if not isinstance(output, tuple | list | Tensor):
        for carrier in (output, _first(output)):
            setattr(carrier, _ATTRIBUTE, encoding)


def _first(output: Any) -> Any:
    """The features of an output, the first where they are several tensors."""
    features = output.pooler_output
    return features[0] if isinstance(features, tuple | list) and features else features


def attached(output: Any) -> tuple[Encoding, int] | None:
    """What travels with an output, and how many copies of each prompt share its images; None where
    nothing does."""
    encoding: Encoding | None = getattr(output, _ATTRIBUTE, None)
    if not encoding and not isinstance(output, tuple | list | Tensor):
        encoding = getattr(_first(output), _ATTRIBUTE, None)
    if not encoding:
        return None
    return encoding, max(1, len(output.pooler_output) // max(1, encoding.entries))


def build_records(
    layouts: list[ImageLayout],
    tower: TowerPass,
    projected: Tensor,
    newline: Tensor | None,
    spatial: bool,
    want_raw: bool,
) -> list[ImageRecord]:
    """Records of all images of one encoder call.

    Args:
        projected: projector output [tiles, T, D], as the projector made it.
        spatial: survivors of an encoder stage enter by prompt place instead of published order.
        want_raw: keep the unpacked projector output for prompt stages that pool it.
    """
    device, facts = projected.device, tower.tower.facts
    records = [
        ImageRecord(
            layout, facts, device, newline=newline, added=tower.added,
            added_until=tower.added_until,
        )
        for layout in layouts
    ]  # fmt: skip
    tile_of = [0]
    for layout in layouts:
        tile_of.append(tile_of[-1] + layout.tiles)
    if want_raw and not tower.reduced:
        for i, record in enumerate(records):
            record.raw = projected[tile_of[i] : tile_of[i + 1]]
    score = next((o.score for o in tower.outcomes if o.score is not None), None)
    tag = next((o.tag for o in tower.outcomes if o.tag is not None), None)
    if not tower.reduced:
        metric = next((o.metric for o in tower.outcomes if o.metric is not None), None)
        cls = int(facts.cls_in_features)
        for i, record in enumerate(records):
            tiles = slice(tile_of[i], tile_of[i + 1])
            for name, value in (("score", score), ("tag", tag), ("metric", metric)):
                if value is None:
                    continue
                own = value[tiles]
                if (token_grid := record.layout.token_grid) is not None:
                    mean = token_grid.mean
                    assert mean is not None
                    own = mean(own.float())
                    # a cell is marked where one of its patches is
                    own = own > 0 if name == "tag" else own
                else:
                    own = torch.cat([torch.zeros_like(own[:, :cls]), own], dim=1)
                    own = own[:, : facts.tokens_per_tile].flatten(0, 1)
                setattr(record, name, own.to(device))
        return records
    for i, record in enumerate(records):
        tiles = slice(tile_of[i], tile_of[i + 1])
        _fill_reduced(record, tower, tiles, projected[tiles], score, tag, spatial)
    return records


def _fill_reduced(
    record: ImageRecord,
    tower: TowerPass,
    tiles: slice,
    projected: Tensor,
    score: Tensor | None,
    tag: Tensor | None,
    spatial: bool,
) -> None:
    """Order and place the survivors of one image's tiles."""
    facts, device = tower.tower.facts, record.device
    tokens = tower.tokens
    outcome = next((o for o, r in zip(tower.outcomes, tower.stages) if r.reduces), None)
    drop_cls = tower.cut_rows
    slots = tokens.slots[tiles].to(device)
    valid = None if tokens.valid is None else tokens.valid[tiles].to(device)
    counts = tokens.counts[tiles]
    slots, valid = slots[:, drop_cls:], None if valid is None else valid[:, drop_cls:]
    number, rows = slots.shape
    tile = torch.arange(number, device=device)[:, None].expand(number, rows)
    offset = int(facts.cls_in_features)
    in_tile = slots + offset  # the class token (slot −1) has row 0 where the model keeps it
    cell = torch.where(in_tile < 0, -1, tile * facts.tokens_per_tile + in_tile)
    if tower.added:
        cell = torch.where(slots == ADDED, ADDED, cell)
    key = None if outcome is None or outcome.key is None else outcome.key[tiles].to(device)
    if key is None:
        key = torch.arange(number * rows, device=device).view(number, rows)

    at = record.places(cell, torch.arange(record.count, device=device))
    if spatial:
        # tokens without a prompt place come last, in their published order
        key = torch.where(at < 0, record.count + key, at)
    alive = torch.ones_like(cell, dtype=torch.bool) if valid is None else valid.clone()
    total = sum(c - drop_cls for c in counts)
    if (outcome is None or outcome.unpad) and facts.tiled:
        # Rows on cells that the packing crops away are lost: how many is the image's secret.
        alive &= (at >= 0) | (cell < 0)
        total = int(alive.sum())
    flat_key = torch.where(alive, key, torch.iinfo(torch.long).max).flatten()
    order = flat_key.argsort(stable=True)[:total]
    record.features = projected.flatten(0, 1)[order]
    record.cell = cell.flatten()[order]
    for name, value in (("score", score), ("tag", tag)):
        if value is not None:
            own = value[tiles].to(device)
            own = torch.cat([torch.zeros_like(own[:, :offset]), own], dim=1)
            setattr(record, name, own.flatten()[order])
    if tokens.size is not None:
        own = tokens.size[tiles].to(device)[:, drop_cls:] / facts.merges**2
        if offset:
            own[:, 0] = 1.0
        record.stands_for = own.flatten()[order]
    # which survivor holds each original patch
    number_of = torch.full((number * rows + 1,), -1, device=device)
    number_of[order] = torch.arange(total, device=device)
    group = tokens.group[tiles].to(device)
    row = torch.where(group < 0, number * rows, tile[:, :1] * rows + group - drop_cls)
    number_of[-1] = -1
    record.group = number_of[row.clamp(max=number * rows)]
    record.history = [(layer, t.slots[tiles][:, t.first_patch :]) for layer, t in tower.history]
    record.history_groups = [t.group[tiles] - t.first_patch for _, t in tower.history]
