"""The one reader of images that users give: upright, RGB and whole, or refused by name."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote_to_bytes

from tokprune.errors import PictureError

if TYPE_CHECKING:
    from PIL import Image

Source: TypeAlias = "str | PathLike[str] | bytes | IO[bytes] | Image.Image"


class UnknownFormatError(PictureError):
    """Bytes of no format that is known here; they may still be a film."""


def read_picture(source: Source, name: str) -> Image.Image:
    """An image as a person sees it, in RGB.

    - Turned as its EXIF orientation says, as photos of telephones need.
    - Transparency is laid on white, as transformers 5 does (``image_transforms.convert_to_rgb``)
      and Qwen's own reader; a bare ``convert("RGB")``, as in transformers 4, shows the colours
      that were hidden.
    - Greys of 16 bits are scaled to 8 (÷ 257), where ``convert("RGB")`` makes everything above 255
      white. Greys that do not say which value is white (floats, most of 32 bits) are refused.
    - Of an animation the first frame; of an image that is already open the frame it is at.
    - Colour profiles are ignored, as processors do.

    Args:
        source: the path of a file; its bytes; a binary file object; base64 text or a ``data:`` URL
            of it; or an open image of Pillow, which stays as it is. Nothing is ever fetched.
        name: what the user calls it; error texts begin with it.

    Returns:
        An image of its own: all pixels in memory, mode RGB, no file open, no metadata (so that
        reading it again turns nothing).

    Raises:
        PictureError: no such file, not an image, a damaged one, or one of more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS`` (89,478,485 unless changed; None: no limit).
    """
    with opened(source, name) as image:
        return _seen(image)


@contextmanager
def opened(source: Source, name: str) -> Iterator[Image.Image]:
    """The image as Pillow opens it, closed at the end; whatever goes wrong with it until then is
    raised as a :class:`PictureError`."""
    from PIL import Image

    head = b""
    try:
        # Pillow warns where we stop, and of damage that either shows or does not matter
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                yield source
                return
            with _stream(source) as file:
                head = file.read(1024)
                file.seek(0)
                with Image.open(file) as image:
                    if image.format == "EPS":  # Pillow would start another program, Ghostscript
                        raise PictureError("a PostScript drawing; save it as PNG or JPEG")
                    yield image
    except PictureError as error:
        said = str(error)
        raise type(error)(said if said.startswith(name) else f"{name}: {said}") from None
    except Image.UnidentifiedImageError:
        raise _unidentified(head, name) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = re.search(r"\d+", str(error))
        raise PictureError(
            f"{name}: {int(pixels[0]) if pixels else 'too many':,} pixels are more than "
            f"{Image.MAX_IMAGE_PIXELS:,}, the most that are read; shrink the image first, or "
            "raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except MemoryError:
        raise PictureError(f"{name}: the image does not fit in memory") from None
    # decoders meet bytes of any kind, and raise errors of any kind
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"{name}: the image is cut off or damaged ({said})") from None


# ---------------------------------------------------------------------------------- sources

_URL = re.compile(r"(?!data:)[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
#: shorter text is no image in base64, but may well be the name of a file
_SHORTEST = 36


def _stream(source: Any) -> IO[bytes]:
    """The bytes of a source, to be read from their start."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        data = source.read()
        if isinstance(data, bytes):
            return io.BytesIO(data)
        raise PictureError("the file is open as text; open it with mode 'rb'")
    if isinstance(source, str):
        data = _embedded(source)
        if data is not None:
            return io.BytesIO(data)
    elif not isinstance(source, PathLike):
        raise PictureError(
            f"a {type(source).__name__} is no image; give a path, bytes, base64 text, a file open "
            "for reading, or an image of Pillow"
        )
    return _file(Path(source))


def _file(path: Path) -> IO[bytes]:
    try:
        if path.is_file():
            return path.open("rb")
        if path.is_dir():
            raise PictureError("a folder; it should be an image file")
    except (OSError, ValueError) as error:  # too long for a name; a null character
        said = getattr(error, "strerror", None) or str(error)
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"cannot be read ({said})") from None
    raise PictureError("no such file")


