"""Base of methods that reduce every tile inside the vision encoder, all to the same number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokprune.engine.contracts import Order, Positions
from tokprune.engine.model import ImageLayout, ModelFacts, TowerFacts
from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import Method, check_fits, resolve_keep
from tokprune.methods.options import Budget
from tokprune.operators.anyres import tile_windows

Scope = Literal["tile", "image"]


@dataclass(frozen=True)
class TileMethod(Method):
    """All tiles of a batch run through the tower together, so every one keeps the same number."""

    #: the options of which exactly one says how much stays; (): none needs to
    one_of: ClassVar[tuple[str, ...]] = ("keep",)

    #: tokens of each tile (count), or fraction of its patches
    keep: Budget | None = None
    order: Order = "published"
    positions: Positions | None = None
    #: what ``keep`` counts on tiled models: a tile, or an image of the most tiles possible
    scope: Scope = "tile"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.one_of:
            check_one(self, self.one_of)

    def tile_budget(self, facts: ModelFacts) -> int:
        """Tokens to keep of each tile: ``keep``, or with ``scope="image"`` a share of it, by the
        largest number of tiles that an image of this model can have.

        Raises:
            ValueError: more than there are, or less than one for each tile.
        """
        tower = facts.need_tower(self.name)
        keep, most = self.keep, tower.max_tiles
        assert keep is not None
        if self.scope == "tile" or isinstance(keep, float):
            check_fits(keep, facts, tower.patches)
            return resolve_keep(keep, tower.patches)
        check_fits(keep, facts, tower.patches * most)
        if keep < most:
            raise ValueError(
                f"keep={keep} with scope='image' is less than one token for each of the {most} "
                f"tiles that an image of this model can have; keep should be at least {most}"
            )
        return keep // most


def tiles_of(facts: ModelFacts, layout: ImageLayout) -> list[tuple[int, int]]:
    """Of every tile at the language-model input its cells, and how many of them show the image and
    no padding."""
    if layout.token_grid is not None:
        sizes = [height * width for height, width in layout.token_grid.grids]
        return list(zip(sizes, sizes))
    assert facts.tower is not None
    return list(zip([facts.tower.patches] * layout.tiles, shown_cells(facts.tower, layout)))


def shown_cells(tower: TowerFacts, layout: ImageLayout) -> list[int]:
    """Of every tile in the vision encoder, the patches that show the image and no padding."""
    if layout.video or layout.tile_grid == (0, 0):
        return [tower.patches] * layout.tiles
    windows = tile_windows(tower.grid, layout.tile_grid, layout.size)
    return [(bottom - top) * (right - left) for top, bottom, left, right in windows]


def check_one(method: Method, names: tuple[str, ...]) -> None:
    """Exactly one of these options is given.

    Raises:
        ValueError: none or several are; names them.
    """
    values = {name: getattr(method, name) for name in names}
    given = [f"{name}={value!r}" for name, value in values.items() if value is not None]
    if len(given) != 1:
        got = ", ".join(given) or "none of them"
        raise ValueError(f"give exactly one of {' and '.join(names)}; got {got}")


def feature_layer(facts: TowerFacts, method: str) -> int:
    """The encoder layer whose output becomes the image features; work behind it would be wasted.

    Raises:
        UnsupportedModelError: the features come from several layers (which then differ in
            length), or from before the first.
    """
    if facts.feature_layer is None or facts.feature_layer < 0:
        what = "reads the embeddings before the first encoder layer"
        if facts.feature_layer is None:
            what = "concatenates the features of several encoder layers"
        raise UnsupportedModelError(
            f"{method} changes the number of tokens inside encoder layers, but this model {what} "
            "(config.vision_feature_layer)"
        )
    return facts.feature_layer
