"""Where the images of a question are: files of a folder, text in base64, bytes of the row, or
another row."""

from __future__ import annotations

import ast
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from tokprune.eval.benchmarks.files.containers.base import STORED, short

#: longer text of these letters alone is an image in base64; shorter text may name another row
#: (the border is VLMEvalKit's)
_LONGEST_NAME = 64
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Embedded(str):
    """An image in base64, or a data URL of one."""


class OtherRow(str):
    """The index of another row, which has the image."""


Image: TypeAlias = "Path | bytes | Embedded | OtherRow | Any"


class ImageFolder:
    """Files of images. Only what lies in the folder is taken, so that a file of questions from
    somebody else cannot show what it likes.

    Args:
        home: folder of the file of questions.
        folder: the one that the user names; None: ``home``.

    Raises:
        OSError: no such folder.
    """

    def __init__(self, home: Path, folder: str | Path | None) -> None:
        self.root = home if folder is None else Path(folder).expanduser()
        self._places = tuple(dict.fromkeys((self.root, home)))
        self._hint = "" if folder is not None else "; --images names the folder of the images"
        if not self.root.is_dir():
            raise FileNotFoundError(f"images {self.root}: no such folder")
        self._real = os.path.realpath(self.root)
        self._real_folder = lru_cache(1024)(os.path.realpath)
        #: questions about one image mostly stand together
        self._looked_up = lru_cache(1024)(self._look_up)
        self._stems: dict[str, list[str]] | None = None

    def find(self, name: str, where: str) -> Path:
        """The file of an image by its path, relative to the folder (or, where that leads into the
        folder as well, to the file of questions).

        Raises:
            FileNotFoundError: no such file.
            ValueError: it lies outside the folder, or is no file; names the place.
        """
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
            raise ValueError(
                f"{where}: {name[:200]}: a web address; images are read from files, so download "
                "them and name their folder with --images"
            )
        try:
            path, outside = self._looked_up(name)
        except (OSError, ValueError) as error:  # a name too long, a null character
            said = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"{where}: {short(name)}: no usable path ({said})") from None
        if path is not None:
            return path
        if outside:
            raise ValueError(
                f"{where}: {name}: lies outside the folder {self.root}; name the folder that may "
                "be read with --images ('--images /' allows all)"
            )
        raise FileNotFoundError(f"{where}: {name}: no such file in {self.root}{self._hint}")

    def _look_up(self, name: str) -> tuple[Path | None, bool]:
        """The file of that name in the folder, or whether there is one outside."""
        outside = False
        for place in self._places:
            path = place / name
            if _is_file(path):
                if self._inside(path):
                    return path, False
                outside = True
        return None, outside

    def find_id(self, name: str, where: str) -> Path:
        """The file of an image by its id: as it is, with a suffix, or numbered as in COCO
        (``COCO_val2014_000000000042.jpg``, ``000000000042.jpg``).

        Raises:
            FileNotFoundError: no such file.
            ValueError: several such files, or one outside the folder.
        """
        if Path(name).suffix.lower() in _SUFFIXES or "/" in name:
            return self.find(name, where)
        stems = self._by_stem()
        found = stems.get(name) or (stems.get(f"#{int(name)}") if name.isdecimal() else None)
        if not found:
            also = (
                f", {int(name):012}.jpg or COCO_…_{int(name):012}.jpg" if name.isdecimal() else ""
            )
            raise FileNotFoundError(
                f"{where}: {name}: no file {name}.jpg, {name}.png{also} in {self.root}{self._hint}"
            )
        if len(found) > 1:
            raise ValueError(
                f"{where}: {name}: may be {' or '.join(sorted(found)[:3])} in {self.root}; there "
                "should be one"
            )
        return self.find(found[0], where)

    def name_of(self, path: Path) -> str:
        """A file relative to the folder, with forward slashes."""
        for place in self._places:
            if path.is_relative_to(place):
                return path.relative_to(place).as_posix()
        return path.as_posix()

    def _by_stem(self) -> dict[str, list[str]]:
        """Names of files by stem, and by number (``#42``) where they are numbered as in COCO."""
        if self._stems is None:
            self._stems = {}
            with os.scandir(self.root) as entries:
                for entry in entries:
                    stem, suffix = os.path.splitext(entry.name)
                    if suffix.lower() not in _SUFFIXES:
                        continue
                    self._stems.setdefault(stem, []).append(entry.name)
                    if number := re.fullmatch(r"(?:COCO_\w+_)?(\d{12})", stem):
                        self._stems.setdefault(f"#{int(number[1])}", []).append(entry.name)
        return self._stems

    def _inside(self, path: Path) -> bool:
        folder, name = os.path.split(path)
        real = os.path.join(self._real_folder(folder), name)
        if os.path.islink(real):
            real = os.path.realpath(real)
        return os.path.commonpath((real, self._real)) == self._real


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def listed(value: Any) -> Any:
    """A list that a cell of a table holds as text, JSON's or Python's; anything else as it is."""
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list):
            return found
    return value


def resolve(
    value: Any, where: str, folder: ImageFolder, names_rows: Callable[[str], bool] | None = None
) -> Image:
    """One image from what a column holds. ``names_rows``: whether text may be another row's index.

    Raises:
        ValueError, OSError: it is no image, or one that is not there; names the place.
    """
    if isinstance(value, Mapping):  # as Hugging Face data sets store images
        value = value.get("bytes") or value.get("path")
    if value is STORED or (isinstance(value, bytes) and value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and names_rows is not None:
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} should be the path of an image, is {short(value)}")
    if value[:5].lower() == "data:":
        return Embedded(value)
    if len(value) > _LONGEST_NAME and _BASE64.fullmatch(value):
        return Embedded(value)
    if names_rows is not None and len(value) <= _LONGEST_NAME and names_rows(value.strip()):
        return OtherRow(value.strip())
    return folder.find(value, where)