def _embedded(text: str) -> bytes | None:
    """What a ``data:`` URL or base64 text holds; None for the name of a file."""
    if _URL.match(text):
        raise PictureError("a web address; nothing is fetched, so download the image and name it")
    if text[:5].lower() == "data:":
        form, comma, body = text[5:].partition(",")
        kind, *marks = (part.strip().lower() for part in form.split(";"))
        if not comma or not kind.startswith("image/"):
            raise PictureError(f"a data URL of type {kind[:40]!r}; it should be of type 'image/…'")
        if "base64" not in marks:
            return unquote_to_bytes(body)
        data = _decoded(unquote_to_bytes(body).decode("ascii", "replace"))
        if data is None:
            raise PictureError("the data URL is not valid base64")
        return data
    if len(text) < _SHORTEST:
        return None
    data = _decoded(text)
    if data is not None and _PICTURE.match(data):
        return data
    if len(text) > 1024:
        raise PictureError("the text is no base64 of an image, and too long for a path")
    return None


def _decoded(text: str) -> bytes | None:
    if not _BASE64.fullmatch(text):
        return None
    plain = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error:
        return None


# -------------------------------------------------------------------------- what it is instead

_PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM|II\*\0|MM\0\*|....ftypavif|\0\0\0\x0cjP|\xff\x4f"
    rb"|P[1-6]\s", re.DOTALL,
)  # fmt: skip
_OTHERS = (
    (rb"\A\Z", "the file is empty"),
    (_PICTURE.pattern, "the image is cut off or damaged"),
    (rb"\s*(<\?xml.*?)?(<!--.*?-->\s*)?(<!doctype\s+svg.*?)?<svg",
     "not an image of pixels but an SVG drawing; save it as PNG or JPEG"),
    (rb"\s*<(!doctype html|html|head|body)", "not an image but a web page"),
    (rb"version https://git-lfs", "not an image but a pointer of Git LFS; run 'git lfs pull'"),
    (rb"%PDF", "not an image but a PDF; save its page as PNG or JPEG"),
    (rb"%!PS", "not an image of pixels but a PostScript drawing; save it as PNG or JPEG"),
    (rb"....ftyp(hei|hev|mif1|msf1)",
     "not an image that Pillow can read but HEIC; save it as JPEG or PNG"),
)  # fmt: skip


def _unidentified(head: bytes, name: str) -> PictureError:
    plain = head.removeprefix(b"\xef\xbb\xbf")
    for pattern, what in _OTHERS:
        if re.match(pattern, plain, re.DOTALL | re.IGNORECASE):
            return PictureError(f"{name}: {what}")
    if not re.search(rb"[\0-\x08\x0e-\x1f]", head):
        return PictureError(f"{name}: not an image but text")
    return UnknownFormatError(f"{name}: not an image that Pillow can read")


# ---------------------------------------------------------------------------------- pixels


def _seen(image: Image.Image) -> Image.Image:
    """A new image, RGB and upright."""
    from PIL import Image

    image.load()
    turn = _turn(image)
    plain = image
    if image.mode == "La":  # Pillow knows the way to LA only
        plain = image.convert("LA")
    elif image.mode.startswith(("I", "F")):
        plain = _grey(image)
    if plain.has_transparency_data:
        plain = plain.convert("RGBA")
        plain = Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain)
    plain = plain.convert("RGB")
    plain.info = {}
    return plain if turn is None else plain.transpose(turn)


def _turn(image: Image.Image) -> Any:
    """What makes an image upright, None for nothing; broken EXIF data says nothing.

    Numbers as in the EXIF standard 2.3 (tag 0x0112). Not ``ImageOps.exif_transpose``: it writes the
    other tags anew, and fails on those that cameras got wrong.
    """
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        return turns.get(image.getexif().get(0x0112, 1))
    except Exception:
        return None


def _grey(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits as 8, with alpha where one value stands for transparent."""
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits, signed = tags.get(258, (16,))[0], tags.get(339, (1,))[0] != 1
    if image.mode == "F":
        raise PictureError(
            "floating-point greys do not say which value is white; save the image with 8 or 16 bits"
        )
    wide = image.convert("I")
    low, high = (int(value) for value in wide.getextrema())  # type: ignore[arg-type]
    sure = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    if not sure and (low < 0 or 0 < high < 256 or high > 65535 or (signed and bits == 16)):
        raise PictureError(
            f"integers from {low} to {high} do not say which value is white; save the image with "
            "8 or 16 bits without sign"
        )
    white = (1 << bits) - 1 if bits < 16 else 65535
    scaled = [min(round(255 * value / white), 255) for value in range(65536)]
    if tags.get(262) == 0:  # white is zero, which Pillow overlooks at 16 bits
        scaled.reverse()
    grey = wide.point(scaled, "L")
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.info.pop("transparency", None)
        grey.putalpha(wide.point([255 * (value != key) for value in range(65536)], "L"))
    return grey
