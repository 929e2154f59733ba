"""Who survived: the original tokens behind each stage of a recorded prefill, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tokprune.engine.contracts import ADDED

if TYPE_CHECKING:
    from tokprune.engine.contracts import TowerFacts
    from tokprune.engine.drops import Drop
    from tokprune.engine.images import ImageRecord
    from tokprune.trace import ImageTrace, PrefillTrace

#: (tile, row, col) of a patch; tile 0 is the base image. In a video the tile is the number of the
#: frame, on the grid of its pooled cells; the map that a model shrinks all crops to is tile 1.
#: Where no stage works inside the encoder, cells and tiles are those of the language-model input
Cell: TypeAlias = "tuple[int, int, int]"
Kind: TypeAlias = 'Literal["patch", "newline", "class", "added"]'


@dataclass(frozen=True)
class Token:
    """A visual token alive at some stage, named by where it comes from.

    ``image``: number of the image inside its prompt (each part of a video that is compressed as one
    is an image); ``tile``, ``row``, ``col``: its patch, −1
    for newline, class and added tokens (and for prompts given as embeddings); ``column``: prompt
    column, −1 where the model's packing gives it none; ``sources``: every patch merged into it, its
    own included (empty for newline, class and added tokens).
    """

    image: int
    tile: int
    row: int
    col: int
    column: int
    kind: Kind = "patch"
    sources: tuple[Cell, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "image": self.image,
            "tile": self.tile,
            "row": self.row,
            "col": self.col,
            "column": self.column,
        }
        if self.kind != "patch":
            entry["kind"] = self.kind
        if self.sources != ((self.tile, self.row, self.col),):
            entry["sources"] = [list(c) for c in self.sources]
        return entry


@dataclass(frozen=True)
class StageTokens:
    """Tokens of one image alive at a stage; ``layers``: the encoder layer that reduced, twice; the
    first and last of a run of decoder layers, None for the prompt."""

    stage: Literal["encoder", "prompt", "decoder"]
    layers: tuple[int, int] | None
    tokens: list[Token]

    @property
    def merged(self) -> bool:
        return any(len(t.sources) > 1 for t in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "layers": None if self.layers is None else list(self.layers),
            "count": len(self.tokens),
            "tokens": [t.to_dict() for t in self.tokens],
        }


def cells_of_tile(record: ImageRecord) -> tuple[int, int]:
    """(height, width) of the grid of cells of an image's first tile or frame."""
    if record.token_grid is not None:
        return record.token_grid.grids[0]
    return tower_of(record).grid


def tower_of(record: ImageRecord) -> TowerFacts:
    """Facts of the tower whose patches the tokens of an image are named by."""
    assert record.facts is not None
    return record.facts


def original_cells(record: ImageRecord) -> list[Cell]:
    """Patches that the model's own packing puts into the prompt, in prompt order."""
    places = _Places(record)
    numbers = record.layout.packed.tolist()
    if places.nearest is not None:
        numbers = [patch for patch, cell in enumerate(places.nearest) if cell >= 0]
    return [cell for number in numbers if (cell := places.cell(number)) is not None]


class _Places:
    """From numbers of feature rows to cells."""

    def __init__(self, record: ImageRecord) -> None:
        self.record, self.first_frame = record, record.layout.first_frame
        #: grids on which the rows are numbered, where they are not those of the tower's tiles
        self.grids = None if record.token_grid is None else record.token_grid.grids
        #: cell at the language-model input that shows each patch, for survivors of the tower where
        #: the two differ
        self.nearest: list[int] | None = None
        if record.layout.token_grid is not None and record.token_grid is None:
            assert record.layout.token_grid.nearest is not None
            self.nearest = record.layout.token_grid.nearest.tolist()

    def cell(self, number: int) -> Cell | None:
        """The patch of a feature row ``tile · F + row``, None for newline and class tokens."""
        if number < 0:
            return None
        if self.grids is not None:
            for tile, (height, width) in enumerate(self.grids):
                if number < height * width:
                    return tile + self.first_frame, *divmod(number, width)
                number -= height * width
        facts = tower_of(self.record)
        tile, row = divmod(number, facts.tokens_per_tile)
        patch = row - int(facts.cls_in_features)
        return None if patch < 0 else (tile + self.first_frame, *divmod(patch, facts.grid[1]))


