"""A benchmark from a file: JSON lines or parquet, one question a line, about images or videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.inputs.pictures import read_picture

if TYPE_CHECKING:
    from PIL import Image

_TASK = "all"
_FIELDS = ("id", "image", "frames", "question", "answer", "answers", "task", "image_id", "meta")
#: an image: its file, or the bytes of one
_Image: TypeAlias = "Path | bytes"


class FileBenchmark(Benchmark):
    """Questions from a ``.jsonl`` or ``.parquet`` file.

    Fields: ``id`` (unique), ``image`` (path, relative to the file; in parquet also the bytes of a
    image file, or Hugging Face's ``{"bytes", "path"}``) or, for questions about videos,
    ``frames`` (a list of such images in order, equally many in every line), ``question``,
    ``answer`` or ``answers`` (text, or a list of all that are correct), and optionally ``task``
    ("all"), ``image_id`` (equal for questions about one image or video; by default the path or a
    hash of the bytes) and ``meta``.
    Other fields are ignored. All tasks are in the headline; there are no groups and one split.

    ``version`` is a hash of the items and of the images' bytes.

    Args:
        path: the file.

    Raises:
        ValueError: not such a file; names line and field.
        OSError: the file or an image cannot be read.
    """

    splits = ("test",)

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        if suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"benchmark {self.path}: should be a .jsonl or .parquet file")
        if not self.path.is_file():
            raise FileNotFoundError(f"benchmark {self.path}: no such file")
        lines = _json_lines(self.path) if suffix == ".jsonl" else _parquet_rows(self.path)
        self._items: list[Item] = []
        self._images: dict[str, list[_Image]] = {}
        hashes: dict[_Image, str] = {}
        version = hashlib.sha256()
        for where, entry in lines:
            item, images = self._item(entry, where, hashes)
            if item.id in self._images:
                raise ValueError(f"{where}: field 'id': {item.id!r} is used twice")
            self._items.append(item)
            self._images[item.id] = images
            content = [item.id, item.task, item.image_id, item.question, item.answers]
            content += [hashes[image] for image in images]
            version.update(json.dumps(content).encode() + b"\n")
        if not self._items:
            raise ValueError(f"benchmark {self.path}: holds no question")
        self.name = self.path.stem
        self.version = version.hexdigest()[:32]
        self.tasks = tuple(dict.fromkeys(item.task for item in self._items))
        self.headline = self.tasks
        self.groups: Mapping[str, tuple[str, ...]] = {}

    def items(
        self, split: str | None = None, tasks: Sequence[str] | None = None, limit: int | None = None
    ) -> list[Item]:
        if split not in (None, *self.splits):
            raise ValueError(
                f"split={split!r} is unknown to benchmark {self.name}; it has "
                f"{', '.join(self.splits)}"
            )
        for task in tasks or ():
            if task not in self.tasks:
                raise ValueError(
                    f"task {task!r} is unknown to benchmark {self.name}; it has "
                    f"{', '.join(self.tasks)}"
                )
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} should be at least 1")
        chosen = [item for item in self._items if tasks is None or item.task in tasks]
        return chosen if limit is None else _balanced(chosen, limit)

    def image(self, item: Item) -> Image.Image:
        if self.media == "video":
            return super().image(item)
        return self._open(item, self._images[item.id][0])

    def video(self, item: Item) -> list[Image.Image]:
        if self.media != "video":
            return super().video(item)
        return [self._open(item, image) for image in self._images[item.id]]

    def _open(self, item: Item, image: _Image) -> Image.Image:
        file = "" if isinstance(image, bytes) else f"{image.name} of "
        return read_picture(image, f"benchmark {self.path}, {file}item {item.id!r}")

    def _item(self, entry: Any, where: str, hashes: dict[_Image, str]) -> tuple[Item, list[_Image]]:
        """One question and its image or frames; ``hashes`` gets the hashes of their bytes."""
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: should be an object with fields {', '.join(_FIELDS[:5])}")
        images = self._visual(entry, where)
        for image in images:
            if image not in hashes:
                hashes[image] = hashlib.sha256(
                    image if isinstance(image, bytes) else image.read_bytes()
                ).hexdigest()
        image_id = entry.get("image_id")
        if image_id is None:
            names = [self._name(image, hashes) for image in images]
            image_id = names[0]
            if self.media == "video":  # two videos may begin alike
                image_id = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
        item = Item(
            id=_text(entry, "id", where),
            task=_text(entry, "task", where) if entry.get("task") is not None else _TASK,
            image_id=str(image_id),
            question=_text(entry, "question", where),
            answers=_answers(entry, where),
            meta=_meta(entry, where),
        )
        return item, images

    def _name(self, image: _Image, hashes: Mapping[_Image, str]) -> str:
        if isinstance(image, bytes):
            return hashes[image][:16]
        home = self.path.parent
        return (image.relative_to(home) if image.is_relative_to(home) else image).as_posix()

    def _visual(self, entry: Mapping[str, Any], where: str) -> list[_Image]:
        """The image, or the frames of the video, that a question is about.

        The first line says which of the two the benchmark asks about, and how many frames.
        """
        frames = entry.get("frames")
        if frames is not None and entry.get("image") is not None:
            raise ValueError(f"{where}: field 'image' or 'frames' should be given, both are there")
        media: Literal["image", "video"] = "image" if frames is None else "video"
        if not self._items:
            self.media = media
        elif media != self.media:
            wanted, other = ("frames", "image") if media == "image" else ("image", "frames")
            raise ValueError(f"{where}: field {other!r}: the lines before have {wanted!r}")
        if frames is None:
            return [self._image(entry.get("image"), "image", where)]
        if not isinstance(frames, (list, tuple)) or not frames:
            raise ValueError(
                f"{where}: field 'frames' should be a list of images, is {_short(frames)}"
            )
        if self._items and len(frames) != (first := len(self._images[self._items[0].id])):
            raise ValueError(
                f"{where}: field 'frames' has {len(frames)} frames, and the first line {first}; "
                "every video should have equally many"
            )
        return [
            self._image(frame, f"frames[{number}]", where) for number, frame in enumerate(frames)
        ]

    def _image(self, value: Any, name: str, where: str) -> _Image:
        if isinstance(value, dict):  # as Hugging Face datasets store images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{where}: field {name!r} should be the path of an image"
                + ("" if self.path.suffix.lower() == ".jsonl" else " or its bytes")
                + f", is {_short(value)}"
            )
        path = self.path.parent / value
        if not path.is_file():
            raise FileNotFoundError(f"{where}: field {name!r}: {value}: no such file")
        return path


def _text(entry: Mapping[str, Any], name: str, where: str) -> str:
    value = entry.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and name == "id":
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: field {name!r} should be text, is {_short(value)}")
    return value


def _answers(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """All accepted answers, from ``answers`` or ``answer``."""
    names = [name for name in ("answer", "answers") if entry.get(name) is not None]
    if len(names) != 1:
        what = "both are there" if names else "neither is there"
        raise ValueError(f"{where}: field 'answer' or 'answers' should be given, {what}")
    (name,) = names
    value = entry[name]
    values = value if isinstance(value, (list, tuple)) else [value]
    plain = [
        str(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for v in values
    ]
    if not plain or not all(isinstance(v, str) and v.strip() for v in plain):
        raise ValueError(
            f"{where}: field {name!r} should be text or a list of texts, is {_short(value)}"
        )
    return tuple(plain)


def _meta(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    meta = entry.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise ValueError(f"{where}: field 'meta' should be an object, is {_short(meta)}")
    return dict(meta or {})


def _short(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            "parquet needs pyarrow, which is not installed: pip install 'tokprune[sweep]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in _FIELDS]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for entry in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", entry
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from None


def _balanced(items: Sequence[Item], limit: int) -> list[Item]:
    """At most ``limit`` items, as equally many of every task as there are, in file order."""
    waiting: dict[str, list[Item]] = {}
    for item in items:
        waiting.setdefault(item.task, []).append(item)
    chosen: set[str] = set()
    turn = 0
    while len(chosen) < min(limit, len(items)):
        for of_task in waiting.values():
            if turn < len(of_task) and len(chosen) < limit:
                chosen.add(of_task[turn].id)
        turn += 1
    return [item for item in items if item.id in chosen]
