"""The reader of images: every kind of file equals what a person sees, or is refused by name."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from tokprune.cli.visuals import open_video
from tokprune.errors import PictureError
from tokprune.inputs.pictures import read_picture
from tokprune.inputs.pixel_limits import check_shape

ORIENTATION = 0x0112


def colours(width: int = 7, height: int = 5, seed: int = 0) -> Image.Image:
    """Every pixel another colour, so that nothing looks the same turned."""
    count = width * height
    values = [((37 * n + seed) % 256, (91 * n + 5) % 256, (13 * n + n // 7) % 256)
              for n in range(count)]  # fmt: skip
    return Image.frombytes("RGB", (width, height), bytes(v for value in values for v in value))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def png(depth: int, kind: int, size: tuple[int, int], rows: bytes, *chunks: bytes) -> bytes:
    """A PNG file by hand: of depths that Pillow does not write. Chunks are name and data."""

    def chunk(content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
        )

    header = b"IHDR" + struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    parts = [header, *chunks, b"IDAT" + zlib.compress(rows), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, parts))


def refusal(source: Any, name: str = "NAME") -> str:
    with pytest.raises(PictureError) as caught:
        read_picture(source, name)
    text = str(caught.value)
    assert text.startswith(name)
    assert "\n" not in text
    return text


# ----------------------------------------------------------------------------- orientation

#: (first row, first column) as the EXIF standard describes the eight orientations: where pixel
#: (x, y) of the file stands in the upright image of (width, height)
PLACES: dict[int, Callable[[int, int, int, int], tuple[int, int]]] = {
    1: lambda x, y, w, h: (x, y),  # top, left
    2: lambda x, y, w, h: (w - 1 - x, y),  # top, right
    3: lambda x, y, w, h: (w - 1 - x, h - 1 - y),  # bottom, right
    4: lambda x, y, w, h: (x, h - 1 - y),  # bottom, left
    5: lambda x, y, w, h: (y, x),  # left, top
    6: lambda x, y, w, h: (w - 1 - y, x),  # right, top
    7: lambda x, y, w, h: (w - 1 - y, h - 1 - x),  # right, bottom
    8: lambda x, y, w, h: (y, h - 1 - x),  # left, bottom
}


def upright(stored: Image.Image, orientation: int) -> Image.Image:
    size = stored.size if orientation < 5 else stored.size[::-1]
    result = Image.new("RGB", size)
    for x in range(stored.width):
        for y in range(stored.height):
            result.putpixel(PLACES[orientation](x, y, *size), stored.getpixel((x, y)))
    return result


FORMS: list[tuple[str, str, dict[str, Any]]] = [
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    *(("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    *(("JPEG", mode, {"quality": 95}) for mode in ("L", "RGB", "CMYK")),
    *(("WEBP", mode, {"lossless": True}) for mode in ("RGB", "RGBA")),
    ("MPO", "RGB", {}),
    *([("AVIF", "RGB", {})] if "avif" in features.modules and features.check("avif") else []),
]


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    orientation=st.sampled_from(list(PLACES)),
    width=st.integers(1, 9),
    height=st.integers(1, 9),
    open_first=st.booleans(),
)
def test_photos_stand_upright(
    form: tuple[str, str, dict[str, Any]], orientation: int, width: int, height: int,
    open_first: bool,
) -> None:  # fmt: skip
    kind, mode, options = form
    image = colours(width, height).convert(mode)
    plain = read_picture(saved(image, kind, **options), "plain")
    turned: Any = saved(image, kind, exif=exif(orientation), **options)
    seen = read_picture(Image.open(io.BytesIO(turned)) if open_first else turned, "turned")
    assert plain.size == image.size
    assert seen.size == (plain.size if orientation < 5 else plain.size[::-1])
    assert seen.tobytes() == upright(plain, orientation).tobytes()
    again = read_picture(seen, "again")  # what was turned is not turned twice
    assert (again.size, again.tobytes()) == (seen.size, seen.tobytes())


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_greys_of_16_bits_are_turned(form: str) -> None:
    grey = colours().convert("L")
    wide = grey.convert("I").point(lambda v: v * 257).convert("I;16")
    seen = read_picture(saved(wide, form, exif=exif(6)), "x")
    assert seen.tobytes() == upright(grey.convert("RGB"), 6).tobytes()


@pytest.mark.parametrize(
    "bad", [b"", b"Exif\0\0", b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff"]
)
def test_broken_exif_turns_nothing(bad: bytes) -> None:
    image = colours()
    data = saved(image, "PNG", exif=bad) if bad else saved(image, "PNG")
    assert read_picture(data, "x").tobytes() == image.tobytes()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientations_turn_nothing(orientation: int) -> None:
    image = colours()
    data = saved(image, "PNG", exif=exif(orientation))
    assert read_picture(data, "x").tobytes() == image.tobytes()


def test_tags_that_cameras_got_wrong_do_no_harm() -> None:
    """Turning must not depend on the other tags."""
    tags = exif(3)
    data = bytearray(tags.tobytes())
    at = data.index(struct.pack("<H", ORIENTATION) if data[6:8] == b"II" else b"\x01\x12")
    count = at - 2  # a second entry, of a type that does not exist, pointing nowhere
    order = "<" if data[6:8] == b"II" else ">"
    data[count:at] = struct.pack(order + "H", 2)
    data[at + 12 : at + 12] = struct.pack(order + "HHII", 0x9286, 99, 7, 0xFFFFFF)
    image = colours()
    seen = read_picture(saved(image, "PNG", exif=bytes(data)), "x")
    assert seen.tobytes() == upright(image, 3).tobytes()


# -------------------------------------------------------------------------------- many bits


def wide_greys() -> tuple[Image.Image, list[int]]:
    levels = list(range(256))
    grey = Image.frombytes("L", (16, 16), bytes(levels))
    return grey, [257 * v for v in levels]


def packed(values: list[int], order: str = "<") -> bytes:
    return struct.pack(f"{order}{len(values)}H", *values)


def test_greys_of_16_bits_equal_those_of_8() -> None:
    grey, values = wide_greys()
    little = Image.frombytes("I;16", (16, 16), packed(values))
    big = Image.frombytes("I;16B", (16, 16), packed(values, ">"))
    wide = little.convert("I")
    netpbm = b"P5 16 16 65535\n" + packed(values, ">")
    jpeg2000 = [saved(little, "JPEG2000")] if features.check("jpg_2000") else []
    for source in (
        little, big, wide, netpbm, *jpeg2000,
        saved(little, "PNG"), saved(little, "TIFF"), saved(big, "TIFF"),
        saved(wide, "TIFF"),
    ):  # fmt: skip
        assert read_picture(source, "x").tobytes() == grey.convert("RGB").tobytes()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=40))
def test_greys_of_16_bits_are_rounded(values: list[int]) -> None:
    wide = Image.frombytes("I;16", (len(values), 1), packed(values))
    seen = read_picture(saved(wide, "PNG"), "x").tobytes()[::3]
    assert list(seen) == [round(v / 257) for v in values]


def test_a_dark_16_bit_file_stays_dark() -> None:
    dark = Image.frombytes("I;16", (2, 1), packed([10, 200]))
    assert read_picture(saved(dark, "PNG"), "x").tobytes() == bytes([0] * 3 + [1] * 3)


def test_tiff_says_how_deep_and_which_end_is_white() -> None:
    def tiff(bits: int, white_is_zero: bool, data: bytes, width: int) -> bytes:
        entries = [(256, width), (257, 1), (258, bits), (259, 1), (262, int(not white_is_zero)),
                   (273, 8), (277, 1), (278, 1), (279, len(data))]  # fmt: skip
        listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
        body = data + b"\0" * (len(data) % 2)
        head = b"II*\0" + struct.pack("<I", 8 + len(body))
        return head + body + struct.pack("<H", len(entries)) + listed + b"\0" * 4

    values = [0, 257, 65535, 30000]
    plain = read_picture(tiff(16, False, packed(values), 4), "x").tobytes()[::3]
    assert list(plain) == [0, 1, 255, 117]
    negative = read_picture(tiff(16, True, packed(values), 4), "x").tobytes()[::3]
    assert list(negative) == [255, 254, 0, 138]
    twelve = read_picture(tiff(12, False, bytes([0xFF, 0xF0, 0x00]), 2), "x").tobytes()[::3]
    assert list(twelve) == [255, 0]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("F", (3, 2), 0.5), "floating-point greys"),
        (Image.new("I", (3, 2), 70000), "integers from 70000 to 70000"),
        (Image.new("I", (3, 2), -1), "integers from -1 to -1"),
        (Image.new("I", (3, 2), 200), "integers from 200 to 200"),
    ],
)
def test_greys_without_a_white_are_refused(image: Image.Image, said: str) -> None:
    for source in (image, saved(image, "TIFF")):
        text = refusal(source)
        assert said in text
        assert "8 or 16 bits" in text


def test_16_bits_in_colour() -> None:
    values = [0x1234, 0xFFFF, 0x0080]
    data = png(16, 2, (1, 1), b"\0" + packed(values, ">"))
    assert list(read_picture(data, "x").tobytes()) == [0x12, 0xFF, 0x00]


# ----------------------------------------------------------------------------- transparency


def see_through() -> Image.Image:
    image = colours().convert("RGBA")
    image.putalpha(Image.frombytes("L", image.size, bytes((n * 53) % 256 for n in range(35))))
    return image


def on_white(image: Image.Image) -> list[tuple[int, ...]]:
    """Blended by hand."""
    rgba = image.convert("RGBA").tobytes()
    return [
        tuple(c * rgba[n + 3] / 255 + 255 - rgba[n + 3] for c in rgba[n : n + 3])  # type: ignore[misc]
        for n in range(0, len(rgba), 4)
    ]


def near(seen: Image.Image, wanted: list[tuple[int, ...]], most: float = 1) -> bool:
    data = seen.tobytes()
    flat = [c for pixel in wanted for c in pixel]
    return len(data) == len(flat) and max(abs(a - b) for a, b in zip(data, flat)) <= most


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "open"])
def test_transparency_shows_white(form: str) -> None:
    image = see_through()
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    source = image if form == "open" else saved(image, form, **options)
    seen = read_picture(source, "x")
    assert near(seen, on_white(image))
    assert image.mode == "RGBA"
    grey = image.convert("LA")
    assert near(read_picture(grey, "x"), on_white(grey))
    hidden = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert read_picture(hidden, "x").tobytes() == b"\xff" * 48
    opaque = image.convert("RGB").convert("RGBA")
    assert read_picture(opaque, "x").tobytes() == image.convert("RGB").tobytes()


def test_premultiplied_colours() -> None:
    image = see_through()
    assert near(read_picture(image.convert("RGBa"), "x"), on_white(image), 2)
    grey = image.convert("LA")
    assert near(read_picture(grey.convert("La"), "x"), on_white(grey), 2)


def test_palettes_equal_their_colours() -> None:
    image = see_through()
    palette = colours().quantize(16)
    alphas = bytes(16 * n for n in range(16))
    some = read_picture(saved(palette, "PNG", transparency=alphas), "x")
    with Image.open(io.BytesIO(saved(palette, "PNG", transparency=alphas))) as opened:
        assert some.tobytes() == read_picture(opened.convert("RGBA"), "x").tobytes()
        assert near(some, on_white(opened.convert("RGBA")))
    one = read_picture(saved(palette, "PNG", transparency=3), "x")
    gif = read_picture(saved(palette, "GIF", transparency=3), "x")
    indices = palette.tobytes()
    plain = palette.convert("RGB").tobytes()
    wanted = [(255, 255, 255) if index == 3 else tuple(plain[3 * n : 3 * n + 3])
              for n, index in enumerate(indices)]  # fmt: skip
    assert near(one, wanted, 0)
    assert near(gif, wanted, 0)
    with_alpha = image.quantize(32).convert("PA")
    assert near(read_picture(with_alpha, "x"), on_white(with_alpha))


@pytest.mark.parametrize(
    ("depth", "kind", "rows", "key", "wanted"),
    [
        (1, 0, b"\0\x40", 0, [255, 255]),
        (1, 0, b"\0\x40", 1, [0, 255]),
        (2, 0, b"\0\x60", 1, [255, 170]),
        (4, 0, b"\0\x3b", 3, [255, 187]),
        (8, 0, b"\0\x07\x50", 7, [255, 80]),
        (16, 0, b"\0\x12\x34\x80\x80", 0x1234, [255, 128]),
        (16, 2, b"\0" + b"\x12\x34" * 3 + b"\x80\x80" * 3, 0x1234, [255, 128]),
        (8, 2, b"\0" + b"\x12" * 3 + b"\x80" * 3, 0x12, [255, 128]),
    ],
)
def test_one_value_stands_for_transparent(
    depth: int, kind: int, rows: bytes, key: int, wanted: list[int]
) -> None:
    values = b"tRNS" + packed([key] * (3 if kind == 2 else 1), ">")
    seen = read_picture(png(depth, kind, (2, 1), rows, values), "x").tobytes()
    assert list(seen) == [v for v in wanted for _ in range(3)]


# --------------------------------------------------------------------------- colour spaces


def test_colour_spaces() -> None:
    flat = Image.new("RGB", (8, 8), (180, 60, 30))
    for mode, most in (("YCbCr", 2), ("HSV", 3), ("LAB", 3), ("CMYK", 0), ("RGBX", 0)):
        assert near(read_picture(flat.convert(mode), "x"), [(180, 60, 30)] * 64, most)
    for form, image, most in (
        ("TIFF", flat.convert("LAB"), 3),
        ("TIFF", flat.convert("CMYK"), 0),
        ("JPEG", flat.convert("CMYK"), 3),  # as Adobe writes them: inverted
        ("JPEG", flat, 3),
    ):
        seen = read_picture(saved(image, form), "x")
        assert near(seen, [(180, 60, 30)] * 64, most), (form, image.mode)


def test_black_and_white() -> None:
    image = Image.frombytes("1", (8, 1), b"\xa5")
    wanted = [255 * int(bit) for bit in "10100101" for _ in range(3)]
    for source in (image, *(saved(image, form) for form in ("PNG", "TIFF", "BMP", "GIF"))):
        assert list(read_picture(source, "x").tobytes()) == wanted


# ------------------------------------------------------------------------------- animations


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations_show_their_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (9, 6), (60 * n, 250 - 60 * n, 90)) for n in range(4)]
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert read_picture(data, "x").tobytes() == frames[0].tobytes()
    moving: Any = Image.open(io.BytesIO(data))
    moving.seek(2)
    assert read_picture(moving, "x").tobytes() == frames[2].tobytes()


def test_frames_of_a_video_stand_upright(tmp_path: Path) -> None:
    frames = [colours(seed=40 * n) for n in range(5)]
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "clip" / f"{number}.png", exif=exif(8))
    (tmp_path / "clip" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    frames[0].save(
        tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True,
        exif=exif(8).tobytes(),
    )  # fmt: skip
    wanted = [upright(frame, 8).tobytes() for frame in frames]
    for name in ("clip", "clip.webp"):
        clip = open_video(tmp_path / name, 9)
        assert [frame.tobytes() for frame in clip.frames] == wanted
        assert clip.total == 5
    assert [f.tobytes() for f in open_video(tmp_path / "clip.webp", 2).frames] == wanted[1::2]


def test_videos_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    frames = [colours(64, 64, seed=40 * n) for n in range(5)]
    data = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "cut.webp").write_bytes(data[: len(data) // 2])
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "0.png").write_bytes(saved(frames[0], "PNG")[:90])
    for name, said in (("cut.webp", "cut off or damaged"), ("clip", "0.png: the image is cut off")):
        with pytest.raises(PictureError, match=rf"^--video {tmp_path / name}.*{said}"):
            open_video(tmp_path / name, 4)
    (tmp_path / "notes.txt").write_text("not a film")
    with pytest.raises(PictureError, match=r"notes.txt: not an image but text$"):
        open_video(tmp_path / "notes.txt", 4)
    with pytest.raises(PictureError, match="an address"):
        open_video("https://example.org/film.mp4", 4)


# ---------------------------------------------------------------------------------- sources


def test_every_source_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = colours(40, 30)
    data = saved(image, "PNG")
    path = tmp_path / "a b.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    lines = "\n".join(text[n : n + 76] for n in range(0, len(text), 76))
    escaped = "".join(f"%{byte:02x}" for byte in data)
    monkeypatch.chdir(tmp_path)
    sources = [
        path, str(path), "a b.png", data, bytearray(data), memoryview(data), io.BytesIO(data),
        image, Image.open(path), text, lines, text.rstrip("="),
        base64.urlsafe_b64encode(data).decode(),
        f"data:image/png;base64,{text}", f"DATA:image/png;charset=utf-8;base64,{lines}",
        f"data:image/png;base64,{text.replace('+', '%2B')}", f"data:image/png,{escaped}",
    ]  # fmt: skip
    with path.open("rb") as file:
        for source in [*sources, file]:
            seen = read_picture(source, "x")
            assert (seen.mode, seen.size, seen.tobytes()) == ("RGB", image.size, image.tobytes())
            assert type(seen) is Image.Image
    jpeg = base64.b64encode(saved(image, "JPEG")).decode()
    assert jpeg.startswith("/9j/")  # as benchmarks have them; it looks like a path
    assert read_picture(jpeg, "x").size == image.size


def test_a_given_image_stays_as_it_is() -> None:
    image = colours()
    seen = read_picture(image, "x")
    seen.putpixel((0, 0), (1, 2, 3))
    assert image.tobytes() == colours().tobytes()
    image.info["dpi"] = (72, 72)
    read_picture(image, "x")
    assert image.info == {"dpi": (72, 72)}


def test_no_file_stays_open(tmp_path: Path) -> None:
    whole, cut = saved(colours(50, 50), "PNG"), saved(colours(50, 50), "JPEG")[:500]
    for number, data in enumerate((whole, cut, b"text", b"")):
        path = tmp_path / str(number)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            try:
                read_picture(path, "x")
            except PictureError:
                assert number
        path.rename(tmp_path / "moved")
    assert not any("moved" in str(f) for f in open_files())


def open_files() -> list[Path]:
    here = Path("/proc/self/fd")
    return [f.resolve() for f in here.iterdir()] if here.is_dir() else []


# ---------------------------------------------------------------------------------- refusals

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b"hello", "not an image but text"),
        (SVG.encode(), "SVG drawing; save it as PNG or JPEG"),
        (f'\ufeff<?xml version="1.0"?>\n<!-- made by hand -->\n{SVG}'.encode(), "SVG drawing"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"%PDF-1.7\n1 0 obj", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC; save it as JPEG or PNG"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isom", "not an image that Pillow can read"),
        (b"\x1a\x45\xdf\xa3" + bytes(60), "not an image that Pillow can read"),
        (b"\0\0\1\xb3\x16\0\xf0\x14" + bytes(60), "not an image that Pillow can read"),  # MPEG
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "not an image that Pillow can read"),
        (b"\x89PNG\r\n\x1a\n", "cut off or damaged"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "cut off or damaged"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (path, data, io.BytesIO(data), f"data:image/png;base64,{coded(data)}"):
        text = refusal(source, "--image picture.png")
        assert said in text
        assert "<_io" not in text


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_cut_off_files_are_named(form: str, share: float) -> None:
    data = saved(colours(97, 83), form)
    text = refusal(data[: max(12, int(share * len(data)))])
    assert "cut off or damaged" in text


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_of_any_kind_is_ours_to_report(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA"]))
    content = bytearray(saved(colours(13, 11), form))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_picture(bytes(content), "NAME")
    except PictureError:
        refusal(bytes(content))


def test_places_without_an_image_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.png", "--image none.png") == "--image none.png: no such file"
    assert refusal(str(tmp_path / "none.png")).endswith(": no such file")
    assert "a folder" in refusal(tmp_path)
    assert "not a plain file" in refusal(Path("/dev/null"))
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    assert "no such file" in refusal("with\0null")
    for address in ("http://example.org/a.png", "https://x.org/a", "s3://b/k", "file:///a.png"):
        assert "an address, and nothing is fetched" in refusal(address)
    assert "an address" in refusal(Path("https://example.org/a.png"))
    assert "'text/plain'" in refusal("data:text/plain;base64,aGVsbG8=")
    assert "should be of type 'image/…'" in refusal("data:,hello")
    assert "not valid base64" in refusal("data:image/png;base64,@@@@")
    assert "not valid base64" in refusal("data:image/png;base64,abcde")
    assert "SVG" in refusal(f"data:image/svg+xml,{SVG}")
    assert "empty" in refusal("data:image/png;base64,")
    assert "no such file" in refusal(coded(b"no picture at all, but long enough"))
    assert "no base64 of an image" in refusal("abcd" * 400 + "!")
    cut = saved(colours(60, 60), "PNG")[:300]
    assert "cut off" in refusal(coded(cut))


def test_files_that_nobody_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(saved(colours(), "PNG"))

    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    assert refusal(path, "--image x").startswith("--image x: cannot be read (Permission denied)")


@pytest.mark.parametrize("source", [None, 3, {"bytes": b""}, [b""], object()])
def test_other_things_are_no_images(source: Any) -> None:
    assert f"a {type(source).__name__} is no image" in refusal(source)
    assert "open as text" in refusal(io.StringIO("x"))


# --------------------------------------------------------------------------------- too large


def test_more_pixels_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_picture(saved(colours(10, 100), "PNG"), "x").size == (10, 100)
    for size, pixels in (((1, 1001), "1,001"), ((1500, 1), "1,500"), ((60, 90), "5,400")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            text = refusal(saved(Image.new("RGB", size), "PNG"))
        assert f"{pixels} pixels are more than 1,000" in text
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_picture(saved(colours(60, 90), "PNG"), "x").size == (60, 90)


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    rows = b"\0" * 100
    for size in ((60_000, 60_000), (12_000, 9_000), (1, 100_000_000)):
        assert "89,478,485" in refusal(png(1, 0, size, rows))


def test_long_thin_images_are_read_and_kept_from_processors_that_blow_them_up() -> None:
    from transformers import CLIPImageProcessor

    thin = read_picture(saved(Image.new("L", (1, 60_000), 90), "PNG"), "x")
    assert thin.size == (1, 60_000)
    processor = CLIPImageProcessor(size={"shortest_edge": 336})
    check_shape(processor, Image.new("L", (20, 10_000)), "x")
    with pytest.raises(PictureError, match=r"^photo.*1 × 60,000 .* 6,773,760,000 pixels"):
        check_shape(processor, thin, "photo")
    squashed = CLIPImageProcessor(size={"height": 336, "width": 336})
    check_shape(squashed, thin, "x")


@pytest.mark.parametrize("whole", [True, False])
def test_users_may_ask_pillow_to_fill_what_is_missing(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(colours(97, 83), "JPEG")[:-200]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", whole)
    if whole:
        assert read_picture(data, "x").size == (97, 83)
    else:
        refusal(data)


# ------------------------------------------------------------------------------- the commands


def command(*args: Any) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tokprune", *map(str, args)], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def one_line(*args: Any) -> str:
    code, out, err = command(*args)
    lines = err.strip().splitlines()
    assert (code, out, len(lines)) == (2, "", 1), (code, out, err)
    return lines[0]


RUN = ("run", "--model", "mini", "--prompt", "what number is shown ?", "--device", "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question of the mini benchmark as a photo that stands, and as one that a telephone took."""
    from tokprune.eval.benchmarks import load_benchmark

    home = tmp_path_factory.mktemp("photos")
    mini = load_benchmark("mini")
    item = next(x for x in mini.items("test") if x.question == "what number is shown ?")
    image = mini.image(item).convert("L")
    (home / "answer").write_text(item.answers[0])
    image.save(home / "upright.png")
    image.transpose(Image.Transpose.ROTATE_90).save(home / "phone.png", exif=exif(6))
    image.convert("I").point(lambda v: v * 257).convert("I;16").save(home / "wide.png")
    whole = (home / "upright.png").read_bytes()
    (home / "cut.png").write_bytes(whole[: len(whole) // 2])
    return home


def test_run_answers_all_forms_of_a_photo_alike(photos: Path) -> None:
    seen = {}
    for name in ("upright", "phone", "wide"):
        drawn = photos / f"kept-{name}.png"
        code, out, err = command(
            *RUN, "--image", photos / f"{name}.png", "--method", "divprune", "--keep", 144,
            "--overlay", drawn,
        )  # fmt: skip
        assert (code, err) == (0, "")
        with Image.open(drawn) as overlay:
            seen[name] = (out.splitlines()[0], overlay.tobytes())
    assert seen["phone"] == seen["wide"] == seen["upright"]
    assert seen["upright"][0] == (photos / "answer").read_text()


@pytest.mark.parametrize("option", ["--image", "--video"])
def test_run_names_bad_images(photos: Path, tmp_path: Path, option: str) -> None:
    said = one_line(*RUN, option, photos / "cut.png")
    assert said.startswith(f"Error: {option} {photos / 'cut.png'}")
    assert "the image is cut off or damaged" in said
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(1, 0, (12_000, 9_000), b""))
    assert f"{option} {bomb}: 108,000,000 pixels are more than" in one_line(*RUN, option, bomb)
    assert "nothing is fetched" in one_line(*RUN, option, "https://example.org/a.png")


def test_bench_and_run_name_images_too_thin(tmp_path: Path) -> None:
    thin = tmp_path / "thin.png"
    Image.new("L", (1_000_000, 1), 90).save(thin)
    start = f"Error: --image {thin}: an image of 1,000,000 × 1 pixels"
    assert one_line(*RUN, "--image", thin).startswith(start)
    bench = ("bench", "--model", "mini", "--methods", "fastv", "--keep", "12", "--device", "cpu")
    assert one_line(*bench, "--image", thin).startswith(start)


def test_a_sweep_answers_phone_photos_and_names_bad_ones(photos: Path, tmp_path: Path) -> None:
    answer = (photos / "answer").read_text()
    questions = [
        {"id": name, "image": str(photos / f"{name}.png"), "question": "what number is shown ?",
         "answer": answer}
        for name in ("upright", "phone", "wide", "cut")
    ]  # fmt: skip
    file = photos / "questions.jsonl"
    file.write_text("".join(json.dumps({**q, "image": Path(q["image"]).name}) + "\n"
                            for q in questions))  # fmt: skip
    code, _, err = command(
        "sweep", "--model", "mini", "--benchmark", file, "--methods", "divprune", "--keep", "1/4",
        "--no-controls", "--no-noise", "--no-latency", "--device", "cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    rows = [json.loads(x) for x in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["item"], []).append(row)
    for name in ("phone", "wide"):
        assert [r["answer"] for r in by_name[name]] == [r["answer"] for r in by_name["upright"]]
    assert {r["status"] for r in by_name["upright"]} == {"ok"}
    for row in by_name["cut"]:
        assert row["status"] == "failed"
        assert str(file) in row["error"]
        assert "cut.png of item 'cut': the image is cut off or damaged" in row["error"]