class _Cells(_Places):
    """Feature rows of one image: from numbers ``tile · F + row`` to cells and prompt columns."""

    def __init__(self, image: ImageTrace, record: ImageRecord) -> None:
        super().__init__(record)
        self.number = image.number
        packed, columns = record.layout.packed.tolist(), image.columns.tolist()
        self.column = {cell: at for cell, at in zip(packed, columns) if cell >= 0}
        if self.nearest is not None:
            at_cell = self.column
            self.column = {p: at_cell[c] for p, c in enumerate(self.nearest) if c in at_cell}
        self.packed, self.columns = packed, columns

    def of_patch(self, tile: int, patch: int) -> int:
        """Number of the feature row of a patch."""
        facts = tower_of(self.record)
        return tile * facts.tokens_per_tile + patch + int(facts.cls_in_features)

    def token(self, number: int, column: int, sources: tuple[Cell, ...], newline: bool) -> Token:
        cell = self.cell(number)
        if cell is None:
            kind: Kind = "newline" if newline else "added" if number == ADDED else "class"
            return Token(self.number, -1, -1, -1, column, kind, sources)
        return Token(self.number, *cell, column, "patch", sources)


def _sources(groups: list[list[int]], grid: tuple[int, int]) -> dict[int, list[Cell]]:
    """Patches that each survivor holds, from ``group`` [tiles][N]."""
    held: dict[int, list[Cell]] = {}
    for tile, row in enumerate(groups):
        for patch, number in enumerate(row):
            if number >= 0:
                held.setdefault(number, []).append((tile, *divmod(patch, grid[1])))
    return held


