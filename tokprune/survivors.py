"""Who survived: the original tokens behind each stage of a recorded prefill, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from tokprune.engine.images import ImageRecord
    from tokprune.trace import ImageTrace, PrefillTrace

#: (tile, row, col) of a patch; tile 0 is the base picture
Cell: TypeAlias = "tuple[int, int, int]"
Kind: TypeAlias = 'Literal["patch", "newline", "class"]'


@dataclass(frozen=True)
class Token:
    """A visual token alive at some stage, named by where it comes from.

    ``image``: number of the image inside its prompt; ``tile``, ``row``, ``col``: its patch, −1
    for newline and class tokens (and for prompts given as embeddings); ``column``: prompt column,
    −1 where the model's packing gives it none; ``sources``: every patch merged into it, its own
    included (empty for newline and class tokens).
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


def original_cells(record: ImageRecord) -> list[Cell]:
    """Patches that the model's own packing puts into the prompt, in prompt order."""
    facts, cells = record.facts, []
    for number in record.layout.packed.tolist():
        tile, row = divmod(number, facts.tokens_per_tile)
        patch = row - int(facts.cls_in_features)
        if number >= 0 and patch >= 0:
            cells.append((tile, *divmod(patch, facts.grid[1])))
    return cells


class _Cells:
    """Feature rows of one image: from numbers ``tile · F + row`` to cells and prompt columns."""

    def __init__(self, image: ImageTrace, record: ImageRecord) -> None:
        self.facts, self.number = record.facts, image.number
        packed, columns = record.layout.packed.tolist(), image.columns.tolist()
        self.column = {cell: at for cell, at in zip(packed, columns) if cell >= 0}
        self.packed, self.columns = packed, columns

    def cell(self, number: int) -> Cell | None:
        """The patch of a feature row, None for newline and class tokens."""
        facts = self.facts
        patch = number % facts.tokens_per_tile - int(facts.cls_in_features)
        if number < 0 or patch < 0:
            return None
        return number // facts.tokens_per_tile, *divmod(patch, facts.grid[1])

    def of_patch(self, tile: int, patch: int) -> int:
        """Number of the feature row of a patch."""
        return tile * self.facts.tokens_per_tile + patch + int(self.facts.cls_in_features)

    def token(self, number: int, column: int, sources: tuple[Cell, ...], newline: bool) -> Token:
        cell = self.cell(number)
        if cell is None:
            kind: Kind = "newline" if newline else "class"
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


def _at_the_door(image: ImageTrace, record: ImageRecord, cells: _Cells) -> list[Token]:
    """Tokens of an image before the prompt stages."""
    if record.group is None or record.cell is None:
        tokens = []
        for number, column in zip(cells.packed, cells.columns):
            cell = cells.cell(number)
            own = () if cell is None else (cell,)
            tokens.append(cells.token(number, column, own, newline=number < 0))
        return tokens
    held = _sources(record.group.tolist(), record.facts.grid)
    first = cells.columns[0]
    return [
        cells.token(cell, cells.column.get(cell, first), tuple(held.get(j, ())), newline=False)
        for j, cell in enumerate(record.cell.tolist())
    ]


def prompt_tokens(image: ImageTrace) -> list[Token]:
    """Tokens of one image as they entered the decoder."""
    record = image.record
    if record is None:  # the prompt came as embeddings: columns are all we know
        return [Token(image.number, -1, -1, -1, c) for c in image.columns.tolist()]
    tokens = _at_the_door(image, record, _Cells(image, record))
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


def _survivors(entered: list[Token], columns: list[int]) -> list[Token]:
    """The tokens with these prompt columns, in order (a drop never changes the order, so this
    also tells tokens apart that share a column, up to equal ones)."""
    alive, at = [], 0
    for column in columns:
        while entered[at].column != column:
            at += 1
        alive.append(entered[at])
        at += 1
    return alive


def decoder_tokens(
    prefill: PrefillTrace, image: ImageTrace, layer: int, entered: list[Token] | None = None
) -> list[Token]:
    """Tokens of one image alive in a decoder layer."""
    seen = prefill.layers[layer]
    entered = prompt_tokens(image) if entered is None else entered
    mine = seen.segment[image.row] == image.number
    return _survivors(entered, seen.column[image.row][mine].tolist())


def _encoder_stages(image: ImageTrace, record: ImageRecord) -> list[StageTokens]:
    """Survivors of every reducing encoder layer."""
    cells, grid = _Cells(image, record), record.facts.grid
    stages = []
    for (layer, slots), groups in zip(record.history, record.history_groups):
        tokens = []
        for tile, (rows, group) in enumerate(zip(slots.tolist(), groups.tolist())):
            held: dict[int, list[Cell]] = {}
            for patch, row in enumerate(group):
                held.setdefault(row, []).append((tile, *divmod(patch, grid[1])))
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
    stages = [] if image.record is None else _encoder_stages(image, image.record)
    entered = prompt_tokens(image)
    stages.append(StageTokens("prompt", None, entered))
    runs: list[tuple[int, int, list[Token]]] = []
    for number, seen in enumerate(prefill.layers):
        same = number and seen.column is prefill.layers[number - 1].column
        tokens = runs[-1][2] if same else decoder_tokens(prefill, image, number, entered)
        if runs and runs[-1][2] == tokens:
            runs[-1] = (runs[-1][0], number, tokens)
        else:
            runs.append((number, number, tokens))
    return [*stages, *(StageTokens("decoder", (a, b), tokens) for a, b, tokens in runs)]
