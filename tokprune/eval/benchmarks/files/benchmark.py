"""A benchmark from a file: a question a row, about images or videos."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.benchmarks.files.answers import AnswerFile
from tokprune.eval.benchmarks.files.columns import ANSWERS, choice_columns, id_of, names_of
from tokprune.eval.benchmarks.files.containers import open_container
from tokprune.eval.benchmarks.files.images import Embedded, ImageFolder, OtherRow
from tokprune.eval.benchmarks.files.reading import (
    NoAnswersError,
    NoImageError,
    Question,
    Reader,
)
from tokprune.eval.benchmarks.files.shapes import Shape, Survey, find_shape, shape_of
from tokprune.eval.benchmarks.scores import SCORINGS, check_scoring
from tokprune.eval.benchmarks.scores.vqa import FEWEST
from tokprune.inputs.pictures import read_picture

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class FileItem(Item):
    """A question of a file, and the number of its row."""

    row: int = field(default=0, compare=False)


class FileBenchmark(Benchmark):
    """Questions from a ``.jsonl``, ``.parquet``, ``.json`` or ``.tsv`` file.

    The shape of the file (:data:`tokprune.eval.benchmarks.files.shapes.SHAPES`) says which column
    is what, and the rule of scores; both can be named. ``docs/results.md`` lists the columns.
    Everything is checked at the start, images' bytes aside; in memory stay where the rows stand,
    and what was answered in a second file, so that files may be as long as they like.

    ``version`` is a hash of the items, of the images' bytes, and of the rule of scores.

    Args:
        path: the file.
        images: folder of the images, which may not lie outside; None: the file's own folder.
        answers: a second file, with the answers.
        shape: name of the shape; None: by the columns.
        scoring: name of the rule; None: the shape's.
        prompt_suffix: text put after every question.
        lazy: leave the images unread until :attr:`version` is looked at, or :meth:`version_of`
            called for some of the items.

    Raises:
        ValueError: not such a file; names line and field, and what was expected.
        OSError: the file, an image or the folder is not there or cannot be read.
    """

    splits = ("test",)

    def __init__(
        self,
        path: str | Path,
        *,
        images: str | Path | None = None,
        answers: str | Path | None = None,
        shape: str | None = None,
        scoring: str | None = None,
        prompt_suffix: str = "",
        lazy: bool = False,
    ) -> None:
        self.path = Path(path).expanduser()
        self._container = open_container(self.path, "benchmark")
        named = None if shape is None else find_shape(shape)
        if scoring is not None:
            check_scoring(scoring)
        self._folder = ImageFolder(self.path.parent, images)
        answer_file = None if answers is None else AnswerFile(answers)
        self.name = self.path.stem
        self.groups: Mapping[str, tuple[str, ...]] = {}
        self._tasks: dict[str, int] = {}
        #: by row: its number in the file, its task, and the start of a hash of its images
        self._rows, self._task_of, self._hashes = array("L"), array("L"), array("Q")
        #: what makes repeated ids different, by row
        self._repeated: dict[int, str] = {}
        self._indices: dict[str, int] | None = None
        self._left_out = 0
        survey = self._scan(named, answer_file, prompt_suffix)
        self.shape = self._reader.shape.name
        self.scoring = scoring or self._reader.shape.scoring(survey, self.name)
        self.tasks = self.headline = tuple(self._tasks)
        if self.scoring == "vqa" and self._fewest < FEWEST:
            raise ValueError(
                f"benchmark {self.path}: scoring 'vqa' counts how many people agree and needs at "
                f"least {FEWEST} answers to every question (VQAv2 and TextVQA have ten); one has "
                f"{self._fewest}"
            )
        self.notes = tuple(self._notes(survey))
        if not lazy:
            _ = self.version

    # ------------------------------------------------------------------ reading

    def _scan(self, named: Shape | None, answer_file: AnswerFile | None, suffix: str) -> Survey:
        """Check every row, and remember where it stands."""
        survey, ids, first = Survey(), _Ids(), True
        self._fewest = 1 << 30
        self._frames: int | None = None
        references: dict[str, str] = {}
        if self._container.names_rows:
            self._indices = {}
        for number, (where, entry) in enumerate(self._container.scan()):
            if first:
                first, self._first = False, dict.fromkeys(entry)
                shape = named or shape_of(entry, self.path, where)
                self._reader = Reader(
                    shape, self._folder, answer_file, self._names_row if
                    self._container.names_rows else None, suffix,
                )  # fmt: skip
            if self._indices is not None:
                _, name = id_of(entry, where)
                self._indices.setdefault(str(name), number)
            try:
                question = self._reader.question(entry, where)
            except NoImageError:
                if not self._reader.shape.text_only:
                    raise
                self._left_out += 1
                continue
            except NoAnswersError as error:
                raise ValueError(self._without_answers(error)) from None
            self._check_media(question, where)
            row = len(self._rows)
            self._rows.append(number)
            self._task_of.append(self._tasks.setdefault(question.task, len(self._tasks)))
            self._hashes.append(0)
            own = question.id if question.id is not None else str(number + 1)
            if (unique := ids.unique(own, question.named_by, where)) != own:
                self._repeated[row] = unique
            survey.add(question.answers, "options" in question.meta)
            self._fewest = min(self._fewest, len(question.answers))
            for one in question.images:
                if isinstance(one, OtherRow):
                    references.setdefault(str(one), where)
        if not self._rows:
            what = "with an image" if self._left_out else "at all"
            raise ValueError(f"benchmark {self.path}: holds no question {what}")
        self._check_references(references)
        return survey

    def _without_answers(self, error: Exception) -> str:
        if self._rows:  # other rows have one
            return str(error)
        return (
            f"{self.path} has no answers, so nothing can be scored ({error}); expected one of "
            f"{', '.join(ANSWERS)}; found {names_of(self._first)}; where a second file has them, "
            "name it with --answers"
        )

    def _names_row(self, text: str) -> bool:
        """Whether a short cell is no file but another row's index, seen already or not."""
        if text in (self._indices or ()):
            return True
        return not Path(text).suffix and not (self._folder.root / text).is_file()

    def _check_references(self, references: Mapping[str, str]) -> None:
        """Every row that another names is there, and has an image."""
        for index, where in references.items():
            if index not in (self._indices or ()):
                raise ValueError(
                    f"{where}: field 'image': {index!r} is neither an image nor the index of a row"
                )
            self._target_images(index, where)

    def _target_images(self, index: str, where: str) -> list[Any]:
        """The images of the row that another names."""
        number = (self._indices or {})[index]
        (entry,) = self._container.read([number], images=True)
        images, _ = self._reader.images(entry, where)
        if any(isinstance(one, OtherRow) for one in images):
            raise ValueError(f"{where}: field 'image': row {index!r} has no image of its own")
        return images

    def _check_media(self, question: Question, where: str) -> None:
        """The first row says whether the file asks about images or videos, and how many frames."""
        if not self._rows:
            self.media = "video" if question.video else "image"
            self._frames = len(question.images) if question.video else None
        elif question.video != (self.media == "video"):
            wanted, other = ("image", "frames") if question.video else ("frames", "image")
            raise ValueError(f"{where}: field {other!r}: the lines before have {wanted!r}")
        elif question.video and len(question.images) != self._frames:
            raise ValueError(
                f"{where}: field 'frames' has {len(question.images)} frames, and the first line "
                f"{self._frames}; every video should have equally many"
            )

    def _notes(self, survey: Survey) -> Iterator[str]:
        name = self.path.name
        if (self.shape, self.scoring) != ("tokprune", "exact"):
            yield f"{name}: read as {self.shape!r}, scored by the rule {self.scoring!r}"
        if self._left_out:
            yield f"{name}: {self._left_out} questions without an image are left out"
        if self._repeated:
            yield f"{name}: {len(self._repeated)} ids stood there before; #2, #3, … tell them apart"
        if self.shape == "tokprune" and choice_columns(self._first):
            yield f"{name}: columns A, B, … are not shown; --shape table shows them as options"

    # ------------------------------------------------------------------ items

    def items(
        self, split: str | None = None, tasks: Sequence[str] | None = None, limit: int | None = None
    ) -> Sequence[Item]:
        """See :meth:`Benchmark.items`; items are read when they are looked at."""
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
        rows: Sequence[int] = range(len(self._rows))
        if tasks is not None:
            wanted = {self._tasks[task] for task in tasks}
            rows = array("L", (row for row in rows if self._task_of[row] in wanted))
        if limit is not None:
            rows = _balanced(rows, self._task_of, limit)
        return Items(self, rows)

    def read_items(self, rows: Sequence[int]) -> Iterator[FileItem]:
        """Items by row."""
        for row, question in self._questions(rows, images=False):
            yield self._item(row, question)

    def _questions(self, rows: Sequence[int], images: bool) -> Iterator[tuple[int, Question]]:
        entries = self._container.read((self._rows[row] for row in rows), images)
        for row, entry in zip(rows, entries):
            yield row, self._reader.question(entry, f"{self.path}, question {row + 1}")

    def _item(self, row: int, question: Question) -> FileItem:
        own = question.id if question.id is not None else str(self._rows[row] + 1)
        return FileItem(
            id=self._repeated.get(row, own),
            task=question.task,
            image_id=self._image_id(row, question),
            question=question.text,
            answers=question.answers,
            meta=question.meta,
            row=row,
        )

    def _image_id(self, row: int, question: Question) -> str:
        if question.image_id is not None:
            return question.image_id
        files = [one for one in question.images if isinstance(one, Path)]
        if len(files) == len(question.images):
            names = [self._folder.name_of(one) for one in files]
            if len(names) == 1 and not question.video:
                return names[0]
            # two videos may begin alike
            return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
        if not self._hashes[row]:
            self._remember(row, [self._hash(one) for one in self._sources(row)])
        return f"{self._hashes[row]:016x}"

    def _remember(self, row: int, hashes: Sequence[str]) -> None:
        one = hashes[0]
        if len(hashes) > 1 or self.media == "video":
            names = json.dumps([name[:16] for name in hashes])
            one = hashlib.sha256(names.encode()).hexdigest()
        self._hashes[row] = int(one[:16], 16)

    # ------------------------------------------------------------------ version

    @cached_property
    def version(self) -> str:  # type: ignore[override]
        return self.version_of(self.items())

    def version_of(self, items: Sequence[Item]) -> str:
        """A hash of some items, of the bytes of their images, and of the rule of scores.

        Raises:
            OSError: an image cannot be read.
        """
        version = hashlib.sha256()
        rows = items.rows if isinstance(items, Items) else [_row(item) for item in items]
        for row, question in self._questions(rows, images=True):
            hashes = [self._hash(one) for one in self._own(question.images)]
            self._remember(row, hashes)
            item = self._item(row, question)
            content = [item.id, item.task, item.image_id, item.question, item.answers, *hashes]
            version.update(json.dumps(content).encode() + b"\n")
        if self.scoring != "exact":
            version.update(self.scoring.encode())
        return version.hexdigest()[:32]

    @cached_property
    def _hash_of_file(self) -> Any:
        """Questions about one image mostly stand together."""
        return lru_cache(1024)(lambda path: hashlib.sha256(path.read_bytes()).hexdigest())

    def _hash(self, image: Any) -> str:
        if isinstance(image, Path):
            digest: str = self._hash_of_file(image)
            return digest
        return hashlib.sha256(image.encode() if isinstance(image, str) else image).hexdigest()

    # ------------------------------------------------------------------ images

    def _sources(self, row: int) -> list[Any]:
        """Files or bytes of the images of a row."""
        ((_, question),) = self._questions([row], images=True)
        return self._own(question.images)

    def _own(self, images: Iterable[Any]) -> list[Any]:
        """Images, with those of other rows in place of their indices."""
        found: list[Any] = []
        for one in images:
            if isinstance(one, OtherRow):
                found += self._target_images(str(one), f"benchmark {self.path}")
            else:
                found.append(one)
        return found

    def image(self, item: Item) -> Image.Image:
        """The image of an item, the first of several, RGB."""
        if self.media == "video":
            return super().image(item)
        return self._open(item, self._sources(_row(item))[:1])[0]

    def images(self, item: Item) -> list[Image.Image]:
        if self.media == "video":
            return [super().image(item)]
        sources = self._sources(_row(item))
        return [self.image(item)] if len(sources) == 1 else self._open(item, sources)

    def video(self, item: Item) -> list[Image.Image]:
        if self.media != "video":
            return super().video(item)
        return self._open(item, self._sources(_row(item)))

    def _open(self, item: Item, sources: Sequence[Any]) -> list[Image.Image]:
        found = []
        for one in sources:
            file = f"{one.name} of " if isinstance(one, Path) else ""
            # an embedded image is text, which is read as such
            source = str(one) if isinstance(one, Embedded) else one
            found.append(read_picture(source, f"benchmark {self.path}, {file}item {item.id!r}"))
        return found

    def score(self, item: Item, answer: str) -> float:
        return SCORINGS[self.scoring](answer, item)


