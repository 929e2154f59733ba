"""A drawing of which patches survived, stage by stage."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from tokprune.engine.images import ImageRecord
    from tokprune.trace import Trace
    from tokprune.trace.provenance import Cell, StageTokens, Token

_PAPER = (255, 255, 255)
_INK = (40, 40, 40)
_KEPT = (255, 176, 0)
_MOST_PANELS = 6


@dataclass
class _Board:
    """An image under a grid of cells; ``place`` maps patches to (row, column) of the grid."""

    image: Image.Image
    cell: int
    shape: tuple[int, int]
    place: dict[Cell, tuple[int, int]]


def overlay(
    trace: Trace,
    image: Image.Image | Sequence[Image.Image | Sequence[Image.Image]],
    path: str | PathLike[str] | None = None,
    row: int = 0,
    *,
    processor: Any = None,
    size: int = 432,
) -> Image.Image:
    """Draw which patches of a prompt's images survived the newest prefill.

    One panel per stage that changed something: dropped patches grey, survivors clear with an
    outline, merged tokens as patches of one colour. Tiled models get the base tile above the
    stitched high-resolution image, without the padding that the model's own packing removes. A
    video is a mosaic of its frames. Models in whose vision encoder no stage works show the cells
    of their language-model input.

    Args:
        trace: of the patched model.
        image: the prompt's image, or the list of them in prompt order, as they were given to the
            processor (it turns no photo as its EXIF data say, and neither does this; see
            :func:`tokprune.inputs.pictures.read_picture`); for a video, the list of the frames
            that the model saw (``[frames]`` where it is all there is).
        path: where to save (the suffix says the format), or None.
        row: batch row of the prompt.
        processor: the model's processor (or image processor), to show the part of the image
            that the model saw: shortest-edge resize with centre crop, or padding to a square.
            Without it the image is squashed to a square, which is what the model saw only where
            its processor does that (SigLIP; the base tile of LLaVA-NeXT always).
        size: length of a panel's longer side in pixels (rounded to whole cells).

    Raises:
        RuntimeError: no prefill with images was recorded.
        ValueError: the number of images, or of a video's frames, is not that of the prompt, or
            the prompt was given as embeddings, so that nobody knows the patches.
    """
    from PIL import Image

    from tokprune.trace.provenance import original_cells, stages_of

    prefill = trace._need()
    images = [image] if isinstance(image, Image.Image) else list(image)
    traced = prefill.visuals(row)
    if len(images) != len(traced):
        raise ValueError(
            f"image: {len(images)} image(s) for batch row {row}, which has {len(traced)} "
            "image(s); pass all of the prompt's images in order"
            + (" (to this model every tile is one)" if prefill.facts.per_tile else "")
        )
    strips = []
    for shown, parts in zip(images, traced):
        records = [part.record for part in parts if part.record is not None]
        if not records:
            raise ValueError(
                "the prompt was given as inputs_embeds, so the trace knows prompt columns but no "
                "patches; run the model on input_ids and pixel_values to draw them"
            )
        if records[0].layout.video:
            boards = _mosaic(shown, records, processor, size)
        elif isinstance(shown, Image.Image):
            boards = _boards(shown.convert("RGB"), records[0], processor, size)
        else:
            raise ValueError(f"image: {shown!r} stands for a still image; it should be one")
        full = {cell for record in records for cell in original_cells(record)}
        stages = _worth_showing(stages_of(prefill, parts), full)
        what = "video" if records[0].layout.video else "image"
        count = sum(len(part.columns) for part in parts)
        panels = [_column(boards, None, f"{what}: {count} tokens", size)]
        panels += [
            _column(boards, stage.tokens, _caption(stage, len(prefill.layers), records[0]), size)
            for stage in stages
        ]
        strips.append(_join(panels, size // 24, across=True))
    result = _frame(_join(strips, size // 12, across=False), size // 24)
    if path is not None:
        result.save(path)
    return result


# --------------------------------------------------------------------------- stages


def _worth_showing(stages: list[StageTokens], full: set[Cell]) -> list[StageTokens]:
    """Stages whose patches differ from those before, at most a handful, the last among them."""
    shown: list[StageTokens] = []
    previous: set[Any] = {(cell,) for cell in full}
    for stage in stages:
        now = {t.sources for t in stage.tokens if t.sources}
        if now != previous:
            shown.append(stage)
        previous = now
    while len(shown) > _MOST_PANELS:
        del shown[len(shown) // 2]
    return shown


def _caption(stage: StageTokens, layers: int, record: ImageRecord) -> str:
    patches = sum(t.kind == "patch" for t in stage.tokens)
    extra = [
        f"+{n} {kind}"
        for kind in ("newline", "class", "added")
        if (n := sum(t.kind == kind for t in stage.tokens))
    ]
    number = " ".join([str(patches), *extra])
    if stage.layers is None:
        return f"prompt: {number}"
    first, last = stage.layers
    if stage.stage == "encoder":
        from tokprune.trace.provenance import tower_of

        most = record.layout.tiles * tower_of(record).patches
        return f"encoder, layer {first}: {patches} of {most}"
    if last == layers - 1:
        return f"decoder, layer {first}+: {number}"
    return f"decoder, layer{'s' if last > first else ''} {_span(first, last)}: {number}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


# ------------------------------------------------------------------------- geometry


def _boards(image: Image.Image, record: ImageRecord, processor: Any, size: int) -> list[_Board]:
    """The base tile, and for tiled models the stitched high-resolution image."""
    from tokprune.trace.provenance import cells_of_tile

    rows, cols = cells_of_tile(record)
    grids = () if record.token_grid is None else record.token_grid.grids
    down, across = record.layout.tile_grid
    if len(grids) > 1 and not down:
        return _tiles(image, len(grids), (rows, cols), size)
    tiled = record.facts is not None and record.facts.tiled
    boards = [_map(image if tiled else _as_seen(image, processor), 0, (rows, cols), size)]
    if len(grids) > 1:  # the crops as one smaller map, which shows no padding
        boards.append(_map(image, 1, grids[1], size))
    elif down and across:
        shape = (down * rows, across * cols)
        cell = max(4, round(size / max(shape)))
        stitched = _stitched(image, record, shape, cell)
        if stitched.place:  # the packing may leave nothing of a very long, thin image
            boards.append(_trimmed(stitched))
    return boards


def _map(image: Image.Image, tile: int, shape: tuple[int, int], size: int) -> _Board:
    """An image under the cells of one tile."""
    cell = max(4, round(size / max(shape)))
    place = {(tile, r, c): (r, c) for r in range(shape[0]) for c in range(shape[1])}
    return _Board(_resize(image, shape[1] * cell, shape[0] * cell), cell, shape, place)


def _tiles(image: Image.Image, tiles: int, grid: tuple[int, int], size: int) -> list[_Board]:
    """Tiles of which the model knows no more than their number: crops of the stretched image in as
    many rows and columns as suit its sides, and the whole image as the last of them."""
    rows, cols = grid
    crops, wanted = tiles - 1, math.log(image.width / image.height)
    fitting = [n for n in range(1, crops + 1) if crops % n == 0]
    down = min(fitting, key=lambda n: abs(math.log(crops / n**2) - wanted))
    across = crops // down
    board = _map(image, 0, (down * rows, across * cols), size)
    board.place = {
        (r // rows * across + c // cols, r % rows, c % cols): (r, c) for _, r, c in board.place
    }
    return [_map(image, crops, grid, size), board]


def _mosaic(frames: Any, records: Sequence[ImageRecord], processor: Any, size: int) -> list[_Board]:
    """All frames of a video, row by row in a near-square mosaic; ``records``: its parts."""
    from PIL import Image

    from tokprune.trace.provenance import cells_of_tile

    number = sum(record.layout.frames for record in records)
    given = [] if isinstance(frames, Image.Image) else list(frames)
    if records[0].facts is None:  # the model may make one grid of several frames
        given = given[:: max(1, math.ceil(len(given) / number))]
    if len(given) != number:
        got = "an image" if isinstance(frames, Image.Image) else f"{len(given)} frame(s)"
        raise ValueError(
            f"image: {got} for a video of {number} frames; it should be the list of those that "
            "the model saw"
        )
    rows, cols = cells_of_tile(records[0])
    across = math.ceil(math.sqrt(number))
    shape = (math.ceil(number / across) * rows, across * cols)
    cell = max(4, round(size / max(shape)))
    canvas = Image.new("RGB", (shape[1] * cell, shape[0] * cell), _PAPER)
    place: dict[Cell, tuple[int, int]] = {}
    for f, frame in enumerate(given):
        top, left = f // across * rows, f % across * cols
        seen = _resize(_as_seen(frame.convert("RGB"), processor), cols * cell, rows * cell)
        canvas.paste(seen, (left * cell, top * cell))
        place |= {(f, r, c): (top + r, left + c) for r in range(rows) for c in range(cols)}
    return [_Board(canvas, cell, shape, place)]


def _stitched(image: Image.Image, record: ImageRecord, shape: tuple[int, int], cell: int) -> _Board:
    """Fitted into the tiles with its aspect ratio, padding around it, as the processor does."""
    from PIL import Image

    from tokprune.trace.provenance import cells_of_tile, original_cells

    rows, cols = cells_of_tile(record)
    width, height = shape[1] * cell, shape[0] * cell
    scale = min(width / image.width, height / image.height)
    fitted = _resize(
        image,
        min(width, math.ceil(image.width * scale)),
        min(height, math.ceil(image.height * scale)),
    )
    canvas = Image.new("RGB", (width, height), _PAPER)
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    place = {}
    for tile, r, c in original_cells(record):
        if tile:
            down, across = divmod(tile - 1, record.layout.tile_grid[1])
            place[(tile, r, c)] = (down * rows + r, across * cols + c)
    return _Board(canvas, cell, shape, place)


def _trimmed(board: _Board) -> _Board:
    """Without the rows and columns of cells that hold nothing but padding."""
    top, left = (min(at[i] for at in board.place.values()) for i in (0, 1))
    bottom, right = (max(at[i] for at in board.place.values()) + 1 for i in (0, 1))
    s = board.cell
    return _Board(
        board.image.crop((left * s, top * s, right * s, bottom * s)),
        s,
        (bottom - top, right - left),
        {cell: (r - top, c - left) for cell, (r, c) in board.place.items()},
    )


def _as_seen(image: Image.Image, processor: Any) -> Image.Image:
    """The part of the image that the processor hands to the model."""
    from PIL import Image

    settings = getattr(processor, "image_processor", processor)
    if settings is None:
        return image
    if getattr(settings, "do_pad", None):
        side = max(image.size)
        mean = getattr(settings, "image_mean", None) or (1.0, 1.0, 1.0)
        square = Image.new("RGB", (side, side), tuple(int(255 * v) for v in mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    edge, crop = _entry(settings, "size", "shortest_edge"), getattr(settings, "crop_size", None)
    if not getattr(settings, "do_center_crop", False) or edge is None or crop is None:
        return image
    scale = min(image.size) / edge  # original pixels per resized pixel
    width = _entry(settings, "crop_size", "width") * scale
    height = _entry(settings, "crop_size", "height") * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.crop((round(left), round(top), round(left + width), round(top + height)))


def _entry(settings: Any, name: str, key: str) -> Any:
    """An entry of a size setting, which is a dict or an object with attributes."""
    value = getattr(settings, name, None)
    return value.get(key) if isinstance(value, dict) else getattr(value, key, None)


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    from PIL import Image

    return image.resize((max(width, 1), max(height, 1)), Image.Resampling.LANCZOS)


# -------------------------------------------------------------------------- drawing


def _draw(board: _Board, tokens: list[Token]) -> Image.Image:
    """One board with its survivors: grey out, tint merged patches, outline every token."""
    from PIL import Image, ImageDraw, ImageOps

    rows, cols = board.shape
    owner: dict[tuple[int, int], int] = {}
    for number, token in enumerate(tokens):
        for cell in token.sources:
            if cell in board.place:
                owner[board.place[cell]] = number
    colour = {n: _colour(tokens[n]) for n in set(owner.values()) if len(tokens[n].sources) > 1}
    inside = Image.new("L", (cols, rows), 0)
    alive = Image.new("L", (cols, rows), 0)
    tinted = Image.new("L", (cols, rows), 0)
    tint = Image.new("RGB", (cols, rows))
    for r, c in board.place.values():
        inside.putpixel((c, r), 255)
    for (r, c), number in owner.items():
        alive.putpixel((c, r), 255)
        if number in colour:
            tinted.putpixel((c, r), 80)
            tint.putpixel((c, r), colour[number])

    def grown(mask: Image.Image) -> Image.Image:
        return mask.resize(board.image.size, Image.Resampling.NEAREST)

    grey = Image.blend(
        ImageOps.grayscale(board.image).convert("RGB"),
        Image.new("RGB", board.image.size, (225, 225, 225)),
        0.68,
    )
    result = Image.composite(board.image, grey, grown(alive))
    result = Image.composite(grown(tint), result, grown(tinted))
    result = Image.composite(result, Image.new("RGB", board.image.size, _PAPER), grown(inside))
    draw, s = ImageDraw.Draw(result), board.cell
    thick = 1 if s < 12 else 2
    # thin lines first, so that they do not cut the strong ones
    for strong in (False, True):
        for (r, c), number in owner.items():
            for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                other = owner.get((r + dr, c + dc))
                if other == number:
                    continue
                edge = other is None or number in colour
                if edge == strong and (edge or dr + dc > 0):
                    ink = colour.get(number, _KEPT if edge else (255, 255, 255))
                    _edge(draw, r, c, dr, dc, s, thick if edge else 1, ink)
    return result


def _edge(
    draw: Any, r: int, c: int, dr: int, dc: int, s: int, thick: int, ink: tuple[int, int, int]
) -> None:
    """One side of a cell, drawn inside it."""
    x, y, far = c * s, r * s, s - 1
    if dr:
        y0 = y if dr < 0 else y + far - thick + 1
        draw.rectangle((x, y0, x + far, y0 + thick - 1), fill=ink)
    else:
        x0 = x if dc < 0 else x + far - thick + 1
        draw.rectangle((x0, y, x0 + thick - 1, y + far), fill=ink)


def _colour(token: Token) -> tuple[int, int, int]:
    """A colour of its own per token, the same at every stage; far hues for near patches."""
    # golden-ratio steps keep the hues of near cells apart
    hue = (0.2 * token.tile + 0.276393 * token.row + 0.618034 * token.col) % 1
    r, g, b = colorsys.hsv_to_rgb(hue, 0.85, 0.95 if (token.row + token.col) % 2 else 0.75)
    return round(255 * r), round(255 * g), round(255 * b)


def _column(
    boards: list[_Board], tokens: list[Token] | None, caption: str, size: int
) -> Image.Image:
    """The boards of one stage above its caption; tokens None: the plain image."""
    from PIL import Image, ImageDraw, ImageFont

    drawn = [b.image if tokens is None else _draw(b, tokens) for b in boards]
    font = ImageFont.load_default(max(11, size // 24))
    left, _, right, bottom = font.getbbox(caption)
    body = _join(drawn, size // 48, across=False)
    width = max(body.width, math.ceil(right - left))
    result = Image.new("RGB", (width, body.height + math.ceil(bottom) + size // 48), _PAPER)
    result.paste(body, ((width - body.width) // 2, 0))
    ImageDraw.Draw(result).text(
        ((width - (right - left)) / 2, body.height + size // 48), caption, _INK, font
    )
    return result


def _join(parts: list[Image.Image], gap: int, across: bool) -> Image.Image:
    from PIL import Image

    widths, heights = [p.width for p in parts], [p.height for p in parts]
    between = gap * (len(parts) - 1)
    if across:
        result = Image.new("RGB", (sum(widths) + between, max(heights)), _PAPER)
    else:
        result = Image.new("RGB", (max(widths), sum(heights) + between), _PAPER)
    x = y = 0
    for part in parts:
        result.paste(part, (x, y))
        if across:
            x += part.width + gap
        else:
            y += part.height + gap
    return result


def _frame(image: Image.Image, margin: int) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.expand(image, margin, _PAPER)