def _of_packed(record: ImageRecord, cells: _Cells) -> list[tuple[Cell, ...]]:
    """Cells whose patches each token holds that a packed encoder made of the patches left in it."""
    segments, token_grid = record.layout.segments, record.token_grid
    assert segments is not None
    assert token_grid is not None
    height, width = token_grid.grids[0]
    area, start = segments.full[0] // (height * width), 0
    found = []
    for patches, (height, width) in zip(record.history[-1][1].tolist(), token_grid.grids):
        left = [cells.cell(start + patch // area) for patch in patches if patch >= 0]
        own = [cell for cell in left if cell is not None]
        for at in range(0, len(own), area):
            found.append(tuple(dict.fromkeys(own[at : at + area])))
        start += height * width
    return found


def _at_language_model(image: ImageTrace, record: ImageRecord, cells: _Cells) -> list[Token]:
    """Tokens of an image before the prompt stages."""
    if record.cell is None:
        tokens = []
        for number, column in zip(cells.packed, cells.columns):
            cell = cells.cell(number)
            own = () if cell is None else (cell,)
            tokens.append(cells.token(number, column, own, newline=number < 0))
        return tokens
    first = cells.columns[0]
    if record.group is None:
        return [
            cells.token(cell, cells.column.get(cell, first), held, newline=False)
            for cell, held in zip(record.cell.tolist(), _of_packed(record, cells))
        ]
    held = _sources(record.group.tolist(), tower_of(record).grid)
    ends = {ADDED: cells.columns[-1]}
    return [
        cells.token(
            cell,
            cells.column.get(cell, ends.get(cell, first)),
            tuple(held.get(j, ())),
            newline=False,
        )
        for j, cell in enumerate(record.cell.tolist())
    ]


def prompt_tokens(image: ImageTrace) -> list[Token]:
    """Tokens of one image as they entered the decoder."""
    record = image.record
    if record is None:  # the prompt came as embeddings: columns are all we know
        return [Token(image.number, -1, -1, -1, c) for c in image.columns.tolist()]
    tokens = _at_language_model(image, record, _Cells(image, record))
    if image.selection is None:
        return tokens
    chosen = [tokens[j] for j in image.selection.index.tolist()]
    if image.selection.group is None:
        return chosen
    held: dict[int, list[Cell]] = {}
    for token, number in zip(tokens, image.selection.group.tolist(), strict=True):
        if number >= 0:
            held.setdefault(number, []).extend(token.sources or ())
    return [
        Token(t.image, t.tile, t.row, t.col, t.column, t.kind, tuple(held.get(k, ())))
        for k, t in enumerate(chosen)
    ]


def _after(drop: Drop, image: ImageTrace, tokens: list[Token]) -> list[Token]:
    """Tokens of an image after a drop, in their new order; ``tokens``: those before it."""
    segment = drop.segment[image.row].tolist()
    at = dict(zip((p for p, s in enumerate(segment) if s == image.number), tokens, strict=True))
    if drop.group is not None:
        held: dict[int, list[Cell]] = {}
        for place, holder in enumerate(drop.group[image.row].tolist()):
            if place in at:
                held.setdefault(holder, []).extend(at[place].sources)
        at = {p: replace(token, sources=tuple(held.get(p, ()))) for p, token in at.items()}
    return [at[place] for place in drop.index[image.row].tolist() if place in at]


def decoder_tokens(
    prefill: PrefillTrace, image: ImageTrace, layer: int, entered: list[Token] | None = None
) -> list[Token]:
    """Tokens of one image alive in a decoder layer (negative counts from the end)."""
    tokens = prompt_tokens(image) if entered is None else entered
    for drop in prefill.drops:
        if drop.layer <= layer % len(prefill.layers):
            tokens = _after(drop, image, tokens)
    return tokens


def _encoder_stages(image: ImageTrace, record: ImageRecord) -> list[StageTokens]:
    """Survivors of every reducing encoder layer."""
    cells, stages = _Cells(image, record), []
    for (layer, slots), groups in zip(record.history, record.history_groups):
        tokens, width = [], tower_of(record).grid[1]
        for tile, (rows, group) in enumerate(zip(slots.tolist(), groups.tolist())):
            held: dict[int, list[Cell]] = {}
            for patch, row in enumerate(group):
                held.setdefault(row, []).append((tile, *divmod(patch, width)))
            for row, slot in enumerate(rows):
                if slot < 0:
                    continue
                number = cells.of_patch(tile, slot)
                column = cells.column.get(number, -1)
                tokens.append(cells.token(number, column, tuple(held.get(row, ())), False))
        stages.append(StageTokens("encoder", (layer, layer), tokens))
    return stages


def image_stages(prefill: PrefillTrace, image: ImageTrace) -> list[StageTokens]:
    """Stages of one image: reducing encoder layers, the prompt, runs of equal decoder layers."""
    return stages_of(prefill, [image])


def stages_of(prefill: PrefillTrace, parts: Sequence[ImageTrace]) -> list[StageTokens]:
    """The same for the parts of a video together."""
    stages = []
    if len(parts) == 1 and parts[0].record is not None:
        stages = _encoder_stages(parts[0], parts[0].record)
    entered = [prompt_tokens(part) for part in parts]
    stages.append(StageTokens("prompt", None, list(chain(*entered))))
    runs: list[tuple[int, int, list[Token]]] = []
    for number, seen in enumerate(prefill.layers):
        same = number and seen.column is prefill.layers[number - 1].column
        tokens = runs[-1][2] if same else [
            token
            for part, own in zip(parts, entered)
            for token in decoder_tokens(prefill, part, number, own)
        ]  # fmt: skip
        if runs and runs[-1][2] == tokens:
            runs[-1] = (runs[-1][0], number, tokens)
        else:
            runs.append((number, number, tokens))
    return [*stages, *(StageTokens("decoder", (a, b), tokens) for a, b, tokens in runs)]
