"""Pixels of a scene: cluttered ground, outlined shapes, sprites, text plates."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from tokprune.eval.benchmarks.mini.scene import Plate, Scene, Thing, random_state
from tokprune.eval.benchmarks.mini.world import (
    CELL,
    CHARACTERS,
    COLORS,
    DISTRACTORS,
    PATCH,
    PLATES,
    SIDE,
    SPRITES,
)

_FOLDER = Path(__file__).parent
#: side of an atlas cell, and cells per atlas row
ATLAS_CELL, ATLAS_ROW = 40, 8
_SUPER = 8  # shapes are drawn this much larger, then reduced


def render(scene: Scene) -> Image.Image:
    """The image of a scene, RGB, SIDE × SIDE. The same scene gives the same pixels."""
    rng = random_state(scene.key, "render")
    image = ground(rng)
    for thing in (*scene.distractors, *scene.things):
        paste(image, thing, rng)
    for plate in scene.plates:
        draw_plate(image, plate)
    return image


def ground(rng: np.random.RandomState) -> Image.Image:
    """Clutter with detail at every scale: value noise, polygons and lines without outline."""
    # made at a quarter of the size (two points a patch), then enlarged in one go
    small = SIDE // 4
    pixels = np.empty((small, small, 3), dtype=np.float32)
    pixels[:] = rng.uniform(70, 190, 3)
    for cells, strength in ((3, 50), (6, 40), (12, 36), (24, 36), (48, 24)):
        noise = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        noise = 0.6 * noise + 0.4 * noise.mean(-1, keepdims=True)
        if cells == 24:  # clutter that changes from patch to patch, strong in some places only
            noise *= np.repeat(np.repeat(rng.uniform(0, 2, (6, 6, 1)), 4, 0), 4, 1)
        noise *= rng.uniform(0.5, 1.2) * strength
        for channel in range(3):
            level = Image.fromarray(np.ascontiguousarray(noise[:, :, channel]))
            level = level.resize((small, small), Image.Resampling.BILINEAR)
            pixels[:, :, channel] += np.asarray(level)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.randint(8, 18)):
        tint = (*(int(v) for v in rng.randint(20, 235, 3)), int(rng.randint(50, 190)))
        x, y = rng.randint(0, SIDE, 2)
        reach = rng.randint(6, 30)
        if rng.rand() < 0.55:
            corners = [(int(x + dx), int(y + dy)) for dx, dy in rng.randint(-reach, reach, (4, 2))]
            draw.polygon(corners, fill=tint)
        else:
            end = (int(x + rng.randint(-60, 60)), int(y + rng.randint(-60, 60)))
            draw.line([(int(x), int(y)), end], fill=tint, width=int(rng.randint(1, 4)))
    return image


def paste(image: Image.Image, thing: Thing, rng: np.random.RandomState) -> None:
    """Draw an object into an image; ``rng`` moves and shrinks it a little inside its patches."""
    box = thing.side * PATCH
    side = box - int(rng.randint(0, 4))  # 13 to 16 pixels for a small one
    dx, dy = (int(v) for v in rng.randint(0, box - side + 1, 2))
    sprite = figure(thing.kind, thing.color, thing.code, side)
    image.paste(sprite, (thing.col * PATCH + dx, thing.row * PATCH + dy), sprite)


def figure(kind: str, color: str, code: int, side: int) -> Image.Image:
    """An object alone, RGBA, side × side: a shape, a sprite, or the distractor with that code."""
    if color:
        return _shape(kind, color, side)
    return _sprite(SPRITES[kind] if kind else code, side)


def draw_plate(image: Image.Image, plate: Plate) -> None:
    """Draw a text plate into an image."""
    x, y = plate.col * PATCH, plate.row * PATCH
    cell = CELL * PATCH
    draw = ImageDraw.Draw(image)
    frame = tuple(int(0.55 * v) for v in PLATES[plate.color])
    box = (x, y, x + cell * len(plate.text) - 1, y + cell - 1)
    draw.rectangle(box, fill=PLATES[plate.color], outline=frame)
    for i, character in enumerate(plate.text):
        glyph = _glyph(character)
        image.paste((16, 16, 30), (x + i * cell, y), glyph)


@functools.cache
def _shape(kind: str, color: str, side: int) -> Image.Image:
    """A filled shape with an outline that stands out from its colour, RGBA."""
    big = side * _SUPER
    middle, radius = big / 2, big / 2 - 1
    dark = sum(COLORS[color]) < 330
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)

    def around(points: int, inner: float = 1.0, turn: float = -math.pi / 2) -> list:
        return [
            (middle + r * math.cos(a), middle + r * math.sin(a))
            for i in range(points)
            for a in [turn + 2 * math.pi * i / points]
            for r in [radius * (inner if i % 2 else 1.0)]
        ]

    if kind in ("circle", "ring"):
        draw.ellipse((1, 1, big - 2, big - 2), fill=255)
        if kind == "ring":
            hole = 0.48 * radius
            draw.ellipse((middle - hole, middle - hole, middle + hole, middle + hole), fill=0)
    elif kind == "square":
        inset = 0.09 * big
        draw.rectangle((inset, inset, big - inset, big - inset), fill=255)
    elif kind == "triangle":
        draw.polygon([(middle, 1), (big - 2, big - 0.08 * big), (1, big - 0.08 * big)], fill=255)
    elif kind == "diamond":
        draw.polygon(around(4), fill=255)
    elif kind == "star":
        draw.polygon(around(10, inner=0.42), fill=255)
    elif kind == "cross":
        arm = 0.18 * big
        draw.rectangle((middle - arm, 1, middle + arm, big - 2), fill=255)
        draw.rectangle((1, middle - arm, big - 2, middle + arm), fill=255)
    else:  # heart
        lobe = 0.27 * big
        for x in (0.29 * big, 0.71 * big):
            draw.ellipse((x - lobe, 0.08 * big, x + lobe, 0.08 * big + 2 * lobe), fill=255)
        draw.polygon([(0.045 * big, 0.44 * big), (0.955 * big, 0.44 * big), (middle, big - 2)], 255)
    width = int(1.4 * _SUPER)
    inner = mask
    for dx, dy in ((width, 0), (-width, 0), (0, width), (0, -width)):
        moved = Image.new("L", mask.size, 0)
        moved.paste(mask, (dx, dy))
        inner = ImageChops.darker(inner, moved)
    sprite = Image.new("RGBA", mask.size, (250, 250, 250, 0) if dark else (16, 16, 16, 0))
    sprite.putalpha(mask)
    sprite.paste(COLORS[color], (0, 0), inner)
    return sprite.resize((side, side), Image.Resampling.LANCZOS)


@functools.cache
def _atlas() -> Image.Image:
    with Image.open(_FOLDER / "sprites.png") as atlas:
        return atlas.convert("RGBA")


@functools.cache
def _sprite(code: int, side: int) -> Image.Image:
    number = [*SPRITES.values(), *DISTRACTORS].index(code)
    row, col = divmod(number, ATLAS_ROW)
    x, y = col * ATLAS_CELL, row * ATLAS_CELL
    cell = _atlas().crop((x, y, x + ATLAS_CELL, y + ATLAS_CELL))
    return cell.resize((side, side), Image.Resampling.LANCZOS)


@functools.cache
def _glyph(character: str) -> Image.Image:
    """Coverage of a character in its 16 × 16 cell, "L"."""
    cell = CELL * PATCH
    with Image.open(_FOLDER / "glyphs.png") as glyphs:
        x = CHARACTERS.index(character) * cell
        return glyphs.convert("L").crop((x, 0, x + cell, cell))