class Items(Sequence[Item]):
    """Items of a file, read when they are looked at."""

    def __init__(self, benchmark: FileBenchmark, rows: Sequence[int]) -> None:
        self._benchmark, self.rows = benchmark, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._benchmark.read_items(self.rows))

    @overload
    def __getitem__(self, at: int) -> Item: ...
    @overload
    def __getitem__(self, at: slice) -> Items: ...
    def __getitem__(self, at: int | slice) -> Item | Items:
        if isinstance(at, slice):
            return Items(self._benchmark, self.rows[at])
        (item,) = self._benchmark.read_items([self.rows[at]])
        return item


class _Ids:
    """Which ids have been used."""

    def __init__(self) -> None:
        #: hashes, which are shorter; two ids of one hash are not to be expected
        self._used: set[int] = set()
        self._times: dict[int, int] = {}

    def unique(self, name: str, column: str | None, where: str) -> str:
        """The id itself, or with ``#2``, ``#3``, … where it has been used.

        Raises:
            ValueError: the column ``id`` repeats one.
        """
        key = hash(name)
        if key not in self._used:
            self._used.add(key)
            return name
        if column == "id":
            raise ValueError(f"{where}: field 'id': {name!r} is used twice")
        while True:
            self._times[key] = times = self._times.get(key, 1) + 1
            if hash(found := f"{name}#{times}") not in self._used:
                self._used.add(hash(found))
                return found


def _row(item: Item) -> int:
    if not isinstance(item, FileItem):
        raise TypeError(f"item {item.id!r} is not of a file; items() gives those that are")
    return item.row


def _balanced(rows: Sequence[int], task_of: Sequence[int], limit: int) -> Sequence[int]:
    """At most ``limit`` rows, as equally many of every task as there are, in file order."""
    waiting: dict[int, list[int]] = {}
    for row in rows:
        of_task = waiting.setdefault(task_of[row], [])
        if len(of_task) < limit:
            of_task.append(row)
    chosen: list[int] = []
    turn = 0
    while len(chosen) < min(limit, len(rows)):
        for of_task in waiting.values():
            if turn < len(of_task) and len(chosen) < limit:
                chosen.append(of_task[turn])
        turn += 1
    return sorted(chosen)
