"""Questions about images and videos as model inputs, for every family alike."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from tokprune.engine.compat import RELEASE
from tokprune.errors import ChatTemplateError, shorten
from tokprune.families import bind, unwrap
from tokprune.inputs.clips import Clip
from tokprune.inputs.pixel_limits import check_shape
from tokprune.inputs.places import PORTABLE, place_pattern, split_places
from tokprune.inputs.whole_prompts import Turn, question_in, turns_of

#: prompts of processors without a chat template; ``{}`` is the question with its places
_PLAIN_FORMS = {"PaliGemmaProcessor": "{}", "PixtralProcessor": "<s>[INST]{}[/INST]"}
#: LLaVA-1.5's own form
_PLAIN_FORM = "USER: {} ASSISTANT:"
#: processors that want the images of every prompt in a list of their own
_LISTS = ("Gemma3Processor", "Gemma4Processor", "Idefics3Processor", "SmolVLMProcessor")


def prompt_text(processor: Any, question: str, images: int = 1, videos: int = 0) -> str:
    """The prompt of one question about some images and videos: by the processor's chat template,
    or in a plain form where it has none (LLaVA-1.5's; PaliGemma's and Pixtral's have their own).

    Images and videos come first, or where the question says so: ``<image>`` and ``<video>``, or the
    words that any of the families has for them, are their places. A question that is a whole
    prompt already (``USER: <image>\\nwhat is it? ASSISTANT:``), of this model or of another one,
    is taken apart and put into this model's form.

    Raises:
        ValueError: the question has places, but not as many as there are images or videos.
        ChatTemplateError: the model's chat template fails, or leaves the images out.
    """
    place = place_pattern(processor)

    def render(text: str) -> str:
        shown = [("image", "")] * images + [("video", "")] * videos
        return _rendered(processor, [("user", [*shown, ("text", text)])])

    inner = question_in(question, render, place)
    turns = None if inner is not None else turns_of(question, place)
    if turns is None:
        turns = [Turn("user", question if inner is None else inner)]
    parts = [(turn.role, split_places(processor, turn.text)) for turn in turns]
    found = [kind for _, content in parts for kind, _ in content]
    for kind, given in (("image", images), ("video", videos)):
        if found.count(kind) != given and not set(found) <= {"text"}:
            raise ValueError(
                f"prompt {shorten(question)} has {found.count(kind)} place(s) for {kind}s, and "
                f"there are {given}; they should be as many, or the prompt without places"
            )
    if set(found) <= {"text"}:
        first = next(content for role, content in parts if role == "user")
        first[:0] = [("image", "")] * images + [("video", "")] * videos
    text = _rendered(processor, parts)
    if images and not place.search(text):
        raise ChatTemplateError(f"{_template_name(processor)} leaves out the image")
    return text


def conversation_text(
    processor: Any, turns: Sequence[str], images: int = 1, videos: int = 0
) -> str:
    """The prompt of a conversation about some images and videos, which stand before it.

    Args:
        turns: what the user and the model say, in turns; the user has the last word.

    Raises:
        ChatTemplateError: the model's chat template fails.
    """
    shown = [("image", "")] * images + [("video", "")] * videos
    return _rendered(
        processor,
        [
            (
                "assistant" if number % 2 else "user",
                [*([] if number else shown), ("text", text)],
            )
            for number, text in enumerate(turns)
        ],
    )


#: (role, [("text", words), ("image", ""), …]) of every turn
_Turns = Sequence[tuple[str, Sequence[tuple[str, str]]]]


def _rendered(processor: Any, turns: _Turns) -> str:
    """The prompt of a conversation that the assistant goes on with.

    Raises:
        ChatTemplateError: the model's template fails.
    """
    if getattr(processor, "chat_template", None):
        messages = [
            {
                "role": role,
                "content": [
                    {"type": kind, **({"text": words} if kind == "text" else {})}
                    for kind, words in content
                ],
            }
            for role, content in turns
        ]
        try:
            text: str = processor.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as error:  # a template can raise whatever Python can
            raise ChatTemplateError(
                f"{_template_name(processor)} cannot make a prompt ({type(error).__name__}: "
                f"{' '.join(str(error).split())})"
            ) from error
        return text
    form = _PLAIN_FORMS.get(type(processor).__name__, _PLAIN_FORM)
    shown = [
        form.format(_plain(processor, content, form)) if role == "user"
        else "".join(words for _, words in content)
        for role, content in turns
    ]  # fmt: skip
    return " ".join(shown)


def _plain(processor: Any, content: Sequence[tuple[str, str]], form: str) -> str:
    """Places and words in a line; in LLaVA's form those that come first have lines of their own."""
    words = {
        kind: getattr(processor, f"{kind}_token", None) or word for kind, word in PORTABLE.items()
    }
    shown = [text if kind == "text" else words[kind] for kind, text in content]
    texts = [n for n, (kind, _) in enumerate(content) if kind == "text"]
    leading = texts[0] if texts else len(content)
    if form is _PLAIN_FORM and leading:
        shown.insert(leading, "\n")
    return "".join(shown)


def _template_name(processor: Any) -> str:
    """The chat template, and the file that it is from, for people."""
    home = Path(str(getattr(getattr(processor, "tokenizer", None), "name_or_path", "")))
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        if (home / name).is_file():
            return f"chat template {home / name}"
    return "the model's chat template"


def model_inputs(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[Any]] = (),
    videos: Sequence[Sequence[Clip | list[Any]]] = (),
    *,
    model: Any = None,
    padding: bool = False,
) -> Any:
    """Model inputs of a batch of prompts.

    Args:
        processor: of the model.
        texts: prompts (:func:`prompt_text`).
        images: of every prompt its images, as :func:`tokprune.inputs.pictures.read_picture` gives
            them; () where no prompt has any. They go to the processor as they are: processors do
            not turn photos as their EXIF data say.
        videos: of every prompt its videos: clips, or lists of frames.
        model: what it takes and the processor leaves out is added (:func:`add_token_types`).
        padding: whether prompts of different lengths are padded.

    Raises:
        ImportError: these inputs need a package that is not installed.
        ValueError: videos that cannot stand in one batch, a processor that is not the model's, or
            an image too long and thin to be processed.
    """
    for number, image in enumerate((image for own in images for image in own), 1):
        check_shape(processor, image, f"image {number}")
    given: dict[str, Any] = {"images": None}
    if any(images):
        lists = type(processor).__name__ in _LISTS
        given["images"] = (
            [list(own) for own in images] if lists else [image for own in images for image in own]
        )
    clips = [clip for own in videos for clip in own]
    if clips:
        given["videos"] = [clip.frames if isinstance(clip, Clip) else clip for clip in clips]
        for number, frames in enumerate(given["videos"], 1):
            check_shape(processor, frames[0], f"video {number}", video=True)
        if getattr(processor, "video_processor", None) is not None:
            # the frames are chosen already, and stood at known times
            given["do_sample_frames"] = False
            timed = [clip for clip in clips if isinstance(clip, Clip)]
            if len(timed) == len(clips):
                given["video_metadata"] = [clip.metadata() for clip in timed]
                if RELEASE < (5, 0) and type(processor).__name__ == "Qwen2_5_VLProcessor":
                    given["fps"] = [clip.shown_fps for clip in timed]  # it asks for nothing else
    begin = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    if begin and texts[0].startswith(begin):  # the template has it already
        given["add_special_tokens"] = False
    try:
        inputs = processor(text=list(texts), padding=padding, return_tensors="pt", **given)
    except (ValueError, ImportError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # of a processor whose files do not fit each other
        raise ValueError(
            f"{type(processor).__name__} cannot make inputs of the prompt ({type(error).__name__}: "
            f"{error}); its files (processor_config.json, preprocessor_config.json, …) should be "
            "those of the model"
        ) from error
    return inputs if model is None else add_token_types(model, inputs)


def add_token_types(model: Any, inputs: Any) -> Any:
    """Say which tokens are images and videos, where the model wants to be told and the inputs do
    not: without ``mm_token_type_ids`` models with M-RoPE in transformers 5 silently take
    positions on one axis, and without ``token_type_ids`` images of Gemma 3 are read as text."""
    takes = inspect.signature(type(unwrap(model)).forward).parameters
    missing = [
        name
        for name in ("mm_token_type_ids", "token_type_ids")
        if name in takes and inputs.get(name) is None
    ]
    if missing:
        known = bind(model)
        visual = known.family.placeholders(known.parts, inputs)
        for name in missing:
            # all of a PaliGemma prompt is the prefix, 0
            prefix = name == "token_type_ids" and known.family.name == "paligemma"
            inputs[name] = visual * 0 if prefix else visual
    return inputs


def encode(
    processor: Any,
    questions: Sequence[str],
    visuals: Sequence[Any],
    device: Any,
    media: Literal["image", "video"] = "image",
    model: Any = None,
) -> Any:
    """Model inputs of a batch, padded at the left.

    Args:
        visuals: one a question: an image or a list of some, or the list of a video's frames (PIL
            images; equally many frames in all videos of a batch).
        media: which of the two.
        model: as for :func:`model_inputs`.
    """
    video = media == "video"
    shown = [visual if isinstance(visual, list) and not video else [visual] for visual in visuals]
    images, videos = ([], shown) if video else (shown, [])
    texts = [
        prompt_text(processor, question, images=0 if video else len(own), videos=int(video))
        for question, own in zip(questions, shown, strict=True)
    ]
    made = model_inputs(processor, texts, images, videos, model=model, padding=True)
    return made.to(device)
