"""What each variant kept of a few images, and what it answered."""

from __future__ import annotations

import base64
import colorsys
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokprune.eval.report.analysis import Analysis, Result
from tokprune.eval.report.data import Point
from tokprune.eval.report.document import Card, Exhibit, Gallery
from tokprune.eval.report.statistics import CORRECT
from tokprune.inputs.pictures import read_picture

if TYPE_CHECKING:
    from PIL import Image

    from tokprune.eval.benchmarks.base import Benchmark

_KEPT = (255, 140, 0)
_SIDE = 264  # pixels of an image in the page, about


def make_gallery(
    analysis: Analysis, benchmark: Benchmark, most: int = 6
) -> tuple[Gallery | None, list[str]]:
    """Exhibits for the items that have overlays, at the analysis' budget or its nearest.

    Returns:
        The gallery, or None without any record that can be drawn; and notes on what was left out.
    """
    data = analysis.data
    number = {item.id: n for n, item in enumerate(data.items)}
    at: dict[str, list[Mapping[str, Any]]] = {}
    for record in data.overlays:
        if record.get("item") in number:
            at.setdefault(record["item"], []).append(record)
    if not at:
        return None, ["the run holds no overlays, so there is no gallery"]
    questions = {
        item.id: item
        for item in benchmark.items(data.run["benchmark"].get("split")) if item.id in at
    }  # fmt: skip
    owner = {trial: r for r in analysis.results for trial in r.point.trials}
    exhibits, notes = [], []
    for item in list(at)[:most]:
        if item not in questions:
            notes.append(f"item {item} is not in benchmark {benchmark.name} any more")
            continue
        try:
            seen = _shown(benchmark, questions[item], at[item][0])
        except (OSError, ValueError) as error:
            notes.append(f"the {benchmark.media} of item {item} cannot be made: {error}")
            continue
        chosen = _chosen(at[item], owner, analysis)
        cards = []
        for record, r in chosen:
            drawn = draw(seen, record, data.tokens)
            if drawn is None:
                notes.append(f"{r.point.name}, item {item}: unknown patch grid, not drawn")
                continue
            cards.append(_card(r.point, number[item], drawn, len(record["kept"])))
        if cards:
            question = data.items[number[item]]
            unpruned = _card(data.unpruned, number[item], fitted(seen), data.tokens)
            exhibits.append(
                Exhibit(question.question, question.task, question.answers, unpruned, tuple(cards))
            )
    if not exhibits:
        return None, [*notes, "no overlay could be drawn, so there is no gallery"]
    return Gallery(tuple(exhibits)), notes


def _chosen(
    records: Sequence[Mapping[str, Any]], owner: Mapping[str, Result], analysis: Analysis
) -> list[tuple[Mapping[str, Any], Result]]:
    """One record per variant: the one nearest to the budget; methods first, then controls."""
    best: dict[str, tuple[Mapping[str, Any], Result]] = {}
    for record in records:
        r = owner.get(record["trial"])
        if r is None or r.point.variant == "none":
            continue
        known = best.get(r.point.variant)
        if known is None or _distance(r, analysis) < _distance(known[1], analysis):
            best[r.point.variant] = (record, r)
    return sorted(best.values(), key=lambda pair: (pair[1].point.control, pair[1].point.variant))


def _distance(r: Result, analysis: Analysis) -> float:
    return abs(math.log(max(r.point.budget, 1) / max(analysis.at, 1)))


def _card(point: Point, n: int, image: Image.Image, kept: int) -> Card:
    return Card(
        variant="unpruned" if point.variant == "none" else point.variant,
        detail=f"{kept} tokens"
        if point.variant == "none"
        else f"budget {point.budget:g}, {kept} kept",
        answer=str(point.shown[n]) or ("failed" if not point.answered[n] else "(empty)"),
        correct=bool(point.first[n] >= CORRECT),
        image=data_uri(image),
    )


# ---------------------------------------------------------------------------- images


