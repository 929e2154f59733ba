"""The shapes of files that benchmarks come in: by which columns each is known, and its rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokprune.errors import did_you_mean
from tokprune.eval.benchmarks.files.columns import ANSWERS, IDS, IMAGES, QUESTIONS, Entry, names_of


@dataclass
class Survey:
    """What all questions of a file have in common."""

    #: answers of ten people, some of them the same: VQAv2, TextVQA, OK-VQA, VizWiz
    people: bool = True
    repeated: bool = False
    yes_no: bool = True
    letters: bool = True
    options: bool = False

    def add(self, answers: tuple[str, ...], options: bool) -> None:
        self.people = self.people and len(answers) == 10
        self.repeated = self.repeated or len(set(answers)) < len(answers)
        self.yes_no = self.yes_no and all(a.strip().lower() in ("yes", "no") for a in answers)
        self.letters = self.letters and all(len(a) == 1 and "A" <= a <= "Z" for a in answers)
        self.options = self.options or options

    def scoring(self, yes_no: str = "yes-no") -> str:
        """The rule that the answers suggest."""
        if self.options:
            return "letter"
        if self.people and self.repeated:
            return "vqa"
        if self.yes_no:
            return yes_no
        return "letter" if self.letters else "exact"


@dataclass(frozen=True)
class Shape:
    """One way to write down questions."""

    name: str
    #: what the columns are, in words
    columns: str
    #: whether an entry, the first of a file, is of this shape
    fits: Callable[[Entry], bool]
    #: the rule, from the survey and the file's name
    scoring: Callable[[Survey, str], str]
    #: column of the question type, where the benchmark's own figure is by that; else one task
    task: str | None = None
    #: columns of options are shown, and answers are options
    choices: bool = True
    #: word before a hint
    hint: str = ""
    #: questions without an image belong to the benchmark and are left out
    text_only: bool = False


def _has(*names: str) -> Callable[[Entry], bool]:
    return lambda entry: all(name in entry for name in names)


def _any(*names: str) -> Callable[[Entry], bool]:
    return lambda entry: any(name in entry for name in names)


def _own(entry: Entry) -> bool:
    pictured = any(entry.get(name) is not None for name in ("image", "images", "frames"))
    return _has("id", "question")(entry) and pictured


def _chartqa(entry: Entry) -> bool:
    return _has("imgname", "query")(entry) or "human_or_machine" in entry or (
        entry.get("type") in ("human_test", "augmented_test")
    )  # fmt: skip


def _ocrbench(entry: Entry) -> bool:
    dataset, kind = _any("dataset", "dataset_name"), _any("question_type", "type")
    return dataset(entry) and kind(entry) and "question" in entry


#: as VLMEvalKit: the data set's name decides, which is the file's
_BY_NAME = (
    (("docvqa", "infovqa"), "anls"), (("chartqa",), "relaxed"), (("ocrbench",), "contains"),
    (("textvqa", "ocrvqa_", "vqav2"), "vqa"), (("pope", "mme", "hallusion"), "yes-no"),
)  # fmt: skip


def _vlmevalkit(survey: Survey, name: str) -> str:
    if not survey.options:
        for beginnings, rule in _BY_NAME:
            people = rule != "vqa" or survey.people
            if name.lower().startswith(beginnings) and people:
                return rule
    return survey.scoring()


def _always(rule: str) -> Callable[[Survey, str], str]:
    return lambda survey, name: rule


def _suggested(yes_no: str) -> Callable[[Survey, str], str]:
    return lambda survey, name: survey.scoring(yes_no)


#: the first that fits is taken
SHAPES: tuple[Shape, ...] = (
    Shape(
        "tokprune", "id, question, image, images or frames, answer or answers, task",
        _own, lambda s, name: "vqa" if s.people and s.repeated else "exact", "task", choices=False,
    ),
    Shape(
        "docvqa", "questionId, question, image, answers, ucsf_document_id or docId",
        _any("ucsf_document_id", "docId"), _always("anls"),
    ),
    Shape(
        "infovqa", "questionId, question, image or image_local_name, answers, answer_type",
        _any("image_local_name", "operation/reasoning", "ocr_output_file"), _always("anls"),
    ),
    Shape(
        "ocrbench", "question, image or image_path, answers, dataset, question_type",
        _ocrbench, _always("contains"),
    ),
    Shape("chartqa", "imgname or image, query or question, label or answer",
          _chartqa, _always("relaxed")),
    Shape(
        "scienceqa", "question, choices, answer (its number), hint, image, lecture",
        lambda e: "choices" in e and _any("lecture", "solution", "skill")(e), _always("letter"),
        hint="Context: ", text_only=True,
    ),
    Shape("vlmevalkit", "index, question, image or image_path, answer, A, B, C, …, hint",
          _has("index", "question"), _vlmevalkit),
    Shape("llava", "question_id, image, text, label or answer, category",
          _has("question_id", "text"), _suggested("pope"), "category"),
    Shape(
        "mme", "question_id, image, question, answer (yes or no), category",
        lambda e: _has("question_id", "question", "category")(e)
        and str(e.get("answer")).strip().lower() in ("yes", "no"),
        _suggested("mme"), "category",
    ),
    Shape(
        "vqa", "question_id, question, image or image_id, answers of ten people",
        lambda e: _has("question_id", "question")(e) and _any("image_id", "answers")(e),
        lambda s, name: "vqa" if s.people else s.scoring(),
    ),
    Shape("table", "question, text or query; image, images or image_path; answer, answers or label",
          _any(*QUESTIONS), _suggested("yes-no"), "task"),
)  # fmt: skip


def find_shape(name: str) -> Shape:
    """A shape by name.

    Raises:
        ValueError: no such shape; lists what there is.
    """
    found = {shape.name: shape for shape in SHAPES}
    if name not in found:
        raise ValueError(
            f"shape={name!r} should be one of {', '.join(found)}.{did_you_mean(name, found)}"
        )
    return found[name]


def shape_of(entry: Entry, path: Path, where: str) -> Shape:
    """The shape of a file by its first entry.

    Raises:
        ValueError: none fits; names the columns, and what was expected.
    """
    for shape in SHAPES:
        if shape.fits(entry):
            return shape
    found = f"expected {SHAPES[-1].columns}; found {names_of(entry)}"
    if _any(*ANSWERS)(entry) and _any(*IDS)(entry) and not _any(*IMAGES)(entry):
        raise ValueError(
            f"{where}: holds answers and no question (field 'question' should be text, is "
            f"missing); --benchmark names the file of questions, and --answers this one; {found}"
        )
    raise ValueError(
        f"{where}: no column holds a question: field 'question' should be text, is missing; {found}"
    )
