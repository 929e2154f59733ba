"""The picture of what was kept: grey where dropped, itself where kept, one colour per merge."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from methods_table import ALL
from pictures import landscape
from PIL import Image
from toy_methods import DropInDecoder, MergeAtInput, MergeInTower

import tokprune
from tokprune.trace.overlay import _as_seen, _boards, _draw
from tokprune.trace.provenance import image_stages

SIZE = 120  # 20 pixels per cell
CELL = SIZE // tiny.GRID


def traced(model: Any, method: Any, prompts: list[list[Any]], **options: Any) -> tokprune.Trace:
    inputs = tiny.make_inputs(model, prompts, **options)
    with torch.no_grad(), tokprune.compress(model, method) as trace:
        model(**inputs)
    return trace


def drawn(trace: tokprune.Trace, picture: Image.Image, stage: int = -1) -> list[Image.Image]:
    """The boards of one stage."""
    assert trace.last is not None
    image = trace.last.images[0]
    tokens = image_stages(trace.last, image)[stage].tokens
    assert image.record is not None
    return [_draw(b, tokens) for b in _boards(picture, image.record, None, SIZE)]


def middle(board: Image.Image, row: int, col: int, cell: int = CELL) -> tuple[int, ...]:
    pixel = board.getpixel((col * cell + cell // 2, row * cell + cell // 2))
    assert isinstance(pixel, tuple)
    return pixel


RED = (200, 30, 30)


def test_kept_clear_dropped_grey() -> None:
    trace = traced(tiny.llava(), tokprune.Random(keep=10), [[4, "image", 6]])
    (board,) = drawn(trace, Image.new("RGB", (300, 200), RED))
    assert board.size == (SIZE, SIZE)
    kept = {(t.row, t.col) for t in trace.kept()}
    for row in range(tiny.GRID):
        for col in range(tiny.GRID):
            r, g, b = middle(board, row, col)
            assert ((r, g, b) == RED) == ((row, col) in kept)
            assert (row, col) in kept or r == g == b


def test_survivors_are_outlined() -> None:
    trace = traced(tiny.llava(), DropInDecoder(keep=1), [[4, "image", 6]])
    (board,) = drawn(trace, Image.new("RGB", (60, 60), RED))
    for at in (0, CELL - 1):
        assert board.getpixel((at, CELL // 2)) == (255, 176, 0)
        assert board.getpixel((CELL // 2, at)) == (255, 176, 0)
    assert board.getpixel((CELL, CELL // 2)) != (255, 176, 0)


@pytest.mark.parametrize("method", [MergeAtInput(step=2), MergeInTower()])
def test_merged_patches_share_a_colour(method: Any) -> None:
    trace = traced(tiny.llava(), method, [[4, "image", 6]])
    (board,) = drawn(trace, Image.new("RGB", (60, 60), (128, 128, 128)))
    colours = set()
    for token in trace.kept():
        assert token.sources is not None
        shades = {middle(board, r, c) for _, r, c in token.sources}
        assert len(shades) == 1
        colours |= shades
        # no line inside a group
        (_, row, left), (_, _, right) = token.sources
        assert board.getpixel((right * CELL, row * CELL + CELL // 2)) == next(iter(shades))
        assert right == left + 1
    assert len(colours) > 12


def test_tiles_are_stitched_and_unpadded() -> None:
    picture = Image.new("RGB", (400, 200), RED)
    trace = traced(
        tiny.llava_next(), DropInDecoder(keep=200), [[4, "image", 6]], sizes=[(200, 400)]
    )
    base, high = drawn(trace, picture)
    assert base.size == (SIZE, SIZE)
    assert high.size == (SIZE, SIZE // 2)  # 12 x 6 cells of ten pixels, nothing padded
    assert all(middle(high, r, c, 10) == RED for r in range(6) for c in range(12))
    narrow = traced(
        tiny.llava_next(), DropInDecoder(keep=200), [[4, "image", 6]], sizes=[(100, 400)]
    )
    _, high = drawn(narrow, picture.resize((400, 100)))
    assert high.size[0] > 2 * high.size[1]  # rows of padding are cut off


def test_tile_cells_stand_where_the_picture_shows_them() -> None:
    """Tile 2 of a wide picture is its right half."""
    picture = Image.new("RGB", (400, 200), (0, 0, 255))
    picture.paste(RED, (200, 0, 400, 200))
    trace = traced(
        tiny.llava_next(), tokprune.Random(keep=40), [[4, "image", 6]], sizes=[(200, 400)]
    )
    _, high = drawn(trace, picture)
    for token in trace.kept():
        if token.tile > 0:
            col = token.col + tiny.GRID * (token.tile - 1)
            expected = RED if token.tile == 2 else (0, 0, 255)
            assert middle(high, token.row, col, 10) == expected


def test_overlay_shows_each_change_once(tmp_path: Path) -> None:
    model = tiny.llava()
    widths = {}
    for name, method in {
        "one": tokprune.Random(keep=5),
        "two": tokprune.compose(tokprune.Random(keep=9), DropInDecoder(keep=3)),
        "three": tokprune.compose(MergeInTower(), tokprune.Random(keep=9), DropInDecoder(keep=3)),
        "none": tokprune.Random(keep=1.0),
    }.items():
        path = tmp_path / f"{name}.png"
        result = tokprune.overlay(traced(model, method, [[4, "image", 6]]), landscape(), path)
        with Image.open(path) as saved:
            assert saved.size == result.size
        widths[name] = result.width
    panel = widths["one"] - widths["none"]
    assert panel > 400
    assert widths["two"] - widths["one"] == panel
    assert widths["three"] - widths["two"] == panel


def test_several_images_and_rows() -> None:
    trace = traced(
        tiny.llava(), tokprune.Random(keep=5), [[4, "image", 6], [2, "image", 1, "image", 2]]
    )
    one = tokprune.overlay(trace, landscape())
    two = tokprune.overlay(trace, [landscape(), landscape(100, 300)], row=1)
    assert two.height > 1.8 * one.height
    with pytest.raises(ValueError, match=r"1 image\(s\) for batch row 1, which has 2"):
        tokprune.overlay(trace, landscape(), row=1)


@pytest.mark.parametrize("picture", [(37, 21), (1, 1), (4000, 30)])
@pytest.mark.parametrize("family", tiny.BUILDERS)
def test_any_picture_size(picture: tuple[int, int], family: str) -> None:
    sizes = [(picture[1], picture[0])]
    trace = traced(tiny.BUILDERS[family](), tokprune.Random(keep=5), [[4, "image", 6]], sizes=sizes)
    result = tokprune.overlay(trace, Image.new("L", picture))
    assert result.mode == "RGB"
    assert min(result.size) >= 400


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("family", tiny.BUILDERS)
def test_every_method_can_be_drawn(family: str, name: str) -> None:
    method, options = ALL[name]
    trace = traced(
        tiny.BUILDERS[family](), tokprune.make_method(method, **options), [[4, "image", 6]]
    )
    plain = traced(tiny.BUILDERS[family](), tokprune.Random(keep=1.0), [[4, "image", 6]])
    picture = landscape(40, 20)
    assert (
        tokprune.overlay(trace, picture, size=96).width
        > tokprune.overlay(plain, picture, size=96).width
    )


# ------------------------------------------------------------------ the processor's crop


def test_centre_crop_is_reproduced() -> None:
    import tiny_processor

    model = tiny.llava()
    processor = tiny_processor.processor(model)
    picture = Image.new("RGB", (300, 100), (0, 0, 255))
    picture.paste(RED, (100, 0, 200, 100))
    seen = _as_seen(picture, processor)
    assert seen.size == (100, 100)
    assert seen.getcolors() == [(10000, RED)]
    assert _as_seen(picture, None) is picture
    # and that is what the model gets
    pixels = processor.image_processor(picture, do_normalize=False, return_tensors="pt")
    red = torch.tensor(RED) / 255
    # (resampling blurs the first and last columns)
    inner = pixels["pixel_values"][0, :, :, 2:-2]
    assert torch.allclose(inner, red[:, None, None].expand_as(inner), atol=0.02)


def test_padding_and_squashing_processors() -> None:
    picture = Image.new("RGB", (300, 100), RED)
    padding = SimpleNamespace(
        do_pad=True, image_mean=(0.0, 0.0, 0.0), do_center_crop=True,
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
    )  # fmt: skip
    seen = _as_seen(picture, padding)
    assert seen.size == (300, 300)
    assert (seen.getpixel((150, 50)), seen.getpixel((150, 150))) == ((0, 0, 0), RED)
    squash = SimpleNamespace(do_center_crop=None, size={"height": 24, "width": 24})
    assert _as_seen(picture, SimpleNamespace(image_processor=squash)) is picture


def test_embeddings_cannot_be_drawn() -> None:
    model = tiny.llava()
    visual = torch.zeros(1, 20, dtype=torch.bool)
    visual[:, 5:15] = True
    with (
        torch.no_grad(),
        tokprune.visual_positions(visual),
        tokprune.compress(model, DropInDecoder(keep=4)) as trace,
    ):
        model(inputs_embeds=torch.randn(1, 20, 32))
    with pytest.raises(ValueError, match="inputs_embeds"):
        tokprune.overlay(trace, landscape())