def draw(image: Image.Image, record: Mapping[str, Any], tokens: int) -> Image.Image | None:
    """The image with dropped patches greyed out and kept ones clear, outlined against dropped
    ones; patches that were merged into one token share a tint.

    Args:
        image: as the model saw it; of a video, its frames side by side.
        record: of the overlays folder.
        tokens: visual tokens of an unpruned image: the base grid is the square of that size.

    Returns:
        None where the number of tokens is no square and the record has no ``grid``.
    """
    from PIL import Image, ImageDraw, ImageOps

    record = on_mosaic(record)
    grid = record.get("grid") or (math.isqrt(tokens), math.isqrt(tokens))
    rows, columns = int(grid[0]), int(grid[1])
    base = [(n, r, c) for n, (r, c, tile) in enumerate(record["kept"]) if not tile]
    if not record.get("grid") and rows * columns != tokens:
        return None
    if any(not (0 <= r < rows and 0 <= c < columns) for _, r, c in base):
        return None
    cell = max(4, round(_SIDE / max(rows, columns)))
    board = image.resize((columns * cell, rows * cell), Image.Resampling.LANCZOS)
    owner: dict[tuple[int, int], int] = {}
    merged: set[int] = set()
    for n, r, c in base:
        owner[r, c] = n
        sources = record.get("sources")
        patches = sources[n] if sources else []
        if len(patches) > 1:
            merged.add(n)
            owner.update({(y, x): n for y, x, tile in patches if not tile})
    alive, tint = Image.new("L", (columns, rows), 0), Image.new("RGB", (columns, rows))
    tinted = Image.new("L", (columns, rows), 0)
    colour = {n: _hue(*record["kept"][n][:2]) for n in merged}
    for (r, c), n in owner.items():
        alive.putpixel((c, r), 255)
        if n in merged:
            tinted.putpixel((c, r), 90)
            tint.putpixel((c, r), colour[n])

    def grown(mask: Image.Image) -> Image.Image:
        return mask.resize(board.size, Image.Resampling.NEAREST)

    faded = Image.blend(
        ImageOps.grayscale(board).convert("RGB"), Image.new("RGB", board.size, (232, 232, 232)), 0.7
    )
    result = Image.composite(board, faded, grown(alive))
    result = Image.composite(grown(tint), result, grown(tinted))
    lines = ImageDraw.Draw(result)
    for (r, c), n in owner.items():
        x, y, far = c * cell, r * cell, cell - 1
        ink = colour.get(n, _KEPT)
        sides = {
            (-1, 0): (x, y, x + far, y),
            (1, 0): (x, y + far, x + far, y + far),
            (0, -1): (x, y, x, y + far),
            (0, 1): (x + far, y, x + far, y + far),
        }
        for (dr, dc), line in sides.items():
            other = owner.get((r + dr, c + dc))
            if other is None or (other != n and (n in merged or other in merged)):
                lines.line(line, fill=ink)
    return result


def _hue(row: int, column: int) -> tuple[int, int, int]:
    """A colour for a merged token; far hues for near patches."""
    r, g, b = colorsys.hsv_to_rgb((0.276393 * row + 0.618034 * column) % 1, 0.85, 0.85)
    return round(255 * r), round(255 * g), round(255 * b)


def _shown(benchmark: Benchmark, item: Any, record: Mapping[str, Any]) -> Image.Image:
    """The image of an item, or its frames side by side, as the model sees them: CLIP's central
    square, or all of it where an overlay ``record`` has a grid of its own."""
    grid = record.get("grid")
    if benchmark.media != "video":
        image = read_picture(benchmark.image(item), f"item {item.id!r}")
        return image if grid else _square(image)
    from PIL import Image

    frames = [read_picture(frame, f"item {item.id!r}") for frame in benchmark.video(item)]
    # the model may make one grid of several frames
    frames = frames[:: -(-len(frames) // record.get("frames", len(frames)))]
    if not grid or grid[0] == grid[1]:
        frames = [_square(frame) for frame in frames]
    (width, height), across = frames[0].size, _across(len(frames))
    mosaic = Image.new("RGB", (across * width, -(-len(frames) // across) * height), "white")
    for number, frame in enumerate(frames):
        mosaic.paste(frame, (number % across * width, number // across * height))
    return mosaic


def _across(frames: int) -> int:
    """Frames in a row of the mosaic of a video."""
    return math.ceil(math.sqrt(frames))


def on_mosaic(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of a video, whose tiles are its frames, as one of the image that shows them side
    by side; any other as it is."""
    frames = record.get("frames")
    if not frames:
        return record
    (rows, columns), across = record["grid"], _across(frames)

    def place(patch: Sequence[int]) -> list[int]:
        r, c, frame = patch
        return [frame // across * rows + r, frame % across * columns + c, 0]

    placed: dict[str, Any] = {
        **record,
        "grid": [-(-frames // across) * rows, across * columns],
        "kept": [place(patch) for patch in record["kept"]],
    }
    if "sources" in record:
        placed["sources"] = [[place(patch) for patch in patches] for patches in record["sources"]]
    return placed


def _square(image: Image.Image) -> Image.Image:
    """The central square, which is what CLIP's processor hands to the model."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def fitted(image: Image.Image) -> Image.Image:
    from PIL import Image

    size = _SIDE, round(_SIDE * image.height / image.width)
    return image.resize(size, Image.Resampling.LANCZOS)


def data_uri(image: Image.Image) -> str:
    """The smaller of PNG and JPEG."""
    forms = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85, "subsampling": 0})):
        target = io.BytesIO()
        image.save(target, kind, **options)
        forms.append((len(target.getvalue()), kind, target.getvalue()))
    _, kind, data = min(forms)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
