"""Prompts that are whole conversations already, as scripts for one model hold them: taken apart, so
that they can be put into the form of the model at hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

#: stands for the question where a template is tried
_SENTINEL = "QQsentinelQQ"
#: begins of a sequence, which tokenizers or templates set themselves
_BEGIN = re.compile(r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|\[gMASK\]<sop>|<BOS_TOKEN>)\s*")


@dataclass(frozen=True)
class Turn:
    """``role``: "system", "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class _Form:
    """How a conversation is written; regular expressions."""

    user: str
    assistant: str
    system: str = r"(?!)"
    end: str = r"(?!)"


_FORMS = (
    # ChatML (Qwen, InternVL, LLaVA-OneVision)
    _Form(
        r"<\|im_start\|>user\n?", r"<\|im_start\|>assistant\n?", r"<\|im_start\|>system\n?",
        r"<\|im_end\|>",
    ),
    # Idefics 3, SmolVLM
    _Form(
        r"(?:<\|im_start\|>)?User:", r"(?:(?<=<end_of_utterance>)|(?<=\n))Assistant:",
        r"<\|im_start\|>System:", r"<end_of_utterance>",
    ),
    # Gemma 3
    _Form(r"<start_of_turn>user\n?", r"<start_of_turn>model\n?", end=r"<end_of_turn>"),
    # Llama 3
    _Form(
        r"<\|start_header_id\|>user<\|end_header_id\|>",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>",
        r"<\|start_header_id\|>system<\|end_header_id\|>", r"<\|eot_id\|>",
    ),
    # GLM-4V, Phi-3
    _Form(r"<\|user\|>", r"<\|assistant\|>", r"<\|system\|>", r"<\|end\|>"),
    # Aya Vision, Command
    _Form(
        r"<\|START_OF_TURN_TOKEN\|><\|USER_TOKEN\|>",
        r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>(?:<\|START_RESPONSE\|>)?",
        r"<\|START_OF_TURN_TOKEN\|><\|SYSTEM_TOKEN\|>",
        r"(?:<\|END_RESPONSE\|>)?<\|END_OF_TURN_TOKEN\|>",
    ),
    # Mistral, Pixtral
    _Form(r"\[INST\]", r"\[/INST\]", end="</s>"),
    # LLaVA 1.0, LLaVA 1.5 (Vicuna)
    _Form(r"###\s*Human:", r"###\s*Assistant:", r"###\s*System:"),
    _Form(r"(?<!\w)(?:USER|Human):", r"(?<!\w)(?:ASSISTANT|Assistant):", end="</s>"),
)  # fmt: skip


def turns_of(text: str, leading: re.Pattern[str]) -> list[Turn] | None:
    """The turns of a prompt that is a conversation which the assistant is to go on with, the empty
    last turn left out; None where it is no such.

    Args:
        text: a prompt.
        leading: what may stand before the first turn and belongs to it (a place of an image); other
            text there is the system's.
    """
    text = _without_begin(text)
    for form in _FORMS:
        marks = list(re.finditer(
            f"(?P<system>{form.system})|(?P<user>{form.user})|(?P<assistant>{form.assistant})", text
        ))  # fmt: skip
        roles = [str(mark.lastgroup) for mark in marks]
        open_end = (
            "user" in roles and roles[-1] == "assistant" and not text[marks[-1].end() :].strip()
        )
        # one turn of the user, whose end was forgotten; "Human: …" may be a question's own words
        alone = roles == ["user"] and not leading.sub("", text[: marks[0].start()]).strip()
        if not open_end and not (alone and not marks[0][0].startswith(("Human", "User"))):
            continue
        ends = [mark.start() for mark in marks[1:]] + [len(text)] * alone
        turns = [
            Turn(role, _inside(text[mark.end() : end], form))
            for role, mark, end in zip(roles, marks, ends)
        ]
        before = _inside(text[: marks[0].start()], form)
        if not leading.sub("", before).strip():
            first = roles.index("user")
            turns[first] = Turn("user", before + turns[first].text)
        elif roles[0] != "system":
            turns.insert(0, Turn("system", before))
        return [turn for turn in turns if turn.text or turn.role != "system"]
    return None


def _inside(text: str, form: _Form) -> str:
    return re.sub(rf"\s*{form.end}\s*$", "", text).strip()


def question_in(text: str, render: Callable[[str], str], place: re.Pattern[str]) -> str | None:
    """The question of a prompt that a template has made, with its places; None where the template
    makes others.

    Args:
        text: a prompt.
        render: the template: a question → its prompt.
        place: a place of an image or a video.
    """
    made = _without_begin(render(_SENTINEL))
    if made.count(_SENTINEL) != 1:
        return None
    heads, tails = (place.sub(" ", part).split() for part in made.split(_SENTINEL))
    text = _without_begin(text)
    if not heads and not tails:
        return None
    found, at = "", 0
    for head in heads:
        while gap := place.match(text, at) or re.compile(r"\s+").match(text, at):
            found += gap[0].strip()
            at = gap.end()
        if not text.startswith(head, at):
            return None
        at += len(head)
    rest = text[at:].rstrip()
    for tail in reversed(tails):
        if not rest.endswith(tail):
            return None
        rest = rest.removesuffix(tail).rstrip()
    return found + rest.lstrip()


def _without_begin(text: str) -> str:
    begin = _BEGIN.match(text)
    return text[begin.end() :] if begin else text
