"""The words of a question in the language model's own embedding table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokprune.methods.options import check_choice

#: sentences of evaluations that say how to answer, and nothing of the image
_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
_STOP_WORDS = (
    "a an the is are was were be been being have has had do does did it they he she we you i what "
    "where when why how who which and or but so if then question answer to for with by from at "
    "into onto upon"
)


def keywords(question: str) -> str:
    """The words of a question without the two usual instructions (where they match to the letter)
    and without stop words, joined by blanks. Where only stop words are left, the question without
    its instructions.

    Source: MMTok, arXiv 2508.18264, its code for LLaVA.
    """
    for instruction in _INSTRUCTIONS:
        question = question.replace(instruction, "")
    words, stop = re.findall(r"\b\w+\b", question), _STOP_WORDS.split()
    return " ".join(word for word in words if word.lower() not in stop) or question


@dataclass(frozen=True, eq=False)
class QuestionWords:
    """Questions as rows of the language model's embedding table.

    Args:
        model: the model, or any module with ``get_input_embeddings()``.
        questions: what is asked, for all images, or one per image in the order of the prompts.
        tokenizer: the model's.
        form: "keywords": see :func:`keywords`; "question": the whole text behind "Question: ", as
            published for Qwen2.5-VL.

    Raises:
        ValueError: there is no question, or an unknown ``form``.

    Source: MMTok, arXiv 2508.18264, its code.
    """

    model: Any = field(repr=False)
    questions: str | Sequence[str]
    tokenizer: Any = field(repr=False)
    form: Literal["keywords", "question"] = "keywords"
    #: [m, D] of each question, in the dtype of the table
    embeds: tuple[Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice(self.form, "form", ("keywords", "question"))
        given = [self.questions] if isinstance(self.questions, str) else list(self.questions)
        if not given:
            raise ValueError("questions is empty; it should be a question, or one per image")
        object.__setattr__(self, "embeds", tuple(self._embed(question) for question in given))

    @torch.no_grad()
    def _embed(self, question: str) -> Tensor:
        text = keywords(question) if self.form == "keywords" else f"Question: {question}"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        table = self.model.get_input_embeddings()
        rows: Tensor = table(torch.tensor(ids, dtype=torch.long, device=table.weight.device))
        return rows

    def of_images(self, images: int) -> list[Tensor]:
        """[m, D] of every image.

        Raises:
            ValueError: there are several questions, and not as many as images.
        """
        if len(self.embeds) == 1:
            return list(self.embeds) * images
        if len(self.embeds) != images:
            raise ValueError(
                f"questions has {len(self.embeds)} entries for {images} images; it should have "
                "one for all, or one per image"
            )
        return list(self.embeds)
